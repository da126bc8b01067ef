"""What a GGUF file says about its tokenizer, checked: tokens, their types, special roles.

Imports neither the tokenizers library nor jinja2, so the engine process can learn here which tokens
end an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from octavo.errors import ModelFileError

_Value = TypeVar("_Value")

# Token types of ggml.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KEY = "tokenizer.ggml."

# Tokens that end an answer by their name alone: many files declare only one of theirs.
_ENDING_NAMES = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "</s>",
        "<eos>",
    }
)


@dataclass(frozen=True, slots=True)
class GGUFTokens:
    """The token list of a file, checked.

    Attributes:
        texts: as the file writes them.
        kinds: ggml's token type of each id that is no ordinary token.
    """

    texts: list[str]
    kinds: dict[int, int]

    def of_kind(self, *kinds: int) -> list[int]:
        """Ids of these kinds."""
        return [index for index, kind in self.kinds.items() if kind in kinds]


def gguf_eos_token_ids(metadata: Mapping[str, object]) -> frozenset[int]:
    """Ids that end an answer: those the file declares, and tokens whose name says so."""
    tokens = read_tokens(metadata)
    named = [index for index in tokens.of_kind(CONTROL) if tokens.texts[index] in _ENDING_NAMES]
    ids = declared_ids(metadata, len(tokens.texts))
    return frozenset([*named, *(ids[name] for name in ("eos", "eot", "eom") if name in ids)])


def gguf_variables(metadata: Mapping[str, object]) -> dict[str, str]:
    """The texts that a chat template knows by name: bos_token, eos_token and so on."""
    texts = list_of(metadata, "tokens", str)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = declared_ids(metadata, len(texts))
    return {name: texts[ids[key]] for key, name in names.items() if key in ids}


def read_tokens(metadata: Mapping[str, object]) -> GGUFTokens:
    """The token list with a type for each token."""
    texts = list_of(metadata, "tokens", str)
    if not texts:
        raise ModelFileError("the GGUF file's tokenizer.ggml.tokens is missing or empty")
    kinds = list_of(metadata, "token_type", int) or [NORMAL] * len(texts)
    if len(kinds) < len(texts):
        raise ModelFileError("the GGUF file's tokenizer.ggml.token_type is shorter than its tokens")
    odd = {index: kind for index, kind in enumerate(kinds[: len(texts)]) if kind != NORMAL}
    return GGUFTokens(texts, odd)


def list_of(metadata: Mapping[str, object], key: str, kind: type[_Value]) -> list[_Value]:
    """A list from the metadata, [] if absent; its first entry stands for the type of all."""
    values = metadata.get(KEY + key, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values[:1]):
        raise ModelFileError(f"the GGUF file's {KEY}{key} is not a list of {kind.__name__}")
    return values


def string_of(metadata: Mapping[str, object], key: str, default: str) -> str:
    """A string from the metadata."""
    value = metadata.get(KEY + key, default)
    if not isinstance(value, str):
        raise ModelFileError(f"the GGUF file's {KEY}{key} is not a string")
    return value


def declared_ids(metadata: Mapping[str, object], size: int) -> dict[str, int]:
    """The special tokens that the file names, by role; one out of range counts as not named."""
    is_sentencepiece = string_of(metadata, "model", "") == "llama"
    ids = {"unknown": 0, "bos": 1, "eos": 2} if is_sentencepiece else {}
    for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"{KEY}{role}_token_id")
        if value is not None and not isinstance(value, int):
            raise ModelFileError(f"the GGUF file's {KEY}{role}_token_id is not a token id")
        if value is not None and 0 <= value < size:
            ids[role] = value
    return {role: token_id for role, token_id in ids.items() if token_id < size}

"""From a model folder to a Vocabulary: tokenizer.json as it is, and its companions.

The library's own tokenizer encodes text whose special tokens count; a second one, which shares its
model, encodes text in which they do not. Reads no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from octavo.errors import ModelFileError
from octavo.tokenizer.folder_files import folder_eos_token_ids, folder_variables
from octavo.tokenizer.pieces import PieceKind, Pieces
from octavo.tokenizer.tokenizer import Vocabulary


def folder_vocabulary(folder: Path) -> Vocabulary:
    """Build the vocabulary of a folder.

    Raises:
        ModelFileError: tokenizer.json is missing, broken or of a kind that is not supported.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFileError(
            f"{folder} has no tokenizer.json; add it, or take the model's GGUF file"
        )
    try:
        whole = Tokenizer.from_file(str(path))
    except Exception as fault:  # the library raises bare Exception
        raise ModelFileError(f"{path} is broken: {fault}") from fault
    whole.no_truncation()  # a request's length is checked elsewhere
    whole.no_padding()
    added: dict[int, AddedToken] = whole.get_added_tokens_decoder()
    specials = {token_id: token for token_id, token in added.items() if token.special}
    plain = _without_specials(whole, added)
    kind, strips = _decoding(_state(whole.decoder), path)
    literal = {token_id: token.content.encode() for token_id, token in added.items()}
    prefix, suffix = _surroundings(whole)
    bos = folder_variables(folder).get("bos_token")
    return Vocabulary(
        plain=plain,
        continued=_continued(plain, whole, added),
        whole=whole,
        pieces=Pieces(kind, whole, literal, strips_leading_space=strips),
        specials={token.content: token_id for token_id, token in specials.items()},
        stripping={
            token_id: (token.lstrip, token.rstrip)
            for token_id, token in specials.items()
            if token.lstrip or token.rstrip
        },
        size=max(whole.get_vocab_size(), max(added, default=-1) + 1),
        prefix_ids=prefix,
        suffix_ids=suffix,
        bos_token_id=whole.token_to_id(bos) if bos is not None else None,
        eos_token_ids=folder_eos_token_ids(folder),
    )


def _without_specials(whole: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """A tokenizer over the same model, in the same memory, that takes special tokens for text."""
    plain = Tokenizer(whole.model)
    if whole.normalizer is not None:
        plain.normalizer = whole.normalizer
    if whole.pre_tokenizer is not None:
        plain.pre_tokenizer = whole.pre_tokenizer
    for token_id, token in sorted(added.items()):
        add = plain.add_special_tokens if token.special else plain.add_tokens
        add([token])
        if plain.token_to_id(token.content) != token_id:
            raise ModelFileError(f"tokenizer.json gives {token.content!r} an id out of order")
    plain.encode_special_tokens = True
    return plain


def _continued(
    plain: Tokenizer, whole: Tokenizer, added: Mapping[int, AddedToken]
) -> Tokenizer | None:
    """For text after a special token, if only the first word of a text gets a space before it."""
    state = _state(whole.pre_tokenizer)
    if state.get("type") != "Metaspace" or state.get("prepend_scheme") != "first":
        return None
    continued = _without_specials(plain, added)
    continued.pre_tokenizer = pre_tokenizers.Metaspace(
        state["replacement"], prepend_scheme="never", split=state.get("split", True)
    )
    return continued


def _decoding(decoder: Mapping[str, Any], path: Path) -> tuple[PieceKind, bool]:
    """How tokens become bytes, and whether the first one loses its space."""
    steps = list(_steps(decoder))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level", False
    if "Metaspace" in kinds:
        return "sentencepiece", any(step.get("prepend_scheme") != "never" for step in steps)
    if "ByteFallback" in kinds or "Replace" in kinds:
        return "sentencepiece", any(
            step["type"] == "Strip" and step.get("start") == 1 for step in steps
        )
    found = ", ".join(sorted(kinds)) or "none"
    raise ModelFileError(
        f"{path} has a decoder that Octavo does not know ({found});"
        " it knows ByteLevel, Metaspace and ByteFallback"
    )


def _steps(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A component of the library's, or those of a sequence."""
    if description.get("type") == "Sequence":
        for part in description.get("decoders", ()):
            yield from _steps(part)
    elif description:
        yield description


def _state(component: Any) -> dict[str, Any]:
    """How the library describes one of its components; {} for none."""
    if component is None:
        return {}
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def _surroundings(whole: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the file puts before and after a text."""
    bare = whole.encode("a", add_special_tokens=False).ids
    full = whole.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()

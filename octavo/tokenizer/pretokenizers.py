"""How byte-level vocabularies cut text into words before merging, by the name in a GGUF file.

One row a family. A name without a row is refused: a wrong cut gives other tokens and a worse model
without a sound.
Source: the patterns belong to the vocabularies themselves (GPT-2, Llama 3, Qwen2); the names and
    which of them share a pattern are those of ggml's converter.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from octavo.errors import ModelFileError

_CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORDS = (
    rf"(?:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{digits}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One family's rules.

    Attributes:
        patterns: applied one after another; each cuts every piece into matches and what lies
            between them.
        takes_whole_words: a word that is a token is taken as it is, without merging.
        adds_bos: texts begin with the model's first token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    takes_whole_words: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The library's object for these rules, ending in bytes."""
        cuts = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*cuts, to_bytes])


_ROWS: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (("gpt-2", "phi-2", "mpt", "olmo", "jais"), PreTokenizer((_GPT2,))),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
        PreTokenizer((_WORDS.replace("{digits}", "{1,3}"),), takes_whole_words=True, adds_bos=True),
    ),
    (("qwen2", "deepseek-r1-qwen"), PreTokenizer((_WORDS.replace("{digits}", ""),))),
    (
        ("default",),
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ),
)

PRE_TOKENIZERS = {name: row for names, row in _ROWS for name in names}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The rules that a file names; raises ModelFileError for a name that is not known."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelFileError(
            f"the model's tokenizer.ggml.pre is {name!r}, which Octavo cannot reproduce"
            f" (it knows {known});"
            " take another file of the model, or the folder with its tokenizer.json"
        ) from None

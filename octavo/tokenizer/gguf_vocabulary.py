"""From a GGUF file's metadata to a Vocabulary: byte-level BPE and SentencePiece kinds.

Token for token what llama.cpp makes of the same file, with one exception on purpose: text never
becomes a control token. Reads metadata only, never tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, models, normalizers

from octavo.errors import ModelFileError
from octavo.tokenizer.gguf_metadata import (
    BYTE,
    CONTROL,
    KEY,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GGUFTokens,
    declared_ids,
    gguf_eos_token_ids,
    list_of,
    read_tokens,
    string_of,
)
from octavo.tokenizer.merges import sentencepiece_merges
from octavo.tokenizer.pieces import Pieces
from octavo.tokenizer.pretokenizers import find_pre_tokenizer
from octavo.tokenizer.tokenizer import Vocabulary


def gguf_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """Build the vocabulary that a file's metadata describes.

    Raises:
        ModelFileError: no tokenizer in the file, one of a kind that is not supported, or a broken
            one.
    """
    kind = string_of(metadata, "model", "")
    if kind not in ("gpt2", "llama"):
        raise ModelFileError(
            f"the model's tokenizer.ggml.model is {kind!r}; Octavo reads byte-level BPE ('gpt2')"
            " and SentencePiece ('llama')"
            if kind
            else "the GGUF file has no tokenizer (tokenizer.ggml.model); take another file"
        )
    tokens = read_tokens(metadata)
    try:
        return _byte_level(metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens)
    except ModelFileError:
        raise
    except Exception as fault:  # the library raises bare Exception
        raise ModelFileError(f"the GGUF file's tokenizer is broken: {fault}") from fault


def _byte_level(metadata: Mapping[str, object], tokens: GGUFTokens) -> Vocabulary:
    """Byte-level BPE with the merges of the file."""
    rules = find_pre_tokenizer(string_of(metadata, "pre", "default"))
    cut = (merge.partition(" ") for merge in list_of(metadata, "merges", str))
    merges = [(left, right) for left, _, right in cut]
    model = models.BPE(
        {name: index for index, name in enumerate(_unique_names(tokens))},
        merges,
        ignore_merges=rules.takes_whole_words,
    )
    plain = _inner(model, tokens)
    plain.pre_tokenizer = rules.build()
    literal = _literal_pieces(tokens)
    return _finish(metadata, tokens, Pieces("byte_level", plain, literal), plain, rules.adds_bos)


def _sentencepiece(metadata: Mapping[str, object], tokens: GGUFTokens) -> Vocabulary:
    """SentencePiece BPE: neighbours whose joined text is a token join, the best score first."""
    scores = list_of(metadata, "scores", float)
    if len(scores) < len(tokens.texts):
        raise ModelFileError("the GGUF file's tokenizer.ggml.scores is shorter than its token list")
    apart = set(tokens.of_kind(UNKNOWN, CONTROL, BYTE))
    joinable = {text: index for index, text in enumerate(tokens.texts) if index not in apart}
    merges = sentencepiece_merges(joinable, scores)
    names = _unique_names(tokens)
    name = names.__getitem__
    model = models.BPE(
        {text: index for index, text in enumerate(names)},
        list(zip(map(name, merges[::2]), map(name, merges[1::2]), strict=True)),
        unk_token=names[declared_ids(metadata, len(names)).get("unknown", 0)],
        fuse_unk=True,
        byte_fallback=True,
    )
    plain = _inner(model, tokens)
    has_prefix = bool(metadata.get(KEY + "add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    plain.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if has_prefix else spaces
    )
    literal = _literal_pieces(tokens)
    pieces = Pieces("sentencepiece", plain, literal, strips_leading_space=has_prefix)
    return _finish(metadata, tokens, pieces, plain, True)


def _inner(model: models.Model, tokens: GGUFTokens) -> tokenizers.Tokenizer:
    """The library's tokenizer; it finds user-defined tokens in any text, and no control tokens."""
    inner = tokenizers.Tokenizer(model)
    inner.add_tokens(
        [
            AddedToken(tokens.texts[index], normalized=False)
            for index in tokens.of_kind(USER_DEFINED)
            if tokens.texts[index]
        ]
    )
    return inner


def _finish(
    metadata: Mapping[str, object],
    tokens: GGUFTokens,
    pieces: Pieces,
    plain: tokenizers.Tokenizer,
    adds_bos: bool,
) -> Vocabulary:
    """Put the parts together with the file's special tokens."""
    ids = declared_ids(metadata, len(tokens.texts))
    bos, eos = ids.get("bos"), ids.get("eos")
    adds_bos = bool(metadata.get(KEY + "add_bos_token", adds_bos))
    adds_eos = bool(metadata.get(KEY + "add_eos_token", False))
    return Vocabulary(
        plain=plain,
        pieces=pieces,
        specials={tokens.texts[index]: index for index in tokens.of_kind(UNKNOWN, CONTROL)},
        size=len(tokens.texts),
        prefix_ids=(bos,) if adds_bos and bos is not None else (),
        suffix_ids=(eos,) if adds_eos and eos is not None else (),
        bos_token_id=bos,
        eos_token_ids=gguf_eos_token_ids(metadata),
    )


def _literal_pieces(tokens: GGUFTokens) -> dict[int, bytes]:
    """Bytes of the tokens whose text is not encoded like that of ordinary ones."""
    literal: dict[int, bytes] = {}
    for index in tokens.of_kind(UNKNOWN, CONTROL, USER_DEFINED):
        literal[index] = tokens.texts[index].encode()
    for index in tokens.of_kind(UNUSED):
        literal[index] = b""  # as llama.cpp writes them
    for index in tokens.of_kind(BYTE):
        try:
            literal[index] = bytes([int(tokens.texts[index][3:5], 16)])
        except ValueError:
            text = tokens.texts[index]
            raise ModelFileError(f"the GGUF file's byte token {text!r} is not <0xHH>") from None
    return literal


def _unique_names(tokens: GGUFTokens) -> list[str]:
    """What the inner tokenizer calls each token: its text if that is to be found in texts.

    Control tokens, doubles and empty ones get a name that no text contains.
    """
    names = list(tokens.texts)
    hidden = tokens.of_kind(UNKNOWN, CONTROL)
    if len(set(names)) < len(names) or "" in names:
        last = {text: index for index, text in enumerate(names)}
        hidden += [index for index, text in enumerate(names) if last[text] != index or not text]
    for index in hidden:
        names[index] = f"\0{index}\0{tokens.texts[index]}"
    return names

"""SentencePiece vocabularies: an independent implementation, spaces, bytes, control tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFileError
from octavo.tokenizer.gguf_vocabulary import gguf_vocabulary
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.types import Span


def merge(text: str, scores: dict[str, float]) -> list[str]:
    """Join the neighbours with the best joined score, the leftmost first, while there are any."""
    pieces = list(text)
    while True:
        pairs = [
            (-scores[left + right], place)
            for place, (left, right) in enumerate(pairwise(pieces))
            if left + right in scores
        ]
        if not pairs:
            return pieces
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


words = st.text(alphabet="ab▁", min_size=2, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    learned=st.lists(words, min_size=1, max_size=25, unique=True),
    texts=st.lists(st.text(alphabet="ab▁", max_size=30), min_size=1, max_size=8),
)
def test_merges_like_the_plain_definition(learned: list[str], texts: list[str]) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "▁", *learned]
    scores = [0.0] * 6 + [-1.0 - rank for rank in range(len(learned))]
    tokenizer = Tokenizer(
        gguf_vocabulary(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(tokens) - 3),
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.add_space_prefix": False,
            }
        )
    )
    known = dict(zip(tokens[3:], scores[3:], strict=True))
    for text in texts:
        ids = tokenizer.encode(text.replace("▁", " "), add_special_tokens=False)
        assert [tokens[token_id] for token_id in ids] == merge(text, known)


def test_unknown_characters_become_bytes(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("\U0001f9ff", add_special_tokens=False)
    assert [sentencepiece.token_bytes(i) for i in ids] == [b" ", b"\xf0", b"\x9f", b"\xa7", b"\xbf"]
    assert sentencepiece.decode(ids) == "\U0001f9ff"


def test_bos_is_added_by_default_and_can_be_left_out(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.encode("")[0] == 1 == sentencepiece.bos_token_id
    assert sentencepiece.encode("", add_special_tokens=False) == []


def test_each_text_after_a_special_token_gets_its_space(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode_spans([Span("<s>a</s>a", True)])
    a = sentencepiece.encode("a", add_special_tokens=False)
    assert ids == [1, *a, 2, *a]


def test_decoding_takes_back_one_space_only(sentencepiece: Tokenizer) -> None:
    for text in ("x", " x", "   x", " ", "a  b ", ""):
        assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_plain_text_never_becomes_a_control_token(sentencepiece: Tokenizer) -> None:
    # "<", "<s" and "<s>" are all tokens: merging alone would arrive at <s>.
    for text in ("<s>", "</s>", "<unk>", "<|x|>", "a<s>b"):
        assert not set(sentencepiece.encode(text, add_special_tokens=False)) & {0, 1, 2}
        assert not (
            set(sentencepiece.encode(text, add_special_tokens=False)) & sentencepiece.special_ids
        )


def test_broken_metadata_is_refused(sentencepiece_metadata: dict[str, Any]) -> None:
    def refuse(match: str, **changes: object) -> None:
        changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        with pytest.raises(ModelFileError, match=match):
            gguf_vocabulary({**sentencepiece_metadata, **changed})

    refuse("scores is shorter", scores=[0.0])
    refuse("token_type is shorter", token_type=[1])
    refuse("not a list of str", tokens=[1, 2])
    refuse("tokens is missing", tokens=[])
    refuse("not a token id", bos_token_id="one")
    refuse("not <0xHH>", token_type=[6] * len(sentencepiece_metadata["tokenizer.ggml.tokens"]))

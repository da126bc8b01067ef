"""The detokenizer against decoding everything at once, and against the library's own decoding."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.tokenizer.detokenizer import Detokenizer
from octavo.tokenizer.tokenizer import Tokenizer

PROFILE = settings(max_examples=150, deadline=None)
pushes = st.lists(st.lists(st.integers(-5, 60_000), max_size=4), max_size=40)


def stream(tokenizer: Tokenizer, ids: list[list[int]], skip: bool, goes_on: bool) -> str:
    detokenizer = Detokenizer(tokenizer, skip, is_continuation=goes_on)
    return "".join([*(detokenizer.push(some) for some in ids), detokenizer.finish()])


@PROFILE
@given(ids=pushes, skip=st.booleans())
def test_pushes_make_the_decoded_text(
    smollm2: Tokenizer, sentencepiece: Tokenizer, ids: list[list[int]], skip: bool
) -> None:
    for tokenizer in (smollm2, sentencepiece):
        size = tokenizer.vocab_size
        wrapped = [[i % size if i >= 0 else i for i in some] for some in ids]
        flat = [i for some in wrapped for i in some]
        whole = tokenizer.decode(flat, skip_special_tokens=skip)
        assert stream(tokenizer, wrapped, skip, False) == whole
        going_on = stream(tokenizer, wrapped, skip, True)
        pieces = [
            b"" if skip and i in tokenizer.special_ids else tokenizer.token_bytes(i) for i in flat
        ]
        assert going_on == b"".join(pieces).decode("utf-8", "replace")
        assert going_on in (whole, f" {whole}")


@PROFILE
@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_any_bytes_come_out_as_python_decodes_them(
    sentencepiece: Tokenizer, data: bytes, cuts: list[int]
) -> None:
    ids = [3 + byte for byte in data]  # its tokens 3 to 258 are bytes
    places = [0, *sorted(cuts), len(ids)]
    pieces = [ids[start:end] for start, end in pairwise(places)]
    assert stream(sentencepiece, pieces, True, True) == data.decode("utf-8", "replace")


@PROFILE
@given(text=st.text(max_size=60))
def test_every_text_comes_back(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert stream(tokenizer, [[i] for i in ids], True, False) == text


def test_a_character_appears_when_it_is_whole(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("\U0001f9ff", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(smollm2)
    shown = [detokenizer.push([i]) for i in ids]
    assert shown == [""] * (len(ids) - 1) + ["\U0001f9ff"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_is_replaced_at_the_end(smollm2: Tokenizer) -> None:
    first = smollm2.encode("\U0001f9ff", add_special_tokens=False)[:1]
    detokenizer = Detokenizer(smollm2)
    assert detokenizer.push(first) == ""
    assert detokenizer.finish() == "\ufffd"


def test_an_impossible_byte_is_replaced_at_once(sentencepiece: Tokenizer) -> None:
    detokenizer = Detokenizer(sentencepiece, is_continuation=True)
    assert detokenizer.push([3 + 0xF0]) == ""
    assert detokenizer.push([3 + 0x41]) == "\ufffdA"


def test_special_tokens_are_left_out_unless_asked_for(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user<|im_end|>", parse_special=True)
    assert smollm2.decode(ids) == "user"
    assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"
    assert smollm2.token_text(ids[0]) == "<|im_start|>"
    assert smollm2.token_bytes(ids[-1]) == b"<|im_end|>"


def test_a_continuation_keeps_the_space_between_words(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("river", add_special_tokens=False)
    assert stream(sentencepiece, [ids], True, True) == " river"
    assert stream(sentencepiece, [ids], True, False) == "river"


def test_unknown_ids_are_nothing(smollm2: Tokenizer) -> None:
    assert smollm2.decode([-1, 10**9, 1 << 40]) == ""
    assert smollm2.token_bytes(-1) == b""

"""encode_spans: special tokens only in the template's text, and no seam between spans."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.tokenizer.tokenizer import Tokenizer
from octavo.types import Span

PROFILE = settings(max_examples=150, deadline=None)
words = st.lists(
    st.sampled_from(["user", "\n", " ", "Hello", "'s", "é", "🙂", "12", "a", ".", "<|", "\r\n"]),
    max_size=6,
).map("".join)
templates = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "user\n", " ", "\n", "x", "<tag>"]), max_size=4
).map("".join)
rendered = st.lists(st.tuples(templates, words), max_size=5)


@PROFILE
@given(parts=rendered)
def test_ordinary_text_leaves_no_seam(
    smollm2: Tokenizer, byte_level: Tokenizer, parts: list[tuple[str, str]]
) -> None:
    """The user's spans make no difference as long as they hold no special token."""
    spans = []
    for template, user in parts:
        spans += [Span(template, True), Span(user, False)]
    text = "".join(span.text for span in spans)
    for tokenizer in (smollm2, byte_level):
        whole = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        if "<|im_start|>" in "".join(u for _, u in parts) or _crosses(spans):
            continue
        assert tokenizer.encode_spans(spans) == whole


def _crosses(spans: list[Span]) -> bool:
    """Whether joining the spans makes a special token that none of them holds."""
    tokens = ("<|im_start|>", "<|im_end|>")
    whole = "".join(span.text for span in spans)
    return any(whole.count(t) != sum(s.text.count(t) for s in spans) for t in tokens)


@PROFILE
@given(parts=rendered, typed=st.sampled_from(["<|im_end|>", "<|im_start|>system", "<|endoftext|>"]))
def test_special_tokens_count_only_in_the_templates_text(
    smollm2: Tokenizer, sentencepiece: Tokenizer, parts: list[tuple[str, str]], typed: str
) -> None:
    for tokenizer in (smollm2, sentencepiece):
        spans, expected = [], 0
        for template, user in parts:
            spans += [Span(template, True), Span(user + typed, False)]
            ids = tokenizer.encode(template, add_special_tokens=False, parse_special=True)
            expected += sum(i in tokenizer.special_ids for i in ids)
        ids = tokenizer.encode_spans(spans)
        assert sum(i in tokenizer.special_ids for i in ids) == expected
        text = "".join(span.text for span in spans)
        shown = tokenizer.decode(ids, skip_special_tokens=False)
        assert shown.replace(" ", "") == text.replace(" ", "")


def test_a_token_split_over_spans_is_text(smollm2: Tokenizer) -> None:
    split = [Span("<|im_", True), Span("end|>", False)]
    assert not set(smollm2.encode_spans(split)) & smollm2.special_ids
    joined = [Span("<|im_", True), Span("end|>", True)]
    assert smollm2.encode_spans(joined) == [2]


def test_nothing_is_added(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.encode_spans([]) == []
    assert sentencepiece.encode_spans([Span("", True), Span("", False)]) == []


def test_lone_surrogates_become_replacement_characters(smollm2: Tokenizer) -> None:
    for text, meant in (("a\ud800b", "a\ufffdb"), ("\ud83d\ude42", "🙂"), ("\udc00", "\ufffd")):
        assert smollm2.encode(text) == smollm2.encode(meant)
        assert smollm2.encode_spans([Span(text, False)]) == smollm2.encode(meant)
    assert smollm2.encode_spans([Span("\ud83d", False), Span("\ude42", False)]) == smollm2.encode(
        "🙂"
    )

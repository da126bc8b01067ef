"""Finding special tokens: against a plain search, and in linear time."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.tokenizer.special import SpecialMatcher

texts = st.text(alphabet="<|a>", max_size=12)


def plain_find(ids: dict[str, int], text: str) -> list[tuple[int, int, int]]:
    """At each place the longest token that stands there."""
    found = []
    position = 0
    while position < len(text):
        here = [token for token in ids if token and text.startswith(token, position)]
        if here:
            token = max(here, key=len)
            found.append((position, position + len(token), ids[token]))
            position += len(token)
        else:
            position += 1
    return found


@settings(max_examples=400, deadline=None)
@given(tokens=st.lists(texts, max_size=10, unique=True), text=st.text("<|a>b", max_size=40))
def test_finds_what_a_plain_search_finds(tokens: list[str], text: str) -> None:
    ids = {token: place for place, token in enumerate(tokens)}
    assert list(SpecialMatcher(ids).find(text)) == plain_find(ids, text)


@settings(max_examples=400, deadline=None)
@given(tokens=st.lists(texts, max_size=10, unique=True), text=st.text("<|a>b", max_size=20))
def test_dangling_start_is_the_first_that_could_go_on(tokens: list[str], text: str) -> None:
    matcher = SpecialMatcher({token: place for place, token in enumerate(tokens)})
    starts = [
        start
        for start in range(len(text))
        if any(token.startswith(text[start:]) and token != text[start:] for token in tokens)
    ]
    assert matcher.dangling_start(text) == (starts[0] if starts else None)


def test_thousands_of_tokens_cost_no_more_than_a_few() -> None:
    matcher = SpecialMatcher({f"<unused{number}>": number for number in range(6000)})
    text = "<unused" * 100_000
    start = time.process_time()
    assert list(matcher.find(text)) == []
    assert time.process_time() - start < 2  # 0.1 s on an idle machine; trying each takes minutes
    assert list(matcher.find("a<unused17>b")) == [(1, 11, 17)]

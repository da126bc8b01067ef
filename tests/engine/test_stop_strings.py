"""StopStringFinder against a search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.stop_strings import StopMatch, StopStringFinder


def run(stops: list[str], pieces: list[str], *, is_included: bool) -> tuple[str, str | None]:
    finder = StopStringFinder(stops, is_included=is_included)
    shown = ""
    for piece in pieces:
        result = finder.push(piece)
        if isinstance(result, StopMatch):
            return shown + result.text, result.stop
        shown += result
    return shown + finder.finish(), None


def obvious(stops: list[str], text: str, *, is_included: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if is_included else end - len(stop)], stop
    return text, None


TEXT = st.text(alphabet="abé", max_size=30)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=4)


@given(STOPS, st.lists(TEXT, max_size=12), st.booleans())
def test_pieces_do_not_matter(stops: list[str], pieces: list[str], is_included: bool) -> None:
    expected = obvious(stops, "".join(pieces), is_included=is_included)
    assert run(stops, pieces, is_included=is_included) == expected
    assert run(stops, list("".join(pieces)), is_included=is_included) == expected


@given(STOPS, TEXT)
def test_only_what_may_become_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    finder = StopStringFinder(stops, is_included=False)
    shown = finder.push(text)
    if isinstance(shown, StopMatch):
        return
    held = text[len(shown) :]
    prefixes = {stop[:length] for stop in stops for length in range(1, len(stop))}
    longest = max((p for p in prefixes if text.endswith(p)), key=len, default="")
    assert held == longest


@pytest.mark.parametrize("stop", ["ab", "aab"])
def test_a_match_that_may_not_count_yet_passes(stop: str) -> None:
    finder = StopStringFinder([stop], is_included=False)
    assert finder.push("x" + stop, may_match=False) == "x" + stop
    assert finder.push("a") == ""
    result = finder.push(stop)
    assert isinstance(result, StopMatch)
    assert result.stop == stop

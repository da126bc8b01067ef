"""Pins: names, their times, and the room that they take."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from octavo.kv_cache.pins import Pins

PROMPTS = [[b"a"], [b"a", b"b"], [b"a", b"b", b"c"], [b"a", b"x"], [b"q", b"r"]]


def test_a_name_stays_until_the_latest_time_that_anybody_asked_for() -> None:
    pins = Pins(3)
    assert pins.reserve([b"a", b"b"]) and pins.reserve([b"a"])
    assert [pins.pin(b"a", 4.2), pins.pin(b"b", 4.2)] == [True, True]
    assert [pins.pin(b"a", 9.0), pins.pin(b"a", 6.0)] == [False, False]
    assert pins.until == {b"a": 9, b"b": 5}
    assert pins.take_expired(4.9) == []
    assert pins.take_expired(5.0) == [b"b"]
    assert pins.take_first() == [b"a"]
    assert pins.take_first() == []


def test_seconds_that_have_lost_their_names_are_passed_over() -> None:
    pins = Pins(2)
    assert pins.reserve([b"a", b"b"])
    pins.pin(b"a", 1.0)
    pins.pin(b"b", 3.0)
    pins.pin(b"a", 2.0)
    assert pins.take_first() == [b"a"]
    assert pins.take_first() == [b"b"]


def test_many_requests_that_pin_one_prompt_keep_no_more_than_its_names() -> None:
    pins = Pins(2)
    for number in range(1000):
        assert pins.reserve([b"a", b"b"])
        for name in (b"a", b"b"):
            pins.pin(name, 10.0 + number)
        pins.unreserve([b"a", b"b"])
        pins.take_expired(float(number))
    assert len(pins) == 2
    assert len(pins._by_second) == len(pins._seconds) <= 11


@given(
    max_blocks=st.integers(0, 6),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["begin", "begin", "pin", "end", "wait", "first", "remove", "clear"]),
            st.integers(0, 9),
            st.floats(0.1, 5.0),
        ),
        max_size=40,
    ),
)
def test_it_behaves_as_a_plain_model_does(
    max_blocks: int, actions: list[tuple[str, int, float]]
) -> None:
    pins, now = Pins(max_blocks), 0.0
    alive: list[list[bytes]] = []
    until: dict[bytes, int] = {}
    for action, pick, seconds in actions:
        if action == "begin":
            names = PROMPTS[pick % len(PROMPTS)]
            wanted = {*until, *names, *(name for one in alive for name in one)}
            assert pins.reserve(names) == (len(wanted) <= max_blocks)
            alive += [names] * (len(wanted) <= max_blocks)
        elif action == "pin" and alive:
            for name in alive[pick % len(alive)]:
                end = math.ceil(now + seconds)
                assert pins.pin(name, now + seconds) == (name not in until)
                until[name] = max(until.get(name, 0), end)
        elif action == "end" and alive:
            pins.unreserve(alive.pop(pick % len(alive)))
        elif action == "wait":
            now += seconds
            over = {name for name, end in until.items() if end <= now}
            assert set(pins.take_expired(now)) == over
            until = {name: end for name, end in until.items() if end > now}
        elif action == "first":
            first = min(until.values(), default=0)
            assert set(pins.take_first()) == {n for n, end in until.items() if end == first}
            until = {name: end for name, end in until.items() if end > first}
        elif action == "remove" and until:
            name = sorted(until)[pick % len(until)]
            pins.remove(name)
            del until[name]
        elif action == "clear":
            pins.clear()
            until.clear()
        assert pins.until == until
        reserved = {name for one in alive for name in one}
        assert pins._num_reserved_alone == len(reserved.difference(until))
        assert len(pins) <= max_blocks

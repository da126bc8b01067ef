"""The waiting queue, and how fast it drains."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Protocol

from octavo.errors import OverloadedError
from octavo.scheduler.policy import by_rank
from octavo.scheduler.request import Sequence


class WaitingQueue(Protocol):
    """Sequences that hold nothing, in the order in which they are admitted."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def add(self, seq: Sequence) -> None:
        """Put a sequence in its place."""
        ...

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out; it must be there."""
        ...

    def first(self, count: int) -> list[Sequence]:
        """The first `count` of them, or as many as there are."""
        ...


class RankedList:
    """Sequences in the order of their rank.

    A sorted list: insertion moves a few KB of pointers at most, which is less than a heap's lazy
    deletion costs to explain.
    """

    __slots__ = ("_sequences",)

    def __init__(self) -> None:
        """Start empty."""
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        """How many there are."""
        return len(self._sequences)

    def add(self, seq: Sequence) -> None:
        """Put a sequence in its place."""
        insort(self._sequences, seq, key=by_rank)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out; it must be there."""
        at = bisect_left(self._sequences, seq.rank, key=by_rank)
        assert self._sequences[at] is seq
        del self._sequences[at]

    def first(self, count: int) -> list[Sequence]:
        """The first `count` of them, or as many as there are."""
        return self._sequences[:count]


class DrainRate:
    """Measures how often a request is started, to tell a refused client when to come back."""

    def __init__(self, num_remembered: int = 32) -> None:
        """Remember the last starts."""
        self._starts: deque[float] = deque(maxlen=num_remembered)

    def note_start(self, now: float) -> None:
        """A request has left the queue for good."""
        self._starts.append(now)

    def seconds_until_drained(self, num_waiting: int, now: float) -> float:
        """How long those who wait now will take to start, between 1 and 60 seconds."""
        if not self._starts:
            return 1.0
        seconds_a_start = (now - self._starts[0]) / len(self._starts)
        return min(60.0, max(1.0, num_waiting * seconds_a_start))

    def refuse_if_full(self, num_waiting: int, most: int, now: float) -> None:
        """Raise an OverloadedError that says when to come back, if `most` are waiting already."""
        if num_waiting < most:
            return
        retry_after_s = self.seconds_until_drained(num_waiting, now)
        raise OverloadedError(
            f"{num_waiting} requests are waiting, no more are accepted: "
            f"try again in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
        )

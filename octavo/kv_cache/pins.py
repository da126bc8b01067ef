"""Pins: names of cached blocks that are not reused before a time, and how many there may be.

A request that wants its prompt pinned reserves room for the names of its blocks when it arrives,
so that a refusal comes at once, and pins them when they are computed. A name counts once, however
many pin it, and stays until the latest time that anybody asked for. Times are rounded up to whole
seconds and names are filed by them: pinning, expiring and dropping cost O(1) a name, and what is
kept is bounded by the number of names, not of requests. Knows names and times; the manager knows
which blocks they belong to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush


class Pins:
    """The pinned names and those for which room is reserved: together at most `max_blocks`.

    Attributes:
        until: the pinned names, and the second at which each is released.
    """

    def __init__(self, max_blocks: int) -> None:
        """Start without pins."""
        self.max_blocks = max_blocks
        self.until: dict[bytes, int] = {}
        self._reserved: Counter[bytes] = Counter()
        self._num_reserved_alone = 0  # Names reserved and not pinned.
        self._by_second: dict[int, dict[bytes, None]] = {}  # By second, in the order of pinning.
        self._seconds: list[int] = []  # A heap of the keys.

    def __len__(self) -> int:
        """How many names are pinned."""
        return len(self.until)

    @property
    def first_end(self) -> int | None:
        """A second before which no name expires; None if none is pinned."""
        return self._seconds[0] if self.until else None

    def reserve(self, names: Sequence[bytes]) -> bool:
        """Set room aside for names, or return False: there is not enough, nothing has changed.

        What is reserved must be given back with `unreserve`, whether it was pinned or not.
        """
        num_new = sum(name not in self.until and name not in self._reserved for name in names)
        if len(self.until) + self._num_reserved_alone + num_new > self.max_blocks:
            return False
        self._num_reserved_alone += num_new
        self._reserved.update(names)
        return True

    def unreserve(self, names: Sequence[bytes]) -> None:
        """Give back the room that `reserve` set aside for the same names."""
        for name in names:
            self._reserved[name] -= 1
            if self._reserved[name] == 0:
                del self._reserved[name]
                self._num_reserved_alone -= name not in self.until

    def pin(self, name: bytes, end: float) -> bool:
        """Pin a reserved name until `end` or longer; return whether it is pinned only now."""
        assert name in self._reserved, "room is reserved before it is used"
        second = math.ceil(end)
        old = self.until.get(name)
        if old is None:
            self._num_reserved_alone -= 1
        elif old >= second:
            return False
        else:
            del self._by_second[old][name]
        self.until[name] = second
        if second not in self._by_second:
            self._by_second[second] = {}
            heappush(self._seconds, second)
        self._by_second[second][name] = None
        return old is None

    def remove(self, name: bytes) -> None:
        """Release one pinned name before its time."""
        del self._by_second[self.until[name]][name]
        self._forget(name)

    def take_expired(self, now: float) -> list[bytes]:
        """Release the names whose time is over and return them, those pinned last first."""
        names: list[bytes] = []
        while self._seconds and self._seconds[0] <= now:
            names += self._take_second()
        return names

    def take_first(self) -> list[bytes]:
        """Release the names whose time would be over next; empty if there are none."""
        names: list[bytes] = []
        while self._seconds and not names:
            names = self._take_second()
        return names

    def clear(self) -> None:
        """Release every name; what is reserved stays so."""
        while self._seconds:
            self._take_second()

    def _take_second(self) -> list[bytes]:
        names = list(reversed(self._by_second.pop(heappop(self._seconds))))
        for name in names:
            self._forget(name)
        return names

    def _forget(self, name: bytes) -> None:
        del self.until[name]
        self._num_reserved_alone += name in self._reserved

"""The rows of a step: which sequences run, and what each is called towards the runner."""

from __future__ import annotations

from bisect import bisect_left, insort

from octavo.scheduler.policy import by_rank
from octavo.scheduler.request import Sequence


class Rows:
    """Running sequences and their rows.

    Attributes:
        running: in the order of rank.
    """

    __slots__ = ("_finished", "_free", "_num_rows", "running")

    def __init__(self, num_rows: int) -> None:
        """Start with every row free."""
        self.running: list[Sequence] = []
        self._num_rows = num_rows
        self._free = list(range(num_rows))[::-1]
        self._finished: list[int] = []  # Since the last plan.

    @property
    def num_free(self) -> int:
        """Rows that no sequence has."""
        return len(self._free)

    def insert(self, seq: Sequence) -> None:
        """Give a sequence a free row; there must be one."""
        seq.row = self._free.pop()
        insort(self.running, seq, key=by_rank)

    def remove(self, seq: Sequence) -> None:
        """Take its row from a sequence."""
        del self.running[bisect_left(self.running, seq.rank, key=by_rank)]
        self._free.append(seq.row)
        self._finished.append(seq.row)
        seq.row = -1

    def take_finished(self) -> tuple[int, ...]:
        """The rows that were taken from sequences since the last call."""
        finished, self._finished = self._finished, []
        return tuple(finished)

    def check_invariants(self) -> None:
        """Assert that every row is free or of one sequence; for tests."""
        assert self.running == sorted(self.running, key=by_rank)
        rows = [*self._free, *(seq.row for seq in self.running)]
        assert sorted(rows) == list(range(self._num_rows))

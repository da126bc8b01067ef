"""The baselines: other ways to hand out KV memory, in the place of `KVCacheManager`.

They stand in for it in our own scheduler, so that the systems differ by memory alone. A slot is a
block of one token here. Orca reserves for each request, when it is admitted, one contiguous range
from a buddy allocator; what it thinks that the request needs is the variant's name:

    Oracle   prompt and output, as if the output's length were known
    Pow2     prompt and the next power of two of the output: at most twice too much
    Max      the model's whole context, 2,048

FasterTransformer takes a batch of the earliest arrivals, as many as fit at the whole context, and
takes no other until the last one of the batch has ended. (In truth it pads the batch and computes
the ended ones to the end; that is left out, in its favour.)
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from buddy import BuddyAllocator
from workload import MAX_LENGTH

from octavo.kv_cache.manager import NO_PREFIX, KVCacheManager, PrefixMatch

Need = Callable[[int, int], int]
"""Slots to reserve for a request, from the lengths of its prompt and its output."""


def oracle(num_prompt: int, num_output: int) -> int:
    """As many as it will fill."""
    return num_prompt + num_output


def pow2(num_prompt: int, num_output: int) -> int:
    """As if the output were as long as the next power of two."""
    return min(num_prompt + (1 << (num_output - 1).bit_length()), MAX_LENGTH)


def maximum(num_prompt: int, num_output: int) -> int:
    """As many as the model can fill."""
    return MAX_LENGTH


def chat(num_prompt: int, num_output: int) -> int:
    """As many as a chat's answer may take (figure 17)."""
    return num_prompt + MAX_LENGTH // 2


class ReservedTable:
    """The range of one sequence.

    Attributes:
        block_ids: its slots; empty unless it runs.
        num_final: slots that it will have filled at its end.
        num_wanted: slots to reserve.
    """

    __slots__ = ("block_ids", "num_final", "num_wanted")

    def __init__(self, num_final: int, num_wanted: int) -> None:
        """Start empty."""
        self.block_ids = range(0)
        self.num_final = num_final
        self.num_wanted = num_wanted

    @property
    def num_committed_blocks(self) -> int:
        """Nothing is ever left to commit."""
        return MAX_LENGTH


class ReservingCache(KVCacheManager):
    """Contiguous reservation for the whole life of a request.

    Attributes:
        num_final: slots that the running sequences will fill in the end, together.
        num_wanted: slots that they asked for.
    """

    def __init__(self, num_slots: int, need: Need) -> None:
        """Start with everything free."""
        super().__init__(num_slots, block_size=1, use_prefix_cache=False)
        self.num_final = 0
        self.num_wanted = 0
        self._need = need
        self._buddies = BuddyAllocator(num_slots)
        self._num_taken = 0
        self._expected = (0, 0)

    @property
    def num_referenced_blocks(self) -> int:
        """Slots of the ranges that the running sequences got."""
        return self._num_taken

    @property
    def num_free_blocks(self) -> int:
        """Slots of no range."""
        return self.num_blocks - self._num_taken

    def expect(self, num_prompt: int, num_output: int) -> None:
        """Tell the lengths of the request that is added next: the scheduler does not know them."""
        self._expected = num_prompt, num_output

    def new_table(self, *isolation: str) -> ReservedTable:
        """A table for the request that was told last."""
        return ReservedTable(sum(self._expected), self._need(*self._expected))

    def match_prefix(self, table: ReservedTable, token_ids: array[int]) -> PrefixMatch:
        """Nothing is shared."""
        return NO_PREFIX

    def allocate(
        self,
        table: ReservedTable,
        num_tokens: int,
        prefix: PrefixMatch = NO_PREFIX,
        num_reserved_blocks: int = 0,
    ) -> range | None:
        """Reserve for a sequence that is admitted; running ones never lack anything."""
        assert not table.block_ids, "a running sequence has outgrown its reservation"
        start = self._buddies.allocate(table.num_wanted)
        if start is None:
            return None
        table.block_ids = range(start, start + table.num_wanted)
        self.num_final += table.num_final
        self.num_wanted += table.num_wanted
        self._count()
        return table.block_ids

    def free(self, table: ReservedTable) -> None:
        """Give the range back."""
        if table.block_ids:
            self._buddies.free(table.block_ids.start)
            self.num_final -= table.num_final
            self.num_wanted -= table.num_wanted
            table.block_ids = range(0)
            self._count()

    def commit(self, table: ReservedTable, token_ids: array[int], num_tokens: int) -> None:
        """Nothing is cached."""

    def forget(self, table: ReservedTable) -> None:
        """Nothing is cached."""

    def begin_step(self) -> None:
        """A step is about to be planned."""

    def check_invariants(self, tables: Iterable[ReservedTable]) -> None:
        """Assert that the ranges are those of `tables`, apart, and inside the pool."""
        starts = sorted(table.block_ids.start for table in tables if table.block_ids)
        ranges = self._buddies.ranges()
        assert starts == [start for start, _ in ranges]
        ends = [0, *[start + length for start, length in ranges]]
        begins = [*starts, self.num_blocks]
        assert all(end <= begin for end, begin in zip(ends, begins, strict=True))

    def _count(self) -> None:
        self._num_taken = self.num_blocks - self._buddies.num_free


class BatchCache(ReservingCache):
    """Static batches: nobody joins one that runs, and nobody's memory is free before its end."""

    def __init__(self, num_slots: int, need: Need = maximum) -> None:
        """Start without a batch."""
        super().__init__(num_slots, need)
        self._ended: list[ReservedTable] = []
        self._num_running = 0
        self._is_open = True

    def allocate(
        self,
        table: ReservedTable,
        num_tokens: int,
        prefix: PrefixMatch = NO_PREFIX,
        num_reserved_blocks: int = 0,
    ) -> range | None:
        """Reserve, if the batch has not begun to run."""
        slots = super().allocate(table, num_tokens) if self._is_open else None
        self._num_running += slots is not None
        return slots

    def free(self, table: ReservedTable) -> None:
        """Free all ranges of the batch with its last one."""
        self._ended.append(table)
        self._num_running -= 1
        if self._num_running == 0:
            for ended in self._ended:
                super().free(ended)
            self._ended.clear()

    def begin_step(self) -> None:
        """Open a batch if none runs, else close it."""
        self._is_open = self._num_running == 0

    def check_invariants(self, tables: Iterable[ReservedTable]) -> None:
        """The same, with the ranges that wait for the end of the batch."""
        super().check_invariants([*tables, *self._ended])

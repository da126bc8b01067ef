"""What is known of each block, and the order in which free blocks are taken.

A block is named by its id, 0 to num_blocks - 1, and its fields stand in parallel columns rather
than in an object: a million blocks then cost 20 MB instead of 110 MB, and the garbage collector has
no million objects to walk through. Knows neither tokens nor sequences.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator


class Blocks:
    """The columns of all blocks, and the list of those that are free.

    Attributes:
        ref_count: how many block tables hold the block; it is free when that is 0.
        hash: the prefix hash under which the cache serves the block's content, or None.
        parent: the hash before it in its chain; means something while the block has a hash.
        store_round: when its content was last given to the tier below the pool, 0 never; likewise.
        free: the free blocks, the next one to be taken first.
    """

    __slots__ = ("free", "hash", "parent", "ref_count", "store_round")

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free and without content, in the order of ids."""
        self.ref_count = array("i", bytes(4 * num_blocks))
        self.hash: list[bytes | None] = [None] * num_blocks
        self.parent: list[bytes] = [b""] * num_blocks
        self.store_round = array("i", bytes(4 * num_blocks))
        self.free = FreeList(num_blocks)

    def __len__(self) -> int:
        """All blocks, free or not."""
        return len(self.ref_count)


class FreeList:
    """A doubly linked list of block ids in which every operation is O(1).

    The links are two columns with one extra entry, the sentinel, at index `num_blocks`: it stands
    before the first block and after the last one, so that no operation has a special case.

        sentinel → first to be taken → … → last to be taken → sentinel
    """

    __slots__ = ("_next", "_num_free", "_previous", "_sentinel")

    def __init__(self, num_blocks: int) -> None:
        """Start with every block in the list, 0 first."""
        self._sentinel = num_blocks
        self._next = array("i", range(1, num_blocks + 2))
        self._previous = array("i", range(-1, num_blocks))
        self._next[num_blocks] = 0
        self._previous[0] = num_blocks
        self._num_free = num_blocks

    def __len__(self) -> int:
        """How many blocks are free."""
        return self._num_free

    def __iter__(self) -> Iterator[int]:
        """The free blocks, the next one to be taken first."""
        block_id = self._next[self._sentinel]
        while block_id != self._sentinel:
            yield block_id
            block_id = self._next[block_id]

    def pop_first(self) -> int:
        """Take the first block. The list must not be empty."""
        sentinel, links = self._sentinel, self._next
        block_id = links[sentinel]
        assert block_id != sentinel, "no block is free"
        following = links[block_id]
        links[sentinel] = following
        self._previous[following] = sentinel
        self._num_free -= 1
        return block_id

    def remove(self, block_id: int) -> None:
        """Take a block out, wherever it stands. It must be in the list."""
        previous, following = self._previous[block_id], self._next[block_id]
        self._next[previous] = following
        self._previous[following] = previous
        self._num_free -= 1

    def push_first(self, block_id: int) -> None:
        """Put a block where it is taken next. It must not be in the list."""
        self._link(self._sentinel, block_id, self._next[self._sentinel])

    def push_last(self, block_id: int) -> None:
        """Put a block where it is taken after all others. It must not be in the list."""
        self._link(self._previous[self._sentinel], block_id, self._sentinel)

    def _link(self, previous: int, block_id: int, following: int) -> None:
        self._next[previous] = block_id
        self._previous[block_id] = previous
        self._next[block_id] = following
        self._previous[following] = block_id
        self._num_free += 1

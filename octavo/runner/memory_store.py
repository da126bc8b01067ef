"""MemoryBlockStore: KV blocks by the hashes of their prefixes in host memory, an LRU.

Each block has a room, a piece of memory that a device copies to and from by itself. Memory is taken
when blocks come that need it, and given back with the store: page-locking all of it at the start
would take seconds. A block that has to go for another one is handed down to the store below, if
there is one. Knows hashes and bytes, no tokens.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence

import numpy as np

from octavo.backends.program import Bytes
from octavo.errors import ConfigError
from octavo.runner.block_segment import Buffer
from octavo.runner.store_tier import BlockStore
from octavo.types import TierStats

PIECE_BYTES = 64 << 20
"""Memory that is taken at once."""

_log = logging.getLogger("octavo.kv_host")


class MemoryBlockStore:
    """See store_tier.BlockStore."""

    def __init__(
        self,
        block_bytes: int,
        max_bytes: int,
        allocate: Callable[[int], Bytes],
        below: BlockStore | None = None,
    ) -> None:
        """Start empty.

        Args:
            block_bytes: of each block.
            max_bytes: the most that is asked of `allocate`.
            allocate: makes memory, or raises MemoryError.
            below: takes what is dropped.

        Raises:
            ConfigError: the bytes hold no block.
        """
        if max_bytes < block_bytes:
            raise ConfigError(
                f"--kv-host of {max_bytes:,} bytes holds no block of {block_bytes:,} bytes; give "
                "it more, or leave it out"
            )
        self._block_bytes = block_bytes
        self._allocate = allocate
        self._below = below
        self._num_unmade = max_bytes // block_bytes  # Rooms that no memory was taken for yet.
        self._num_made = 0
        self._free: list[Bytes] = []
        self._rooms: OrderedDict[bytes, Bytes] = OrderedDict()  # The least recently used first.
        self._reserved: dict[bytes, Bytes] = {}
        self._num_hits = self._num_writes = self._num_drops = 0

    def contains(self, prefix_hash: bytes) -> bool:
        """Whether `get` finds the block."""
        return prefix_hash in self._rooms

    def reserve(self, hashes: Sequence[bytes], keep: Container[bytes] = ()) -> dict[bytes, Bytes]:
        """Rooms for those of these blocks that are not known yet.

        A block without room counts as dropped; those that are known count as used just now.
        """
        unknown = []
        for prefix_hash in dict.fromkeys(hashes):
            if prefix_hash in self._rooms:
                self._rooms.move_to_end(prefix_hash)
            elif prefix_hash not in self._reserved:
                unknown.append(prefix_hash)
        found = {}
        for prefix_hash in unknown:
            room = self._take_room(keep)
            if room is None:
                break
            found[prefix_hash] = room
        self._reserved |= found
        self._num_drops += len(unknown) - len(found)
        return found

    def put(self, prefix_hash: bytes, data: Buffer) -> None:
        """Keep a block, which lies in the room that was reserved for it."""
        room = self._reserved.pop(prefix_hash)
        assert np.shares_memory(np.frombuffer(data, np.uint8), room), "a block lies elsewhere"
        self._rooms[prefix_hash] = room
        self._num_writes += 1

    def get(self, hashes: Sequence[bytes]) -> list[Buffer | None]:
        """The blocks in their rooms; None for each that is unknown."""
        known = [prefix_hash for prefix_hash in hashes if prefix_hash in self._rooms]
        # The first ones of a chain are of use without the last ones, but not the other way round.
        for prefix_hash in reversed(known):
            self._rooms.move_to_end(prefix_hash)
        self._num_hits += len(known)
        found = (self._rooms.get(prefix_hash) for prefix_hash in hashes)
        return [None if room is None else room.data for room in found]

    def discard(self, hashes: Sequence[bytes] | None) -> None:
        """Forget blocks, also those that are on their way here; None: all of them.

        A room may be reserved anew at once, for what comes into it then comes later.
        """
        for known in (self._rooms, self._reserved):
            for prefix_hash in list(known) if hashes is None else hashes:
                room = known.pop(prefix_hash, None)
                if room is not None:
                    self._free.append(room)

    def stats(self) -> TierStats:
        """A snapshot; its bytes are those that were taken."""
        return TierStats(
            num_bytes=self._num_made * self._block_bytes,
            num_blocks=len(self._rooms),
            num_hits=self._num_hits,
            num_writes=self._num_writes,
            num_drops=self._num_drops,
        )

    def _take_room(self, keep: Container[bytes]) -> Bytes | None:
        """A room for a new block: a free one, a new one, or that of the least recently used."""
        if not self._free and self._num_unmade:
            self._make_rooms()
        if self._free:
            return self._free.pop()
        victim = next((known for known in self._rooms if known not in keep), None)
        if victim is None:
            return None
        room = self._rooms.pop(victim)
        if self._below is not None and victim in self._below.reserve([victim]):
            self._below.put(victim, room.copy().data)
        return room

    def _make_rooms(self) -> None:
        count = min(self._num_unmade, max(1, PIECE_BYTES // self._block_bytes))
        try:
            memory = self._allocate(count * self._block_bytes)
        except MemoryError as error:
            self._num_unmade = 0
            _log.warning(
                "--kv-host stays at %s bytes, for the system gives no more: %s",
                f"{self._num_made * self._block_bytes:,}",
                error,
            )
            return
        self._num_unmade -= count
        self._num_made += count
        self._free += list(memory.reshape(count, self._block_bytes))

"""What moves between the pool and a tier below it in the step that is being planned. Ids only.

A block that loses its content to another one is stored below, under its hash, and so are the blocks
before it in its chain, without which it would not be found after a restart; a sequence whose next
blocks are known below has them loaded instead of computed. Both are lists of (hash, block id) that
go into the step's plan: whoever computes the step reads the stored blocks first, then writes the
loaded ones, then computes. Which blocks lie below, and whether loading them pays, the tier knows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from octavo.kv_cache.manager import BlockTable, KVCacheManager
from octavo.types import BlockMove, LowerStats


class LowerTier(Protocol):
    """Where blocks go that leave the pool."""

    def fetch(self, hashes: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, the plan that is being made may load."""
        ...

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Never serve these blocks again: something is wrong with them."""
        ...

    def clear(self) -> None:
        """Forget all blocks."""
        ...

    def stats(self) -> LowerStats:
        """A snapshot."""
        ...


class TierMoves:
    """The moves of one plan after another; without a tier there are none."""

    def __init__(self, cache: KVCacheManager, lower: LowerTier | None) -> None:
        """Move between the cache and what lies below it."""
        self._cache = cache
        self._lower = lower if cache.use_prefix_cache else None
        self._loads: list[BlockMove] = []
        cache.has_lower_tier = self._lower is not None

    def load(self, table: BlockTable, token_ids: array[int], num_computed: int) -> int:
        """Plan to load what the tier has of a sequence's next blocks.

        Args:
            table: has blocks for all the tokens, and the hashes that `match_prefix` has left in it.
            token_ids: all tokens of the sequence; the last one is never loaded.
            num_computed: tokens computed so far. A block that holds some of them only is loaded
                whole: it gets the bytes that it has.

        Returns:
            How many tokens are computed, once the plan's loads are done.
        """
        if self._lower is None:
            return num_computed
        block_size = self._cache.block_size
        first, most = num_computed // block_size, (len(token_ids) - 1) // block_size
        hashes = table.hashes[first:most]
        num_loaded = self._lower.fetch(hashes) if hashes else 0
        if num_loaded == 0:
            return num_computed
        block_ids = table.block_ids[first : first + num_loaded]
        self._loads += zip(hashes[:num_loaded], block_ids, strict=True)
        num_tokens = (first + num_loaded) * block_size
        self._cache.num_hit_tokens += num_tokens - num_computed
        # At once, for the loads come before anything that the plan computes.
        self._cache.commit(table, token_ids, num_tokens)
        return num_tokens

    def take(self) -> tuple[tuple[BlockMove, ...], tuple[BlockMove, ...]]:
        """The stores and the loads of the plan that is complete now."""
        if not self._cache.stores and not self._loads:
            return (), ()
        # A block that is loaded has the content of its name only then, and it lies below anyway.
        loads = dict.fromkeys(self._loads)
        stores = [move for move in dict.fromkeys(self._cache.stores) if move not in loads]
        self._cache.stores.clear()
        self._loads.clear()
        return tuple(stores), tuple(loads)

    def discard(self, table: BlockTable) -> None:
        """Never serve the table's blocks again, wherever they lie."""
        self._cache.forget(table)
        if self._lower is not None:
            self._lower.discard(table.hashes)

    def clear(self) -> int:
        """Forget all prefixes, wherever they lie; return how many blocks the pool had of them."""
        self._cache.stores.clear()
        if self._lower is not None:
            self._lower.clear()
        return self._cache.reset_prefix_cache()

    def stats(self) -> LowerStats:
        """A snapshot of the tier; zeros without one."""
        return LowerStats() if self._lower is None else self._lower.stats()

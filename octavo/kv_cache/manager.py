"""KVCacheManager: who holds which block, and which blocks hold a prefix that others can use.

A block is always in one of four states:

    referenced     ref_count > 0: it stands in that many block tables
    pinned-idle    ref_count = 0 and its hash is pinned: not free until its time is over
    cached-idle    ref_count = 0 and it has a hash: free, but its content can still be served
    free           ref_count = 0 and it has no hash

Free blocks are taken first, then cached-idle ones, the least recently used first. Only full blocks
whose step has returned get a hash, so whatever `match_prefix` finds is in memory already. Works on
token ids and block ids: no tensors, no text, no clock, no requests.

A block may stand in many tables: those that begin with the same prefix, and those that were forked
from one another. It is written only by a table that holds it alone: `own` gives a table a copy
first (copy-on-write; Kwon et al. 2023, section 4.4).

Left for later: several cache groups, one table each.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from octavo.kv_cache.block import Blocks
from octavo.kv_cache.misses import MissMemory
from octavo.kv_cache.pins import Pins
from octavo.kv_cache.prefix import extend_chain, root_hash
from octavo.types import MissReason


class BlockTable:
    """The blocks of one sequence in the order of its tokens; only `own` replaces one of them.

    Attributes:
        block_ids: token i lies in slot i % block_size of block_ids[i // block_size].
        num_committed_blocks: how many of them, from the first, are full and computed, and were
            offered to the prefix cache.
        hashes: of the full blocks, as far as needed yet; kept by `free`, as the tokens are too.
        root: the hash before the first block.
        generation: how often the prefix cache had been reset when the table got its first block;
            what it computes after another reset is served to nobody.
    """

    __slots__ = ("block_ids", "generation", "hashes", "num_committed_blocks", "root")

    def __init__(self, root: bytes, generation: int) -> None:
        """Start empty."""
        self.block_ids: list[int] = []
        self.num_committed_blocks = 0
        self.hashes: list[bytes] = []
        self.root = root
        self.generation = generation


class PrefixMatch(NamedTuple):
    """What the prefix cache can serve of a sequence: a finding, which holds nothing.

    It is true until the manager is next changed.
    """

    block_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    num_queried_tokens: int = 0


NO_PREFIX = PrefixMatch()

PINNED_PART = 2
"""One block in so many may be pinned (docs/decisions/046-pinned-prefixes.md)."""


class KVCacheManager:
    """Every block of one pool and the prefix cache over them.

    Attributes:
        num_queried_tokens: tokens looked up in the prefix cache, counted as blocks are given.
        num_hit_tokens: tokens of them that it served.
        num_copies: blocks that were copied because a table wrote into one that others held too.
        num_references: blocks of all tables, a shared one as often as it is shared.
        num_shared_blocks: blocks that stand in more than one table.
        has_lower_tier: note in `stores` what the tier below the pool should keep.
        stores: (hash, block id) of cached blocks that `allocate` gave away, and of those before
            them in their chains; to be read before the new owners write.
    """

    def __init__(
        self, num_blocks: int, block_size: int, use_prefix_cache: bool = True, identity: str = ""
    ) -> None:
        """Start with every block free; for `identity` see `types.KVPool`."""
        self.block_size = block_size
        self.use_prefix_cache = use_prefix_cache
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_copies = 0
        self.num_references = 0
        self.num_shared_blocks = 0
        self.has_lower_tier = False
        self.stores: list[tuple[bytes, int]] = []
        self._num_stores = 0
        self._blocks = Blocks(num_blocks)
        self._block_of: dict[bytes, int] = {}
        self._num_cached_idle = 0
        self._identity = identity
        self._num_resets = 0
        self._pins = Pins(num_blocks // PINNED_PART if use_prefix_cache else 0)
        self._num_pinned_idle = 0
        self._misses: MissMemory | None = None

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give: those without content and the cached-idle ones."""
        return len(self._blocks.free)

    @property
    def num_referenced_blocks(self) -> int:
        """Blocks that stand in a block table."""
        return len(self._blocks) - len(self._blocks.free) - self._num_pinned_idle

    @property
    def num_cached_idle_blocks(self) -> int:
        """Free blocks whose content the prefix cache can still serve."""
        return self._num_cached_idle

    def new_table(self, salt: str = "", scope: str = "", adapter: int = 0) -> BlockTable:
        """An empty table; only those of the same salt, scope and adapter share blocks."""
        root = root_hash(self._identity, str(adapter), salt, scope)
        if self._misses is not None:
            self._misses.note_root(root)
        return BlockTable(root, self._num_resets)

    def match_prefix(self, table: BlockTable, token_ids: array[int]) -> PrefixMatch:
        """Find the longest run of cached blocks that `token_ids` begins with.

        It stops short of the last token: at least one must be computed, or there were no logits.

        Args:
            table: the sequence's empty table, which keeps the hashes for the next time.
            token_ids: all tokens of the sequence.
        """
        if not self.use_prefix_cache:
            return NO_PREFIX
        most = (len(token_ids) - 1) // self.block_size
        extend_chain(table.hashes, table.root, token_ids, self.block_size, most)
        found: list[int] = []
        for prefix_hash in table.hashes[:most]:
            block_id = self._block_of.get(prefix_hash)
            if block_id is None:
                break
            found.append(block_id)
        return PrefixMatch(tuple(found), len(found) * self.block_size, len(token_ids))

    def allocate(
        self,
        table: BlockTable,
        num_tokens: int,
        prefix: PrefixMatch = NO_PREFIX,
        num_reserved_blocks: int = 0,
    ) -> tuple[int, ...] | None:
        """Give the table the blocks that it lacks to hold `num_tokens` tokens.

        Args:
            table: gets the blocks appended.
            num_tokens: all tokens that it must hold, those of `prefix` included.
            prefix: a fresh finding of `match_prefix`, for an empty table: these blocks come first.
            num_reserved_blocks: how many blocks must stay free afterwards.

        Returns:
            The ids appended (maybe none), or None: there is no room and nothing has changed.
        """
        free, ref_count, hashes = self._blocks.free, self._blocks.ref_count, self._blocks.hash
        pinned = self._pins.until
        num_held = len(table.block_ids) + len(prefix.block_ids)
        num_new = max(0, -(-num_tokens // self.block_size) - num_held)
        num_revived = sum([ref_count[b] == 0 and hashes[b] not in pinned for b in prefix.block_ids])
        if num_new + num_revived + num_reserved_blocks > len(free):
            return None
        if not table.block_ids:
            table.generation = self._num_resets
        for block_id in prefix.block_ids:
            self._share(block_id)
        new_ids = (*prefix.block_ids, *[self._take() for _ in range(num_new)])
        table.block_ids.extend(new_ids)
        table.num_committed_blocks += len(prefix.block_ids)
        self.num_queried_tokens += prefix.num_queried_tokens
        self.num_hit_tokens += prefix.num_tokens
        return new_ids

    def fork(self, parent: BlockTable, child: BlockTable) -> None:
        """Let an empty table hold every block of another one; nothing is copied."""
        assert not child.block_ids, "a table is forked into an empty one"
        for block_id in parent.block_ids:
            self._refer(block_id)
        child.block_ids = parent.block_ids[:]
        child.num_committed_blocks = parent.num_committed_blocks
        child.hashes = parent.hashes[:]
        child.generation = parent.generation

    def is_current(self, table: BlockTable) -> bool:
        """Whether no reset came after the table got its first block."""
        return table.generation == self._num_resets

    def num_sharers(self, table: BlockTable, index: int) -> int:
        """How many tables hold block `index` of this one: it may be written if there is but one."""
        return self._blocks.ref_count[table.block_ids[index]]

    def num_missing_blocks(self, writes: Sequence[tuple[BlockTable, int]]) -> int:
        """How many blocks `allocate` and `own` must give before a step may write.

        Args:
            writes: tables, each with the position of the one token that it writes.
        """
        num_missing = 0
        writers: Counter[int] = Counter()
        for table, position in writes:
            index = position // self.block_size
            if index == len(table.block_ids):
                num_missing += 1
            else:
                writers[table.block_ids[index]] += 1
        for block_id, count in writers.items():
            # The last one that holds a block need not copy it.
            num_missing += count - (count == self._blocks.ref_count[block_id])
        return num_missing

    def own(self, table: BlockTable, index: int) -> tuple[int, int] | None:
        """Give the table a block of its own in the place of one that others hold too.

        Returns:
            (source, destination): the content to be copied before the table's next step; or None:
            there is no room and nothing has changed.
        """
        if not len(self._blocks.free):
            return None
        source = table.block_ids[index]
        assert self._blocks.ref_count[source] > 1, "the block is the table's own already"
        self._drop_reference(source)
        self.num_copies += 1
        table.block_ids[index] = destination = self._take()
        return source, destination

    def commit(self, table: BlockTable, token_ids: array[int], num_computed_tokens: int) -> None:
        """Let the prefix cache serve the table's full blocks up to `num_computed_tokens`.

        Call it only when the step that computed them has returned. If an equal block is cached
        already, that one stays and ours gets no hash: a step in flight may read ours, so it is not
        swapped for that one; it is simply the first to be reused once it is free.
        """
        num_full = num_computed_tokens // self.block_size
        if not self.use_prefix_cache or not self.is_current(table):
            table.num_committed_blocks = num_full
            return
        extend_chain(table.hashes, table.root, token_ids, self.block_size, num_full)
        for i in range(table.num_committed_blocks, num_full):
            prefix_hash, block_id = table.hashes[i], table.block_ids[i]
            if prefix_hash not in self._block_of:
                self._block_of[prefix_hash] = block_id
                self._blocks.hash[block_id] = prefix_hash
                self._blocks.parent[block_id] = table.hashes[i - 1] if i else table.root
                self._blocks.store_round[block_id] = 0
        table.num_committed_blocks = max(table.num_committed_blocks, num_full)

    def free(self, table: BlockTable) -> None:
        """Give back all blocks of the table, which is then empty and may be filled anew.

        Blocks with content go to the end of the free list, the last of the table first, so that of
        two blocks that were freed together the longer prefix is lost before the shorter one.
        Blocks without content go to the front.
        """
        ref_count, hashes, free = self._blocks.ref_count, self._blocks.hash, self._blocks.free
        pinned = self._pins.until
        for block_id in reversed(table.block_ids):
            self._drop_reference(block_id)
            if ref_count[block_id]:
                continue
            prefix_hash = hashes[block_id]
            if prefix_hash is None:
                free.push_first(block_id)
            elif prefix_hash in pinned:
                self._num_pinned_idle += 1
            else:
                free.push_last(block_id)
                self._num_cached_idle += 1
        table.block_ids = []
        table.num_committed_blocks = 0

    def forget(self, table: BlockTable) -> None:
        """Never serve the content of the table's blocks again: something is wrong with it."""
        for block_id in table.block_ids:
            prefix_hash = self._blocks.hash[block_id]
            if prefix_hash is not None:
                if prefix_hash in self._pins.until:
                    self._pins.remove(prefix_hash)
                self._blocks.hash[block_id] = None
                del self._block_of[prefix_hash]
                if self._misses is not None:
                    self._misses.note_loss(prefix_hash, "discarded")

    def reset_prefix_cache(self) -> int:
        """Forget all cached content, pinned or not, and return how many blocks of it there were.

        Sequences that run keep their blocks. What they commit later is not served either: their
        tables are of an older generation.
        """
        num_forgotten = len(self._block_of)
        if self._misses is not None:
            self._misses.note_losses(self._block_of, num_forgotten, "reset")
        self._release(list(self._pins.until))
        self._pins.clear()
        idle = [b for b in self._blocks.free if self._blocks.hash[b] is not None]
        for block_id in idle:
            self._blocks.free.remove(block_id)
            self._blocks.free.push_first(block_id)
        for block_id in self._block_of.values():
            self._blocks.hash[block_id] = None
        self._block_of.clear()
        self._num_cached_idle = 0
        self._num_resets += 1
        return num_forgotten

    # ---- Pins ----------------------------------------------------------------------------------

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that stay cached for a time, whether a table holds them or not."""
        return len(self._pins)

    @property
    def max_pinned_blocks(self) -> int:
        """How many there may be."""
        return self._pins.max_blocks

    @property
    def first_pin_end(self) -> float | None:
        """When the first of them may be reused; None if none is pinned."""
        return self._pins.first_end

    def reserve_pin(self, table: BlockTable, token_ids: array[int]) -> tuple[bytes, ...] | None:
        """Set room aside to pin the full blocks of a prompt.

        Args:
            table: the sequence's table, which keeps the hashes.
            token_ids: the prompt.

        Returns:
            The names of the blocks, for `pin`, and for `cancel_pin`, which must follow; or None:
            there is not enough room and nothing has changed.
        """
        num_full = len(token_ids) // self.block_size
        extend_chain(table.hashes, table.root, token_ids, self.block_size, num_full)
        names = tuple(table.hashes[:num_full])
        return names if self._pins.reserve(names) else None

    def pin(self, names: Sequence[bytes], end: float) -> None:
        """Keep the cached blocks for which room is reserved until `end`.

        Call it while a table holds them. A block that is not cached, because of a reset, is not
        pinned, nor are those behind it.
        """
        for prefix_hash in names:
            block_id = self._block_of.get(prefix_hash)
            if block_id is None:
                return
            if self._pins.pin(prefix_hash, end) and self._blocks.ref_count[block_id] == 0:
                self._blocks.free.remove(block_id)
                self._num_cached_idle -= 1
                self._num_pinned_idle += 1

    def cancel_pin(self, names: Sequence[bytes]) -> None:
        """Give back the room that `reserve_pin` set aside; what is pinned stays pinned."""
        self._pins.unreserve(names)

    def end_pins(self, now: float) -> None:
        """Release the blocks whose time is over."""
        self._release(self._pins.take_expired(now))

    def drop_pins(self) -> bool:
        """Release the blocks whose time would be over next; False if none is pinned.

        What `match_prefix` has found stays found.
        """
        names = self._pins.take_first()
        self._release(names)
        return bool(names)

    def _release(self, names: Iterable[bytes]) -> None:
        """Let blocks that were pinned be reused, the first of them first."""
        for prefix_hash in names:
            block_id = self._block_of[prefix_hash]
            if self._blocks.ref_count[block_id] == 0:
                self._blocks.free.push_last(block_id)
                self._num_pinned_idle -= 1
                self._num_cached_idle += 1

    # ---- Misses --------------------------------------------------------------------------------

    def remember_misses(self) -> None:
        """Keep from now on what `explain_miss` needs; call it before the first table is made."""
        self._misses = MissMemory()

    def explain_miss(
        self,
        table: BlockTable,
        token_ids: array[int],
        prefix: PrefixMatch,
        tables: Iterable[BlockTable],
    ) -> MissReason | None:
        """Why a finding of `match_prefix` is not longer; None if it could not be.

        Args:
            table: as `match_prefix` had it.
            token_ids: likewise.
            prefix: what it found.
            tables: those that hold blocks, and perhaps `table` itself.
        """
        assert self._misses is not None, "remember_misses() comes first"
        if not self.use_prefix_cache:
            return "cache off"
        most = (len(token_ids) - 1) // self.block_size
        at = len(prefix.block_ids)
        if at == most:
            return "shorter than a block" if most == 0 else None
        name = table.hashes[at]
        for other in tables:
            if other is table or not self.is_current(other):
                continue
            if len(other.hashes) > at and other.hashes[at] == name:
                return "being computed"
        if (loss := self._misses.loss(name)) is not None:
            return loss
        is_elsewhere = self._misses.is_under_another_root(
            table.root, token_ids, self.block_size, at + 1, self._block_of
        )
        return "other salt or scope" if is_elsewhere else "never seen"

    # ---- Invariants and small things -----------------------------------------------------------

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """Assert all that must hold between calls; looks at every block, so it is for tests.

        Args:
            tables: every table that holds a block.
        """
        blocks = self._blocks
        references = Counter(block_id for table in tables for block_id in table.block_ids)
        free = list(blocks.free)
        cached_idle = [b for b in free if blocks.hash[b] is not None]
        pinned = {self._block_of[prefix_hash] for prefix_hash in self._pins.until}
        pinned_idle = pinned.difference(references)
        assert len(pinned) == len(self._pins) <= self.max_pinned_blocks
        assert len(pinned_idle) == self._num_pinned_idle
        assert pinned.isdisjoint(free), "a pinned block is free"
        assert len(free) == len(blocks.free) == len(set(free)), "the free list is torn"
        assert set(free).isdisjoint(references), "a block is both free and referenced"
        num_known = len(free) + len(references) + len(pinned_idle)
        assert num_known == len(blocks), "a block is lost"
        assert len(cached_idle) == self._num_cached_idle
        for block_id in range(len(blocks)):
            assert blocks.ref_count[block_id] == references[block_id], "a reference is miscounted"
        assert self.num_references == references.total()
        assert self.num_shared_blocks == sum(count > 1 for count in references.values())
        hashed = {h: b for b, h in enumerate(blocks.hash) if h is not None}
        assert hashed == self._block_of, "the hash map and the blocks' hashes differ"

    def _share(self, block_id: int) -> None:
        """Add a reference to a cached block."""
        if self._blocks.ref_count[block_id] == 0:
            if self._blocks.hash[block_id] in self._pins.until:
                self._num_pinned_idle -= 1
            else:
                self._blocks.free.remove(block_id)
                self._num_cached_idle -= 1
        self._refer(block_id)

    def _refer(self, block_id: int) -> None:
        """Count a reference to a block that is not in the free list."""
        self._blocks.ref_count[block_id] += 1
        self.num_references += 1
        self.num_shared_blocks += self._blocks.ref_count[block_id] == 2

    def _drop_reference(self, block_id: int) -> None:
        """Count a reference less; the block stays where it is."""
        self.num_shared_blocks -= self._blocks.ref_count[block_id] == 2
        self._blocks.ref_count[block_id] -= 1
        self.num_references -= 1

    def _take(self) -> int:
        """Take the first free block; what it still holds is forgotten."""
        block_id = self._blocks.free.pop_first()
        prefix_hash = self._blocks.hash[block_id]
        if prefix_hash is not None:
            if self.has_lower_tier:
                self._store(prefix_hash, block_id)
            del self._block_of[prefix_hash]
            self._blocks.hash[block_id] = None
            self._num_cached_idle -= 1
            if self._misses is not None:
                self._misses.note_loss(prefix_hash, "evicted")
        self._refer(block_id)
        return block_id

    def _store(self, prefix_hash: bytes, block_id: int) -> None:
        """Have a block stored that is being evicted, and before it those that lead to it.

        The first blocks of a chain are the last to be evicted. Without them nothing of the chain
        would be found after a restart. They are named anew once in a while, or the tier would
        take those that are never evicted for the least recently used.
        """
        blocks = self._blocks
        chain = [(prefix_hash, block_id)]
        this_round = 1 + self._num_stores // len(blocks)
        before = self._block_of.get(blocks.parent[block_id])
        while before is not None and blocks.store_round[before] != this_round:
            name = blocks.hash[before]
            assert name is not None
            chain.append((name, before))
            blocks.store_round[before] = this_round
            before = self._block_of.get(blocks.parent[before])
        self._num_stores += len(chain)
        self.stores += reversed(chain)

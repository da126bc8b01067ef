"""KVCacheManager: who holds which block, and which blocks hold a prefix that others can use.

A block is always in one of three states:

    referenced     ref_count > 0: it stands in that many block tables
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
from octavo.kv_cache.prefix import extend_chain, root_hash


class BlockTable:
    """The blocks of one sequence in the order of its tokens; only `own` replaces one of them.

    Attributes:
        block_ids: token i lies in slot i % block_size of block_ids[i // block_size].
        num_committed_blocks: how many of them, from the first, are full and computed, and were
            offered to the prefix cache.
        hashes: of the full blocks, as far as needed yet; kept by `free`, as the tokens are too.
        root: the hash before the first block.
    """

    __slots__ = ("block_ids", "hashes", "num_committed_blocks", "root")

    def __init__(self, root: bytes) -> None:
        """Start empty."""
        self.block_ids: list[int] = []
        self.num_committed_blocks = 0
        self.hashes: list[bytes] = []
        self.root = root


class PrefixMatch(NamedTuple):
    """What the prefix cache can serve of a sequence: a finding, which holds nothing.

    It is true until the manager is next changed.
    """

    block_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    num_queried_tokens: int = 0


NO_PREFIX = PrefixMatch()


class KVCacheManager:
    """Every block of one pool and the prefix cache over them.

    Attributes:
        num_queried_tokens: tokens looked up in the prefix cache, counted as blocks are given.
        num_hit_tokens: tokens of them that it served.
        has_lower_tier: note in `stores` what the tier below the pool should keep.
        stores: (hash, block id) of cached blocks that `allocate` gave away, and of those before
            them in their chains; to be read before the new owners write.
    """

    def __init__(self, num_blocks: int, block_size: int, use_prefix_cache: bool = True) -> None:
        """Start with every block free."""
        self.block_size = block_size
        self.use_prefix_cache = use_prefix_cache
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.has_lower_tier = False
        self.stores: list[tuple[bytes, int]] = []
        self._num_stores = 0
        self._blocks = Blocks(num_blocks)
        self._block_of: dict[bytes, int] = {}
        self._num_cached_idle = 0
        self._num_resets = 0

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
        return len(self._blocks) - len(self._blocks.free)

    @property
    def num_cached_idle_blocks(self) -> int:
        """Free blocks whose content the prefix cache can still serve."""
        return self._num_cached_idle

    def new_table(self, salt: str = "") -> BlockTable:
        """An empty table; only tables of the same salt share blocks."""
        return BlockTable(root_hash(f"{self._num_resets}\0{salt}"))

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
        free, ref_count = self._blocks.free, self._blocks.ref_count
        num_held = len(table.block_ids) + len(prefix.block_ids)
        num_new = max(0, -(-num_tokens // self.block_size) - num_held)
        num_revived = sum([ref_count[block_id] == 0 for block_id in prefix.block_ids])
        if num_new + num_revived + num_reserved_blocks > len(free):
            return None
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
            self._blocks.ref_count[block_id] += 1
        child.block_ids = parent.block_ids[:]
        child.num_committed_blocks = parent.num_committed_blocks
        child.hashes = parent.hashes[:]

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
        self._blocks.ref_count[source] -= 1
        table.block_ids[index] = destination = self._take()
        return source, destination

    def commit(self, table: BlockTable, token_ids: array[int], num_computed_tokens: int) -> None:
        """Let the prefix cache serve the table's full blocks up to `num_computed_tokens`.

        Call it only when the step that computed them has returned. If an equal block is cached
        already, that one stays and ours gets no hash: a step in flight may read ours, so it is not
        swapped for that one; it is simply the first to be reused once it is free.
        """
        num_full = num_computed_tokens // self.block_size
        if not self.use_prefix_cache:
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
        for block_id in reversed(table.block_ids):
            ref_count[block_id] -= 1
            if ref_count[block_id]:
                continue
            if hashes[block_id] is None:
                free.push_first(block_id)
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
                self._blocks.hash[block_id] = None
                del self._block_of[prefix_hash]

    def reset_prefix_cache(self) -> None:
        """Forget all cached content. Sequences that run keep their blocks.

        What they commit later is out of reach too: a new table starts from another root.
        """
        idle = [b for b in self._blocks.free if self._blocks.hash[b] is not None]
        for block_id in idle:
            self._blocks.free.remove(block_id)
            self._blocks.free.push_first(block_id)
        for block_id in self._block_of.values():
            self._blocks.hash[block_id] = None
        self._block_of.clear()
        self._num_cached_idle = 0
        self._num_resets += 1  # Part of the root of every new table.

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """Assert all that must hold between calls; looks at every block, so it is for tests.

        Args:
            tables: every table that holds a block.
        """
        blocks = self._blocks
        references = Counter(block_id for table in tables for block_id in table.block_ids)
        free = list(blocks.free)
        cached_idle = [b for b in free if blocks.hash[b] is not None]
        assert len(free) == len(blocks.free) == len(set(free)), "the free list is torn"
        assert set(free).isdisjoint(references), "a block is both free and referenced"
        assert len(free) + len(references) == len(blocks), "a block is lost"
        assert len(cached_idle) == self._num_cached_idle
        for block_id in range(len(blocks)):
            assert blocks.ref_count[block_id] == references[block_id], "a reference is miscounted"
        hashed = {h: b for b, h in enumerate(blocks.hash) if h is not None}
        assert hashed == self._block_of, "the hash map and the blocks' hashes differ"

    def _share(self, block_id: int) -> None:
        """Add a reference to a cached block."""
        if self._blocks.ref_count[block_id] == 0:
            self._blocks.free.remove(block_id)
            self._num_cached_idle -= 1
        self._blocks.ref_count[block_id] += 1

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
        self._blocks.ref_count[block_id] = 1
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

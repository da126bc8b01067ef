"""TierMoves and what the manager notes for it, told as small stories."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from octavo.kv_cache.manager import BlockTable, KVCacheManager
from octavo.kv_cache.tiers import TierMoves
from octavo.types import LowerStats, TierStats


class Lower:
    """Has whatever hashes it is told."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.discarded: list[bytes] = []

    def fetch(self, hashes: Sequence[bytes]) -> int:
        assert hashes, "nothing is asked for"
        count = 0
        while count < len(hashes) and hashes[count] in self.known:
            count += 1
        return count

    def discard(self, hashes: Sequence[bytes]) -> None:
        self.discarded += hashes

    def clear(self) -> None:
        self.known.clear()

    def stats(self) -> LowerStats:
        return LowerStats(disk=TierStats(num_blocks=len(self.known)))


def tokens(count: int, first: int = 0) -> array[int]:
    return array("i", range(first, first + count))


def compute(manager: KVCacheManager, token_ids: array[int]) -> BlockTable:
    """A table of computed tokens, for which nothing cached was used."""
    table = manager.new_table()
    assert manager.allocate(table, len(token_ids)) is not None
    manager.commit(table, token_ids, len(token_ids))
    return table


def make(num_blocks: int) -> tuple[KVCacheManager, Lower, TierMoves]:
    manager, lower = KVCacheManager(num_blocks, block_size=4), Lower()
    return manager, lower, TierMoves(manager, lower)


def test_what_is_evicted_is_stored_with_what_leads_to_it() -> None:
    manager, _, moves = make(4)
    first = compute(manager, tokens(12))
    hashes, blocks = first.hashes[:], first.block_ids[:]
    manager.free(first)
    compute(manager, tokens(5, 50))  # Takes the free block, and the last one of the chain.
    stores, loads = moves.take()
    assert stores == tuple(zip(hashes, blocks, strict=True))
    assert loads == ()
    compute(manager, tokens(4, 70))  # Evicts the next one; what leads to it is stored already.
    assert moves.take() == (((hashes[1], blocks[1]),), ())
    assert moves.take() == ((), ())


def test_a_block_with_another_content_is_stored_anew() -> None:
    manager, _, moves = make(4)
    first = compute(manager, tokens(12))
    blocks = first.block_ids[:]
    manager.free(first)
    fillers = [compute(manager, tokens(8, start)) for start in (50, 60)]  # Evict all of it.
    for filler in fillers:
        manager.forget(filler)
        manager.free(filler)
    moves.take()
    second = compute(manager, tokens(12, 100))
    assert set(second.block_ids[:2]) == set(blocks[:2]), "they lead to the one that is evicted"
    manager.free(second)
    compute(manager, tokens(5, 200))
    assert [prefix_hash for prefix_hash, _ in moves.take()[0]] == second.hashes


def test_what_never_leaves_is_named_anew_once_in_a_while() -> None:
    """Else it would be what the tier has not heard of for longest."""
    manager, _, moves = make(10)
    head = compute(manager, tokens(4))
    stored = []
    for number in range(40):
        table, prompt = manager.new_table(), tokens(4) + tokens(8, 100 * number)
        prefix = manager.match_prefix(table, prompt)
        assert prefix.num_tokens == 4
        assert manager.allocate(table, 12, prefix) is not None
        manager.commit(table, prompt, 12)
        manager.free(table)
        stored += [prefix_hash for prefix_hash, _ in moves.take()[0]]
    num_offers = stored.count(head.hashes[0])
    assert len(stored) // 10 - 1 <= num_offers <= len(stored) // 10 + 1


def test_without_a_tier_nothing_is_noted() -> None:
    manager = KVCacheManager(2, block_size=4)
    moves = TierMoves(manager, None)
    table = compute(manager, tokens(8))
    manager.free(table)
    table = compute(manager, tokens(8, 50))
    assert moves.take() == ((), ())
    assert moves.load(table, tokens(12), 3) == 3
    assert moves.stats() == LowerStats()
    moves.discard(table)
    moves.clear()


def test_loads_begin_where_the_pool_ends() -> None:
    manager, lower, moves = make(8)
    kept = compute(manager, tokens(8))
    table, prompt = manager.new_table(), tokens(17)
    prefix = manager.match_prefix(table, prompt)
    assert manager.allocate(table, 17, prefix) is not None
    lower.known = {table.hashes[2], table.hashes[3]}
    assert moves.load(table, prompt, 8) == 16
    _, loads = moves.take()
    assert loads == tuple(zip(table.hashes[2:], table.block_ids[2:4], strict=True))
    assert manager.num_hit_tokens == 16
    # Whoever comes next shares what was loaded, in the same plan already.
    other = manager.new_table()
    assert manager.match_prefix(other, tokens(18)).block_ids == tuple(table.block_ids[:4])
    assert moves.load(table, prompt, 16) == 16
    manager.check_invariants([kept, table])


def test_a_block_that_is_half_computed_is_loaded_whole() -> None:
    manager, lower, moves = make(8)
    table, prompt = manager.new_table(), tokens(17)
    manager.match_prefix(table, prompt)
    manager.allocate(table, 17)
    lower.known = set(table.hashes[:3])
    assert moves.load(table, prompt, 6) == 12
    assert [block_id for _, block_id in moves.take()[1]] == table.block_ids[1:3]
    assert manager.num_hit_tokens == 6


def test_a_block_that_the_plan_loads_is_not_stored_by_it() -> None:
    """It does not have its content yet when the stores are read."""
    manager, lower, moves = make(8)
    first = compute(manager, tokens(8))
    beside = compute(manager, tokens(12))  # Its third block follows the second of `first`.
    manager.free(first)
    others = compute(manager, tokens(20, 50))  # Evicts the two blocks of `first`.
    manager.forget(others)
    manager.free(others)
    manager.free(beside)
    names = dict(moves.take()[0])
    assert set(names) == set(beside.hashes[:2])
    lower.known = set(names)
    table, prompt = manager.new_table(), tokens(9)
    assert manager.match_prefix(table, prompt).num_tokens == 0
    manager.allocate(table, 9)
    assert moves.load(table, prompt, 0) == 8
    compute(manager, tokens(20, 70))  # Evicts the third block, before which a loaded one stands.
    stores, loads = moves.take()
    assert len(loads) == 2
    assert [prefix_hash for prefix_hash, _ in stores] == beside.hashes[2:]


def test_discard_and_clear_reach_both() -> None:
    manager, lower, moves = make(4)
    table = compute(manager, tokens(8))
    moves.discard(table)
    assert lower.discarded == table.hashes
    assert manager.match_prefix(manager.new_table(), tokens(9)).num_tokens == 0
    manager.free(table)
    compute(manager, tokens(8, 50))
    lower.known = {b"x"}
    moves.clear()
    assert moves.stats().disk.num_blocks == 0
    assert moves.take() == ((), ())

"""KVCacheManager, told as small stories; `test_manager_histories` has the random ones."""

from __future__ import annotations

from array import array

from octavo.kv_cache.manager import BlockTable, KVCacheManager


def tokens(*token_ids: int) -> array[int]:
    return array("i", token_ids)


def fill(manager: KVCacheManager, token_ids: array[int]) -> BlockTable:
    """A table whose tokens have all been computed."""
    table = manager.new_table()
    prefix = manager.match_prefix(table, token_ids)
    assert manager.allocate(table, len(token_ids), prefix) is not None
    manager.commit(table, token_ids, len(token_ids))
    return table


def test_blocks_are_given_as_the_tokens_need_them() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    table = manager.new_table()
    assert manager.allocate(table, 5) == (0, 1)
    assert manager.allocate(table, 8) == ()
    assert manager.allocate(table, 9) == (2,)
    assert table.block_ids == [0, 1, 2]
    assert (manager.num_referenced_blocks, manager.num_free_blocks) == (3, 1)


def test_without_room_nothing_changes() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    shared = fill(manager, tokens(*range(8)))
    manager.free(shared)
    newcomer = manager.new_table()
    prefix = manager.match_prefix(newcomer, tokens(*range(8), 9))
    assert prefix.num_tokens == 8
    # Two blocks would be revived and three more are needed: five of four.
    assert manager.allocate(newcomer, 17, prefix) is None
    assert newcomer.block_ids == []
    assert manager.num_cached_idle_blocks == 2
    assert (manager.num_queried_tokens, manager.num_hit_tokens) == (8, 0)
    manager.check_invariants([])
    assert manager.allocate(newcomer, 16, prefix) is not None


def test_reserved_blocks_stay_free() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    table = manager.new_table()
    assert manager.allocate(table, 9, num_reserved_blocks=2) is None
    assert manager.allocate(table, 8, num_reserved_blocks=2) == (0, 1)


def test_a_second_sequence_shares_the_full_blocks_of_the_first() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    first = fill(manager, tokens(*range(10)))
    second = fill(manager, tokens(*range(8), 50, 51))
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert manager.num_referenced_blocks == 4
    assert (manager.num_queried_tokens, manager.num_hit_tokens) == (20, 8)
    manager.check_invariants([first, second])


def test_at_least_one_token_is_left_to_compute() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    fill(manager, tokens(*range(8)))
    assert manager.match_prefix(manager.new_table(), tokens(*range(8))).num_tokens == 4
    assert manager.match_prefix(manager.new_table(), tokens(*range(9))).num_tokens == 8


def test_only_blocks_whose_tokens_are_computed_are_served() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    token_ids = tokens(*range(12))
    table = manager.new_table()
    manager.allocate(table, 12)
    for num_computed, num_served in ((0, 0), (3, 0), (4, 4), (11, 8)):
        manager.commit(table, token_ids, num_computed)
        found = manager.match_prefix(manager.new_table(), tokens(*range(12), 99))
        assert found.num_tokens == num_served


def test_freed_blocks_are_still_served_until_they_are_reused() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    manager.free(fill(manager, tokens(*range(8))))
    assert manager.num_free_blocks == 3
    assert manager.num_cached_idle_blocks == 2
    other = fill(manager, tokens(70, 71, 72))  # Takes the block without content.
    assert manager.match_prefix(manager.new_table(), tokens(*range(9))).num_tokens == 8
    manager.allocate(other, 5)  # Takes the tail of the freed prefix, not its head.
    assert manager.match_prefix(manager.new_table(), tokens(*range(9))).num_tokens == 4
    manager.allocate(other, 9)
    assert manager.match_prefix(manager.new_table(), tokens(*range(9))).num_tokens == 0
    manager.check_invariants([other])


def test_the_least_recently_used_prefix_is_lost_first() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    for start in (0, 10, 20):
        manager.free(fill(manager, tokens(*range(start, start + 4))))
    manager.free(fill(manager, tokens(0, 1, 2, 3, 4)))  # Uses the oldest, evicts the second.
    served = [
        manager.match_prefix(manager.new_table(), tokens(*range(start, start + 5))).num_tokens
        for start in (0, 10, 20)
    ]
    assert served == [4, 0, 4]


def test_a_freed_table_can_be_filled_and_committed_anew() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    token_ids = tokens(*range(8))
    table = fill(manager, token_ids)
    manager.free(table)
    manager.reset_prefix_cache()
    assert manager.allocate(table, 8) is not None
    manager.commit(table, token_ids, 8)
    assert manager.match_prefix(table, tokens(*range(9))).num_tokens == 8
    assert table.num_committed_blocks == 2


def test_of_equal_blocks_computed_side_by_side_the_first_is_kept() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    token_ids = tokens(*range(4))
    first, second = manager.new_table(), manager.new_table()
    manager.allocate(first, 4)
    manager.allocate(second, 4)
    manager.commit(first, token_ids, 4)
    manager.commit(second, token_ids, 4)
    found = manager.match_prefix(manager.new_table(), tokens(*range(5)))
    assert found.block_ids == tuple(first.block_ids)
    manager.free(second)
    assert manager.num_cached_idle_blocks == 0
    manager.check_invariants([first])


def test_forgotten_blocks_are_served_no_more() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    table = fill(manager, tokens(*range(8)))
    manager.forget(table)
    assert manager.match_prefix(manager.new_table(), tokens(*range(8))).num_tokens == 0
    manager.free(table)
    assert manager.num_cached_idle_blocks == 0
    manager.check_invariants([])


def test_a_reset_forgets_what_is_idle_in_use_or_committed_later() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    manager.free(fill(manager, tokens(*range(50, 58))))
    token_ids = tokens(*range(12))
    running = manager.new_table()
    manager.allocate(running, 12)
    manager.commit(running, token_ids, 8)
    manager.reset_prefix_cache()
    manager.check_invariants([running])
    manager.commit(running, token_ids, 12)
    assert manager.match_prefix(manager.new_table(), tokens(*range(13))).num_tokens == 0
    assert manager.match_prefix(manager.new_table(), tokens(*range(50, 58))).num_tokens == 0


def test_salts_keep_equal_prefixes_apart() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    table = manager.new_table("tenant a")
    manager.allocate(table, 8)
    manager.commit(table, tokens(*range(8)), 8)
    asked = tokens(*range(9))
    assert manager.match_prefix(manager.new_table("tenant b"), asked).num_tokens == 0
    assert manager.match_prefix(manager.new_table(), asked).num_tokens == 0
    assert manager.match_prefix(manager.new_table("tenant a"), asked).num_tokens == 8


def num_found(manager: KVCacheManager, *token_ids: int) -> int:
    return manager.match_prefix(manager.new_table(), tokens(*token_ids)).num_tokens


def test_what_is_computed_after_a_reset_is_served_only_if_it_began_after_it() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    token_ids = tokens(*range(12))
    old = manager.new_table()
    manager.allocate(old, 12)
    manager.commit(old, token_ids, 4)
    manager.reset_prefix_cache()
    new = fill(manager, tokens(*range(8)))
    manager.commit(old, token_ids, 12)  # The head is cached again, by another sequence.
    assert num_found(manager, *range(13)) == 8
    manager.free(old)  # Preempted, and computed anew:
    manager.allocate(old, 12, manager.match_prefix(old, token_ids))
    manager.commit(old, token_ids, 12)
    assert num_found(manager, *range(13)) == 12
    manager.check_invariants([old, new])


def test_scopes_adapters_and_identities_keep_prefixes_apart_as_salts_do() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    roots = [
        manager.new_table(*names).root
        for names in ((), ("a",), ("", "a"), ("a", "a"), ("aa",), ("", "aa"), ("", "", 1))
    ]
    roots += [
        KVCacheManager(8, 4, identity=identity).new_table().root for identity in ("a", "b", "0")
    ]
    assert len(set(roots)) == len(roots)
    again = KVCacheManager(num_blocks=2, block_size=4)
    again.reset_prefix_cache()
    assert again.new_table("a").root == roots[1], "names are the same in every process"


def pin(manager: KVCacheManager, token_ids: array[int], end: float) -> None:
    """What the scheduler does for a request that pins its prompt, from beginning to end."""
    table = fill(manager, token_ids)
    names = manager.reserve_pin(table, token_ids)
    assert names is not None
    manager.pin(names, end)
    manager.free(table)
    manager.cancel_pin(names)


def test_a_pinned_prefix_outlives_one_that_was_used_later() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    pin(manager, tokens(*range(8)), end=9.5)
    manager.free(fill(manager, tokens(*range(50, 58))))
    assert (manager.num_pinned_blocks, manager.num_free_blocks) == (2, 2)
    assert manager.num_referenced_blocks == 0
    other = fill(manager, tokens(*range(70, 78)))
    assert manager.allocate(manager.new_table(), 1) is None
    assert (num_found(manager, *range(9)), num_found(manager, *range(50, 59))) == (8, 0)
    manager.end_pins(9.4)
    assert manager.num_pinned_blocks == 2
    manager.end_pins(10.0)
    assert (manager.num_pinned_blocks, manager.num_cached_idle_blocks) == (0, 2)
    assert num_found(manager, *range(9)) == 8, "it is cached as any other is"
    assert manager.allocate(other, 9) is not None
    assert num_found(manager, *range(9)) == 4, "its end is lost before its beginning"
    manager.check_invariants([other])


def test_a_pinned_prefix_is_shared_without_taking_room() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    pin(manager, tokens(*range(8)), end=5.0)
    table = manager.new_table()
    prefix = manager.match_prefix(table, tokens(*range(16)))
    assert manager.allocate(table, 16, prefix) is not None  # Two found and the two that are free.
    assert manager.num_referenced_blocks == 4
    manager.end_pins(5.0)  # While it is in use.
    manager.check_invariants([table])
    manager.free(table)
    assert (manager.num_free_blocks, manager.num_cached_idle_blocks) == (4, 2)
    manager.check_invariants([])


def test_half_of_the_pool_may_be_pinned_and_equal_prefixes_count_once() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    pin(manager, tokens(*range(12)), end=5.0)
    pin(manager, tokens(*range(13)), end=7.0)
    assert (manager.num_pinned_blocks, manager.max_pinned_blocks) == (3, 4)
    table = manager.new_table()
    assert manager.reserve_pin(table, tokens(*range(12), *range(50, 58))) is None
    names = manager.reserve_pin(table, tokens(*range(12), *range(50, 54)))
    assert names == tuple(table.hashes[:4])
    assert manager.reserve_pin(manager.new_table(), tokens(*range(70, 74))) is None
    manager.end_pins(6.0)
    assert manager.num_pinned_blocks == 3, "the later time counts"
    manager.cancel_pin(names)
    assert manager.reserve_pin(manager.new_table(), tokens(*range(70, 74))) is not None


def test_pins_that_end_first_are_dropped_first() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    pin(manager, tokens(*range(4)), end=20.0)
    pin(manager, tokens(*range(50, 58)), end=10.0)
    pin(manager, tokens(*range(50, 54)), end=15.0)
    assert manager.first_pin_end == 10.0
    assert [
        (manager.drop_pins(), manager.num_pinned_blocks, manager.num_free_blocks) for _ in range(4)
    ] == [(True, 2, 6), (True, 1, 7), (True, 0, 8), (False, 0, 8)]
    assert manager.first_pin_end is None
    manager.check_invariants([])


def test_a_reset_or_broken_logits_end_a_pin() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    pin(manager, tokens(*range(8)), end=5.0)
    assert manager.reset_prefix_cache() == 2
    assert (manager.num_pinned_blocks, manager.num_free_blocks) == (0, 8)
    manager.check_invariants([])
    pin(manager, tokens(*range(8)), end=5.0)
    table = fill(manager, tokens(*range(9)))
    manager.forget(table)
    assert manager.num_pinned_blocks == 0
    manager.free(table)
    manager.check_invariants([])
    assert manager.num_free_blocks == 8


def test_what_a_reset_took_is_not_pinned() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    table = fill(manager, tokens(*range(8)))
    names = manager.reserve_pin(table, tokens(*range(8)))
    assert names is not None
    manager.reset_prefix_cache()
    manager.pin(names, end=5.0)
    assert manager.num_pinned_blocks == 0
    manager.check_invariants([table])


def test_the_prefix_cache_can_be_left_out() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4, use_prefix_cache=False)
    manager.free(fill(manager, tokens(*range(8))))
    assert manager.match_prefix(manager.new_table(), tokens(*range(8))).num_tokens == 0
    assert manager.num_cached_idle_blocks == manager.num_queried_tokens == 0

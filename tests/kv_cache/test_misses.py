"""Why a prefix was not found: the answers, and what it costs to be able to give them."""

from __future__ import annotations

import tracemalloc
from array import array
from hashlib import sha256

from octavo.kv_cache.manager import NO_PREFIX, BlockTable, KVCacheManager
from octavo.kv_cache.misses import MAX_NAMES, MAX_ROOTS, MissMemory


def tokens(*token_ids: int) -> array[int]:
    return array("i", token_ids)


def make_manager(num_blocks: int = 8, *, use_prefix_cache: bool = True) -> KVCacheManager:
    manager = KVCacheManager(num_blocks, block_size=4, use_prefix_cache=use_prefix_cache)
    manager.remember_misses()
    return manager


def fill(manager: KVCacheManager, token_ids: array[int], salt: str = "") -> BlockTable:
    table = manager.new_table(salt)
    manager.allocate(table, len(token_ids), manager.match_prefix(table, token_ids))
    manager.commit(table, token_ids, len(token_ids))
    return table


def why(
    manager: KVCacheManager, *token_ids: int, salt: str = "", beside: tuple[BlockTable, ...] = ()
) -> object:
    table, asked = manager.new_table(salt), tokens(*token_ids)
    prefix = manager.match_prefix(table, asked)
    return manager.explain_miss(table, asked, prefix, [table, *beside])


def test_a_prefix_that_could_not_be_longer_has_no_reason() -> None:
    manager = make_manager()
    manager.free(fill(manager, tokens(*range(9))))
    assert why(manager, *range(8)) is None
    assert why(manager, *range(9)) is None
    assert why(manager, *range(13)) == "never seen"


def test_a_short_prompt_and_a_cache_that_is_off() -> None:
    assert why(make_manager(), 1, 2, 3, 4) == "shorter than a block"
    manager = make_manager(use_prefix_cache=False)
    table = manager.new_table()
    assert manager.explain_miss(table, tokens(*range(9)), NO_PREFIX, []) == "cache off"


def test_what_was_lost_and_how() -> None:
    manager = make_manager(num_blocks=2)
    manager.free(fill(manager, tokens(*range(8))))
    manager.free(fill(manager, tokens(*range(50, 54))))
    assert why(manager, *range(9)) == "evicted"
    manager.reset_prefix_cache()
    assert why(manager, *range(50, 55)) == "reset"
    assert why(manager, *range(9)) == "reset", "the first block was there until the reset"
    assert why(manager, *range(70, 80)) == "never seen"
    table = fill(manager, tokens(*range(8)))
    manager.forget(table)
    assert why(manager, *range(9)) == "discarded"


def test_what_is_cached_under_another_salt() -> None:
    manager = make_manager()
    manager.free(fill(manager, tokens(*range(8)), salt="a"))
    assert why(manager, *range(9)) == "other salt or scope"
    assert why(manager, *range(9), salt="b") == "other salt or scope"
    assert why(manager, *range(9), salt="a") is None
    assert why(manager, 0, 1, 2, 3, 9, 9, 9, 9, 9) == "other salt or scope", "its first block"
    fill(manager, tokens(0, 1, 2, 3, 9))
    assert why(manager, 0, 1, 2, 3, 9, 9, 9, 9, 9) == "never seen", "its second block"


def test_what_another_sequence_computes_at_the_moment() -> None:
    manager = make_manager()
    running, asked = manager.new_table(), tokens(*range(12))
    manager.allocate(running, 12, manager.match_prefix(running, asked))
    assert why(manager, *range(9), beside=(running,)) == "being computed"
    assert why(manager, *range(9)) == "never seen"
    manager.commit(running, asked, 4)
    assert why(manager, *range(9), beside=(running,)) == "being computed"
    manager.reset_prefix_cache()  # What it computes now will not be cached.
    assert why(manager, *range(9), beside=(running,)) == "reset"
    assert why(manager, *range(4), *range(90, 99), beside=(running,)) == "reset"
    assert why(manager, *range(90, 99), beside=(running,)) == "never seen"


def test_only_the_last_losses_and_roots_are_remembered() -> None:
    memory = MissMemory()
    names = [sha256(bytes([n & 255, n >> 8])).digest() for n in range(MAX_NAMES + 10)]
    for name in names[:-5]:
        memory.note_loss(name, "evicted")
    memory.note_loss(names[5], "evicted")  # Once more: it is not the oldest any longer.
    memory.note_losses(names[-5:], 5, "reset")
    assert [memory.loss(name) for name in names[:12]] == [None] * 5 + ["evicted"] + [None] * 5 + [
        "evicted"
    ]
    assert memory.loss(names[-1]) == "reset"
    memory = MissMemory()
    memory.note_losses(iter(names), len(names), "reset")
    assert [memory.loss(name) for name in (names[9], names[10])] == [None, "reset"]


def test_the_memory_is_as_small_as_it_says() -> None:
    tracemalloc.start()
    memory = MissMemory()
    for number in range(2 * MAX_NAMES):
        memory.note_loss(sha256(number.to_bytes(4, "little")).digest(), "evicted")
    for number in range(2 * MAX_ROOTS):
        memory.note_root(sha256(number.to_bytes(4, "little")).digest())
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 2.5e6 < num_bytes < 3.1e6

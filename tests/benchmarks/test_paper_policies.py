from __future__ import annotations

from array import array

import policies
import pytest
from buddy import BuddyAllocator
from hypothesis import given
from hypothesis import strategies as st
from policies import BatchCache, ReservingCache


@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=60),
)
def test_buddies_stay_apart_and_join_again(num_slots: int, calls: list[tuple[bool, int]]) -> None:
    buddies = BuddyAllocator(num_slots)
    wanted: dict[int, int] = {}
    for is_free, number in calls:
        if is_free and wanted:
            start = sorted(wanted)[number % len(wanted)]
            buddies.free(start)
            del wanted[start]
        else:
            start_or_none = buddies.allocate(number % num_slots + 1)
            if start_or_none is not None:
                wanted[start_or_none] = number % num_slots + 1
        end = 0
        for start, length in buddies.ranges():
            assert start >= end and start % length == 0
            assert length // 2 < wanted[start] <= length
            end = start + length
        assert end <= num_slots
        assert buddies.num_free == num_slots - sum(length for _, length in buddies.ranges())
    for start in wanted:
        buddies.free(start)
    # All halves have joined: the largest range there can be is there again.
    assert buddies.allocate(1 << (num_slots.bit_length() - 1)) == 0


def test_buddies_have_no_room_only_where_no_range_is_long_enough() -> None:
    buddies = BuddyAllocator(16)
    starts = [buddies.allocate(3) for _ in range(4)]
    assert starts == [0, 4, 8, 12] and buddies.allocate(1) is None
    buddies.free(4)
    buddies.free(8)
    assert buddies.allocate(5) is None, "the two free halves are no buddies"
    buddies.free(0)
    assert buddies.allocate(5) == 0


def test_a_pool_of_the_papers_size_holds_seven_whole_contexts() -> None:
    buddies = BuddyAllocator(15_728)
    starts = [buddies.allocate(2048) for _ in range(8)]
    assert starts.index(None) == 7


@pytest.mark.parametrize(
    ("need", "slots"),
    [
        (policies.oracle, 125),
        (policies.pow2, 100 + 32),
        (policies.maximum, 2048),
        (policies.chat, 1124),
    ],
)
def test_what_a_request_of_100_and_25_tokens_reserves(need: policies.Need, slots: int) -> None:
    cache = ReservingCache(15_728, need)
    cache.expect(100, 25)
    table = cache.new_table()
    assert len(cache.allocate(table, 100) or ()) == slots
    assert (cache.num_final, cache.num_wanted) == (125, slots)
    assert cache.num_referenced_blocks == 1 << (slots - 1).bit_length()
    cache.free(table)
    assert (cache.num_final, cache.num_wanted, cache.num_referenced_blocks) == (0, 0, 0)


def test_pow2_of_a_power_of_two_is_exact_and_never_beyond_the_context() -> None:
    assert policies.pow2(10, 32) == 42
    assert policies.pow2(1500, 513) == 2048


def test_nobody_joins_a_batch_that_runs() -> None:
    cache = BatchCache(3 * 2048)
    tables = [cache.new_table() for _ in range(4)]
    cache.begin_step()
    assert cache.allocate(tables[0], 1) and cache.allocate(tables[1], 1)
    cache.begin_step()
    assert cache.allocate(tables[2], 1) is None, "the batch runs"
    cache.free(tables[0])
    cache.begin_step()
    assert cache.allocate(tables[2], 1) is None, "one of the batch still runs"
    assert cache.num_referenced_blocks == 2 * 2048, "its memory is kept to the end"
    cache.free(tables[1])
    assert cache.num_referenced_blocks == 0
    cache.begin_step()
    assert [cache.allocate(table, 1) is not None for table in (tables[2], tables[3])] == [True] * 2
    cache.check_invariants(tables)
    assert not cache.match_prefix(tables[0], array("i", [1])).block_ids

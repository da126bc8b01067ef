"""The free list: the order in which blocks are taken, and removal from the middle."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.kv_cache.block import Blocks, FreeList


def test_blocks_start_free_and_in_order() -> None:
    blocks = Blocks(4)
    assert list(blocks.free) == [0, 1, 2, 3]
    assert len(blocks) == len(blocks.free) == 4
    assert list(blocks.ref_count) == [0, 0, 0, 0]
    assert blocks.hash == [None] * 4


def test_a_block_is_removed_from_the_middle_and_returned_to_either_end() -> None:
    free = FreeList(4)
    free.remove(2)
    assert list(free) == [0, 1, 3]
    free.push_last(2)
    assert list(free) == [0, 1, 3, 2]
    free.remove(3)
    free.push_first(3)
    assert [free.pop_first() for _ in range(4)] == [3, 0, 1, 2]
    assert len(free) == 0
    assert list(free) == []


@given(
    num_blocks=st.integers(1, 8),
    steps=st.lists(
        st.tuples(st.sampled_from(["pop", "remove", "first", "last"]), st.integers(0, 7))
    ),
)
def test_it_behaves_as_a_plain_list_does(num_blocks: int, steps: list[tuple[str, int]]) -> None:
    free, model = FreeList(num_blocks), list(range(num_blocks))
    for action, block_id in steps:
        is_free = block_id in model
        if action == "pop" and model:
            assert free.pop_first() == model.pop(0)
        elif action == "remove" and is_free:
            free.remove(block_id)
            model.remove(block_id)
        elif action == "first" and not is_free and block_id < num_blocks:
            free.push_first(block_id)
            model.insert(0, block_id)
        elif action == "last" and not is_free and block_id < num_blocks:
            free.push_last(block_id)
            model.append(block_id)
        assert list(free) == model
        assert len(free) == len(model)

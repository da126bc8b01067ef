"""Short prompts beside long ones: who gets the tokens of a step, and the bounds of `policy`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

MakeWorld = Any
BUDGET = 64


def make_big_world(make_world: MakeWorld, **options: Any) -> Any:
    return make_world(
        **{
            "num_blocks": 8000,
            "max_model_len": 20_000,
            "block_size": 16,
            "max_num_batched_tokens": BUDGET,
            "max_num_seqs": 16,
            **options,
        }
    )


def first_token_step(world: Any, request_id: str, max_steps: int) -> int:
    """How many steps pass until a request's first token."""
    for num_steps in range(1, max_steps + 1):
        if any(u.request_id == request_id and u.token_ids for u in world.step()):
            return num_steps
    raise AssertionError(f"no token within {max_steps} steps")


def test_a_short_prompt_overtakes_a_long_one(make_world: MakeWorld) -> None:
    world = make_big_world(make_world)
    world.add([1] * 10_000, name="long")
    world.step()
    world.add([2] * 40, name="short")
    assert first_token_step(world, "short", 10) == 1
    world.add([3] * 96, name="longer than a step")
    # 48 tokens of each step, less one for the decode of "short".
    assert first_token_step(world, "longer than a step", 10) == 3


def test_many_long_ones_do_not_hold_up_a_short_one(make_world: MakeWorld) -> None:
    world = make_big_world(make_world)
    for i in range(8):
        world.add([i] * 10_000)
    for _ in range(5):
        world.step()
    world.add([9] * 40, name="short")
    assert first_token_step(world, "short", 10) == 1


@settings(max_examples=60, deadline=None, database=None)
@given(budget=st.integers(4, 64), lengths=st.lists(st.integers(1, 400), min_size=1, max_size=16))
def test_both_bounds_hold_for_prompts_that_arrive_together(
    make_world: MakeWorld, budget: int, lengths: list[int]
) -> None:
    world = make_big_world(make_world, max_num_batched_tokens=budget, num_blocks=500)
    for i, length in enumerate(lengths):
        world.add([i + 1] * length, name=str(i), max_tokens=1)
    num_rows = min(16, budget)
    ended: dict[str, int] = {}
    while world.scheduler.has_work():
        for update in world.step():
            ended[update.request_id] = world.num_steps
    for i, length in enumerate(lengths[:num_rows]):
        beside = sum(min(other, length) for other in lengths) * 4 / 3 / budget
        before = sum(lengths[: i + 1]) * 4 / budget
        assert ended[str(i)] <= min(beside, before) + 2


def test_a_long_one_gets_a_quarter_under_a_flood_of_short_ones(make_world: MakeWorld) -> None:
    world = make_big_world(make_world, max_num_waiting=1000)
    world.add([1] * 1600, name="long", max_tokens=1)
    num_steps = 0
    while world.finish_reason("long") is None:
        for i in range(3):  # More than a step can compute, and all shorter than what is left.
            world.add([num_steps % 20, i] * 15, max_tokens=1)
        world.step()
        num_steps += 1
        assert num_steps <= 110
    assert num_steps >= 1600 // BUDGET * 2, "the flood was one"
    assert world.scheduler.stats().num_waiting > 10
    world.drain()


def test_running_answers_get_their_token_in_every_step(make_world: MakeWorld) -> None:
    world = make_big_world(make_world)
    for i in range(6):
        world.add([i] * 8, name=f"answer-{i}", max_tokens=30)
    world.step()
    world.add([9] * 5000, name="long")
    for _ in range(29):
        updates = world.step()
        assert sum(u.request_id.startswith("answer") for u in updates) == 6
    world.drain()


def test_answers_leave_a_token_to_a_prompt_that_runs(make_world: MakeWorld) -> None:
    world = make_big_world(make_world, max_num_batched_tokens=4)
    world.add([1] * 30, name="prompt", max_tokens=1)
    world.step()
    for i in range(8):
        world.add([i], max_tokens=300)
    # Eight answers could take the whole budget; but no more rows run than it has tokens.
    assert first_token_step(world, "prompt", 4 * 30)


def test_with_one_token_to_share_both_still_move(make_world: MakeWorld) -> None:
    world = make_big_world(make_world, max_num_batched_tokens=1, max_num_seqs=1)
    world.add([1] * 30, name="only one row", max_tokens=1)
    world.add([2] * 3, name="short", max_tokens=1)
    world.drain(max_steps=33)
    shared = make_big_world(make_world, max_num_batched_tokens=3, max_num_seqs=3)
    shared.add([1] * 30, name="answer", max_tokens=200)
    shared.add([2] * 30, name="second answer", max_tokens=200)
    assert first_token_step(shared, "second answer", 30)
    shared.add([3] * 40, name="long", max_tokens=1)
    assert first_token_step(shared, "long", 100) == 40, "one token a step is left"


def test_a_large_head_of_the_queue_is_not_overtaken_for_ever(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=20, block_size=4, max_num_batched_tokens=32)
    for i in range(4):
        world.add([i] * 12, max_tokens=8)
    world.step()
    world.add([8] * 70, name="large", max_tokens=4)
    for i in range(100):
        world.add([i % 20, 7] * 6, max_tokens=4, name=f"small-{i}")
        world.step()
        if world.finish_reason("large"):
            break
    assert world.finish_reason("large") == "length"
    world.drain()


@pytest.mark.parametrize("use_prefix_cache", [True, False])
def test_a_long_cached_prompt_counts_as_short(
    make_world: MakeWorld, use_prefix_cache: bool
) -> None:
    world = make_big_world(make_world, use_prefix_cache=use_prefix_cache)
    world.add([1] * 640, name="seen", max_tokens=1)
    world.drain()
    world.add([2] * 200, name="unseen", max_tokens=1)
    world.add([1] * 640 + [3], name="seen again", max_tokens=1)
    if use_prefix_cache:
        assert first_token_step(world, "seen again", 1)
    else:
        assert first_token_step(world, "unseen", 10) <= 5
    world.drain()

"""Blocks that leave the pool and come back; the random histories have the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

PROMPT = [*range(1, 21), 1]  # Five full blocks of 4, and a token.
OTHERS = [[token] * 21 for token in (3, 4, 5)]


@pytest.fixture
def tier(simulation: SimpleNamespace) -> Any:
    return simulation.FakeTier(100)


def evict(world: Any, prompts: list[list[int]] = OTHERS) -> None:
    """Run requests that need the whole pool, one after another."""
    for prompt in prompts:
        world.add(prompt, max_tokens=1)
        world.drain()


def test_evicted_blocks_are_stored_and_loaded(make_world: Any, tier: Any) -> None:
    world = make_world(num_blocks=7, tier=tier)
    name = world.add(PROMPT, max_tokens=1)
    world.drain()
    assert not tier.blocks
    evict(world)
    assert len(tier.blocks) >= 5
    before = world.scheduler.stats().cache.num_hits
    again = world.add(PROMPT, max_tokens=1)
    plan = world.schedule()
    assert len(plan.loads) == 5
    assert plan.num_tokens == 1, "all but the last token was loaded"
    assert len({block_id for _, block_id in plan.loads}) == 5
    [update] = world.finish_step()
    assert update.num_cached_tokens == 20
    assert world.scheduler.stats().cache.num_hits - before == 20
    assert world.output(again) == world.output(name)
    world.drain()


def test_what_the_pool_has_is_not_loaded(make_world: Any, tier: Any) -> None:
    """Of a chain whose tail was evicted, the tail alone is loaded; the rest stays shared."""
    world = make_world(num_blocks=7, tier=tier)
    world.add(PROMPT, max_tokens=1)
    world.drain()
    evict(world, [[3] * 13])  # Takes the two free blocks and two of the five.
    assert len(tier.blocks) == 5, "with what leads to them"
    world.add(PROMPT, max_tokens=1)
    plan = world.schedule()
    assert len(plan.loads) == 2
    assert plan.num_tokens == 1
    world.finish_step()


def test_a_sequence_admitted_beside_it_shares_what_is_loaded(make_world: Any, tier: Any) -> None:
    world = make_world(num_blocks=16, tier=tier)
    world.add(PROMPT, max_tokens=1)
    world.drain()
    evict(world, [[token] * 41 for token in (3, 4)])
    names = [world.add([*PROMPT, token], max_tokens=2) for token in (7, 8)]
    plan = world.schedule()
    assert len(plan.loads) == 5, "once for both"
    assert plan.num_tokens == 4
    world.finish_step()
    world.drain()
    assert world.output(names[0]) != world.output(names[1])


def test_what_takes_long_is_loaded_over_several_steps(make_world: Any, tier: Any) -> None:
    """Between the loads the prompt is computed on; a block that was half computed is loaded."""
    world = make_world(num_blocks=7, max_num_batched_tokens=3, tier=tier)
    world.add(PROMPT, max_tokens=1)
    world.drain()
    evict(world)
    tier.most_blocks = 1
    again = world.add(PROMPT, max_tokens=1)
    computed = []
    while world.scheduler.has_work():
        [entry] = world.schedule().scheduled
        computed.append((len(world.plan.loads), entry.num_computed_tokens, entry.num_new_tokens))
        updates = world.finish_step()
    assert computed == [(1, 4, 3), (1, 8, 3), (1, 12, 3), (1, 16, 3), (1, 20, 1)]
    assert updates[-1].num_cached_tokens == 4 + 4 * 1
    assert world.output(again) == world.output("request-1")


def test_a_preempted_prompt_loads_again_what_it_lost(make_world: Any, tier: Any) -> None:
    prompt = [*range(1, 21), *range(20), 1]
    world = make_world(num_blocks=13, max_num_batched_tokens=2, tier=tier)
    world.add(prompt, max_tokens=1)
    world.drain()
    evict(world, [[token] * 41 for token in (3, 4, 5)])
    tier.most_blocks = 1
    world.add([2, 2, 2], max_tokens=27, name="first in rank")
    world.step()
    name = world.add(prompt, max_tokens=1)
    loads = 0
    while world.scheduler.has_work():
        loads += len(world.schedule().loads)
        world.finish_step()
    assert world.scheduler.stats().num_preemptions > 0
    assert loads > 10
    assert world.output(name) == world.output("request-1")


def test_a_damaged_prefix_is_never_loaded_again(make_world: Any, tier: Any) -> None:
    world = make_world(num_blocks=7, tier=tier)
    name = world.add(PROMPT, max_tokens=8, seed=7)  # Its third token cannot be sampled.
    world.drain()
    assert world.finish_reason(name) == "error"
    evict(world)
    world.add(PROMPT, max_tokens=1)
    assert not world.schedule().loads
    world.finish_step()


def test_a_damaged_prefix_that_was_loaded_is_discarded(make_world: Any, tier: Any) -> None:
    world = make_world(num_blocks=8, tier=tier)
    world.add(PROMPT, max_tokens=1)
    world.drain()
    evict(world, [[token] * 29 for token in (3, 4)])
    world.add(PROMPT, max_tokens=8, seed=7)
    hashes = [prefix_hash for prefix_hash, _ in world.schedule().loads]
    assert len(hashes) == 5
    world.finish_step()
    world.drain()
    assert tier.blocks.keys().isdisjoint(hashes)


def test_a_reset_forgets_what_lies_below(make_world: Any, tier: Any) -> None:
    world = make_world(num_blocks=7, tier=tier)
    world.add(PROMPT, max_tokens=1)
    world.drain()
    evict(world)
    world.scheduler.reset_prefix_cache()
    assert not tier.blocks
    world.add(PROMPT, max_tokens=1)
    assert not world.schedule().loads
    world.finish_step()


def test_without_a_prefix_cache_nothing_moves(make_world: Any, tier: Any) -> None:
    world = make_world(num_blocks=7, use_prefix_cache=False, tier=tier)
    world.add(PROMPT, max_tokens=1)
    world.drain()
    evict(world)
    world.add(PROMPT, max_tokens=1)
    world.drain()
    assert not tier.blocks
    assert tier.num_loads == 0

"""Who shares cached prefixes, what is pinned, and what is said of a miss: told as small stories."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import InvalidRequestError, OverloadedError
from octavo.types import CacheParams, PrefixReport

MakeWorld = Any
PROMPT = list(range(1, 18))  # Four full blocks and a token.


def run(world: Any, prompt: list[int], **options: Any) -> int:
    """Compute a request to its end; return how many of its tokens were cached."""
    name = world.add(prompt, **options)
    world.drain()
    (cached,) = [u.num_cached_tokens for u in world.updates if u.request_id == name][:1]
    return int(cached)


def pinned(world: Any) -> int:
    return int(world.scheduler.stats().cache.num_blocks_pinned)


def test_only_requests_of_one_salt_and_scope_share_blocks(make_world: MakeWorld) -> None:
    world = make_world()
    sharers = [
        CacheParams(),
        CacheParams(salt="a"),
        CacheParams(scope="a"),
        CacheParams(salt="a", scope="a"),
        CacheParams(salt="b", scope="a"),
    ]
    assert [run(world, PROMPT, cache=cache) for cache in sharers] == [0] * 5
    assert [run(world, PROMPT, cache=cache) for cache in sharers] == [16] * 5


def test_all_answers_to_one_request_share_its_prompt(make_world: MakeWorld) -> None:
    world = make_world()
    name = world.add(PROMPT, n=3, cache=CacheParams(salt="a"))
    world.drain()
    cache = world.scheduler.stats().cache
    assert (cache.num_queries, cache.num_hits) == (17, 0)
    assert [world.finish_reason(name, i) for i in range(3)] == ["length"] * 3


def test_a_pinned_prompt_is_there_after_everything_else_was_lost(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=16)
    run(world, PROMPT, cache=CacheParams(pin_s=1000))
    run(world, [20, *PROMPT])
    for other in range(10):
        run(world, [other + 2] * 17)
    assert run(world, [20, *PROMPT]) == 0
    assert run(world, PROMPT) == 16
    assert pinned(world) == 4


def test_a_pins_time_begins_with_the_first_token(make_world: MakeWorld) -> None:
    world = make_world(max_num_seqs=1, num_blocks=32)
    world.add([5] * 4, max_tokens=20)  # The pinned prompt waits for it for 20 s.
    world.add(PROMPT, max_tokens=10, cache=CacheParams(pin_s=4))
    while len(world.output("request-2")) < 4:
        assert pinned(world) == (4 if world.output("request-2") else 0)
        world.step()
    while world.scheduler.has_work():
        world.step()
    assert pinned(world) == 0


def test_an_aborted_request_pins_nothing_and_takes_no_room(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=8, max_model_len=24)
    for _ in range(3):
        name = world.add(PROMPT[:16], cache=CacheParams(pin_s=50))
        with pytest.raises(OverloadedError, match="pinned"):
            world.add([30 + i for i in range(4)], cache=CacheParams(pin_s=50))
        world.abort(name)
    assert pinned(world) == 0
    world.add([10 + i for i in range(4)], cache=CacheParams(pin_s=50))
    world.drain()
    assert pinned(world) == 1


def test_a_pin_that_cannot_be_is_refused_and_nothing_has_changed(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=8, max_model_len=30)
    before = world.scheduler.stats()
    with pytest.raises(InvalidRequestError, match="5 KV blocks, and at most 4 of 8") as caught:
        world.add([1] * 20, cache=CacheParams(pin_s=1))
    assert caught.value.param == "cache_pin_s"
    assert world.scheduler.stats() == before
    run(world, PROMPT[:16], cache=CacheParams(pin_s=30))
    before = world.scheduler.stats()
    with pytest.raises(OverloadedError, match="of the 4 that may be pinned 4 are") as refused:
        world.add([9] * 9, cache=CacheParams(pin_s=1))
    assert refused.value.code == "cache_pins_full"
    assert 25 < refused.value.retry_after_s <= 31
    assert world.scheduler.stats() == before
    run(world, PROMPT[:13], cache=CacheParams(pin_s=1))  # It is pinned already.
    world.num_steps = 40
    run(world, [9] * 9, cache=CacheParams(pin_s=1))


def test_without_a_prefix_cache_nothing_can_be_pinned(make_world: MakeWorld) -> None:
    world = make_world(use_prefix_cache=False)
    with pytest.raises(InvalidRequestError, match="no prefix cache"):
        world.add(PROMPT, cache=CacheParams(pin_s=1))
    run(world, PROMPT, cache=CacheParams(salt="a"))


def test_pins_make_way_for_a_sequence_that_would_run_alone(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=8, max_model_len=33)
    run(world, PROMPT[:8], cache=CacheParams(pin_s=500))
    run(world, [7] * 8, cache=CacheParams(pin_s=100))
    assert pinned(world) == 4
    world.add([9] * 21, max_tokens=1)  # Six blocks: one pin has to go, the one that ends first.
    world.step()
    assert pinned(world) == 2
    assert run(world, PROMPT[:9]) == 8
    world.add([9] * 28, max_tokens=5)  # Seven and, while it runs, eight blocks.
    world.step()
    assert pinned(world) == 0
    world.drain()


def test_pins_make_way_for_the_growth_of_a_lone_sequence(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=8, max_model_len=33)
    run(world, PROMPT[:16], cache=CacheParams(pin_s=500))
    name = world.add([9] * 10, max_tokens=20)
    world.drain()
    assert pinned(world) == 0
    assert world.scheduler.stats().num_preemptions == 0
    assert len(world.output(name)) == 20


def test_others_are_preempted_before_a_pin_is_dropped(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=12, max_model_len=40)
    run(world, PROMPT, cache=CacheParams(pin_s=500))
    names = [world.add([token] * 8, max_tokens=12) for token in (5, 6)]
    world.drain()
    assert world.scheduler.stats().num_preemptions > 0
    assert pinned(world) == 4
    assert [len(world.output(name)) for name in names] == [12, 12]


def test_a_reset_forgets_pins_and_counts_what_it_forgot(make_world: MakeWorld) -> None:
    world = make_world()
    run(world, PROMPT, cache=CacheParams(pin_s=500))
    run(world, [20, *PROMPT])
    assert world.scheduler.reset_prefix_cache() == 10  # With the blocks that the answers filled.
    assert pinned(world) == 0
    assert run(world, PROMPT) == 0


def test_every_admitted_sequence_is_reported_with_the_reason_of_its_miss(
    make_world: MakeWorld,
) -> None:
    reports: list[PrefixReport] = []
    world = make_world(num_blocks=12, max_model_len=40, reports=reports)
    run(world, PROMPT, max_tokens=1)
    run(world, PROMPT, max_tokens=1)
    run(world, PROMPT, max_tokens=1, cache=CacheParams(scope="k"))
    run(world, [5], max_tokens=1)
    run(world, [9] * 39, max_tokens=1)
    run(world, PROMPT, max_tokens=1)
    world.scheduler.reset_prefix_cache()
    run(world, PROMPT, max_tokens=1)
    world.add([8] * 9, max_tokens=1)
    world.add([8] * 9, max_tokens=1)
    world.drain()
    assert [(r.request_id, r.num_cached_tokens, r.miss) for r in reports] == [
        ("request-1", 0, "never seen"),
        ("request-2", 16, None),
        ("request-3", 0, "other salt or scope"),
        ("request-4", 0, "shorter than a block"),
        ("request-5", 0, "never seen"),
        ("request-6", 0, "evicted"),
        ("request-7", 0, "reset"),
        ("request-8", 0, "never seen"),
        ("request-9", 0, "being computed"),
    ]
    assert {r.block_size for r in reports} == {4}
    assert [r.num_tokens for r in reports[:5]] == [17, 17, 17, 1, 39]


def test_a_report_is_made_for_what_is_admitted_not_forked_and_after_preemption(
    make_world: MakeWorld,
) -> None:
    reports: list[PrefixReport] = []
    world = make_world(num_blocks=8, max_model_len=30, reports=reports)
    world.add([5] * 9, max_tokens=18, n=2)
    world.step()
    assert [(r.request_id, r.index) for r in reports] == [("request-1", 0)]
    world.drain()
    assert world.scheduler.stats().num_preemptions == len(reports) - 1 > 0
    assert max(r.num_tokens for r in reports) > 9


@pytest.mark.parametrize("search", [{"n": 3}, {"use_beam_search": True, "best_of": 3}])
def test_samples_and_beams_pin_their_prompt(make_world: MakeWorld, search: dict[str, Any]) -> None:
    world = make_world(num_blocks=16, max_model_len=32)
    options = {"temperature": 0, **search}
    run(world, PROMPT, cache=CacheParams(pin_s=500), **options)
    assert pinned(world) == 4
    run(world, [9] * 25, max_tokens=7)
    assert (run(world, PROMPT), pinned(world)) == (16, 4)


def test_pins_make_way_before_samples_of_one_request_preempt_each_other(
    make_world: MakeWorld,
) -> None:
    world = make_world(num_blocks=16, max_model_len=32)
    run(world, PROMPT, cache=CacheParams(pin_s=500))
    run(world, [8] * 12, max_tokens=16, n=3)  # Fifteen blocks, and twelve are not pinned.
    assert (pinned(world), world.scheduler.stats().num_preemptions) == (0, 0)


def test_without_somebody_to_tell_nothing_is_remembered(make_world: MakeWorld) -> None:
    world = make_world()
    run(world, PROMPT)
    assert world.scheduler._cache._misses is None

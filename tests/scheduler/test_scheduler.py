"""The scheduler, told as small stories; `test_scheduler_histories` has the random ones."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import ContextLengthError, InvalidRequestError, OverloadedError
from octavo.types import (
    EngineRequest,
    ModelOutput,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
)

MakeWorld = Any


def chunks(plan: SchedulerOutput) -> dict[int, int]:
    """How many tokens each row computes."""
    return {entry.row: entry.num_new_tokens for entry in plan.scheduled}


# ---- One request -------------------------------------------------------------------------------


def test_a_prompt_is_computed_and_then_one_token_a_step(make_world: MakeWorld) -> None:
    world = make_world()
    world.add([5] * 10, max_tokens=3)
    first = world.schedule()
    (new,) = first.new_sequences
    assert (new.row, new.index, new.token_ids, new.num_prompt_tokens) == (0, 0, [5] * 10, 10)
    assert first.scheduled[0].new_block_ids == (0, 1, 2)
    assert (first.num_tokens, first.scheduled[0].is_sampling) == (10, True)
    world.finish_step()
    second = world.schedule()
    assert second.new_sequences == ()
    (entry,) = second.scheduled
    assert (entry.num_computed_tokens, entry.num_new_tokens, entry.new_block_ids) == (10, 1, ())
    world.finish_step()
    assert world.scheduler.has_work()
    world.step()
    assert not world.scheduler.has_work()
    assert world.finish_reason("request-1") == "length"
    assert len(world.output("request-1")) == 3


def test_a_prompt_longer_than_the_budget_takes_several_steps(make_world: MakeWorld) -> None:
    world = make_world(max_num_batched_tokens=16)
    world.add([5] * 40)
    sizes, is_sampling = [], []
    for _ in range(3):
        plan = world.schedule()
        sizes.append(plan.num_tokens)
        is_sampling.append(plan.scheduled[0].is_sampling)
        world.finish_step()
    assert sizes == [16, 16, 8]
    assert is_sampling == [False, False, True]


def test_a_new_block_comes_when_the_last_one_is_full(make_world: MakeWorld) -> None:
    world = make_world(block_size=4)
    world.add([5] * 3, max_tokens=8)
    new_blocks = []
    while world.scheduler.has_work():
        new_blocks.append(len(world.schedule().scheduled[0].new_block_ids))
        world.finish_step()
    # Tokens 0-2, 3, 4, … are computed; slots 4 and 8 begin a block. The last token has no slot.
    assert new_blocks == [1, 0, 1, 0, 0, 0, 1, 0]


def test_the_next_plan_names_the_rows_that_ended(make_world: MakeWorld) -> None:
    world = make_world()
    world.add([5], max_tokens=1)
    world.add([6], max_tokens=5)
    world.step()
    world.add([7], max_tokens=1)
    plan = world.schedule()
    assert plan.finished_rows == (0,)
    assert [new.row for new in plan.new_sequences] == [0], "the row is free again at once"
    world.finish_step()
    world.drain()


# ---- How a sequence ends -----------------------------------------------------------------------


def run_one(world: Any, **params: Any) -> Any:
    world.add([9, 4, 2], **params)
    world.drain()
    return world.updates[-1]


def test_max_tokens_ends_with_length(make_world: MakeWorld) -> None:
    world = make_world()
    assert run_one(world, max_tokens=7).finish_reason == "length"
    assert len(world.output("request-1")) == 7


def test_the_context_length_ends_with_length(make_world: MakeWorld) -> None:
    world = make_world(max_model_len=10)
    assert run_one(world, max_tokens=None).finish_reason == "length"
    assert len(world.output("request-1")) == 7


def test_end_of_text_ends_with_stop_unless_ignored(make_world: MakeWorld) -> None:
    world = make_world()
    last = run_one(world, ignore_eos=False, max_tokens=200)
    assert (last.finish_reason, last.token_ids, last.stop_token_id) == ("stop", (0,), None)
    ignoring = make_world()
    assert run_one(ignoring, ignore_eos=True, max_tokens=200).finish_reason == "length"
    assert 0 in ignoring.output("request-1")


def test_a_stop_token_ends_with_stop_and_is_named(make_world: MakeWorld) -> None:
    free = make_world()
    run_one(free, max_tokens=20)
    stop = free.output("request-1")[5]
    world = make_world()
    last = run_one(world, max_tokens=20, stop_token_ids=(stop,))
    assert (last.finish_reason, last.token_ids, last.stop_token_id) == ("stop", (stop,), stop)
    output = free.output("request-1")
    assert world.output("request-1") == output[: output.index(stop) + 1]


def test_no_stop_token_ends_a_sequence_before_min_tokens(make_world: MakeWorld) -> None:
    scheduler = make_world().scheduler
    params = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(8,))
    scheduler.add(EngineRequest(request_id="a", prompt_ids=[1], params=params), 0.0)
    reasons = []
    for _ in range(3):
        row = scheduler.schedule(0.0).scheduled[0].row
        (update,) = scheduler.update(ModelOutput(sampled=(SampledTokens(row, (8,)),)))
        reasons.append(update.finish_reason)
    assert reasons == [None, None, "stop"], "the third token is the first that may end it"


def test_broken_logits_end_with_error_and_leave_no_prefix_behind(make_world: MakeWorld) -> None:
    world = make_world()
    world.add([3] * 20, seed=7, max_tokens=10)  # Seeds that 7 divides break the third token.
    world.add([4] * 20, seed=1, max_tokens=10)
    world.drain()
    assert world.finish_reason("request-1") == "error"
    assert len(world.output("request-1")) == 2
    assert world.finish_reason("request-2") == "length"
    world.add([3] * 20, seed=1)
    world.step()
    assert world.updates[-1].num_cached_tokens == 0
    world.add([4] * 20, seed=1)
    world.step()
    assert world.updates[-1].num_cached_tokens == 16


# ---- Refusals ----------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_context_is_refused(make_world: MakeWorld) -> None:
    world = make_world(max_model_len=16)
    world.add([1] * 15)
    with pytest.raises(ContextLengthError, match=r"16 tokens long; the prompt has 16") as caught:
        world.add([1] * 16)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_a_request_that_the_pool_can_never_hold_is_refused(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=4, block_size=4)
    world.add([1] * 10, max_tokens=7)  # 16 slots: the last token needs none.
    with pytest.raises(ContextLengthError, match=r"needs 5 KV blocks of 4 tokens; the pool has 4"):
        world.add([1] * 10, max_tokens=8)
    world.drain()


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([1, -1], {}, "prompt"),
        ([2**31], {}, "prompt"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"n": 0}, "n"),
        ([1], {"name": "taken"}, "request_id"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    make_world: MakeWorld, prompt: list[int], params: dict[str, Any], param: str
) -> None:
    world = make_world()
    world.add([1], name="taken")
    before = world.scheduler.stats()
    with pytest.raises(InvalidRequestError) as caught:
        world.add(prompt, **params)
    assert caught.value.param == param
    assert world.scheduler.stats() == before


def test_a_full_queue_refuses_and_says_when_to_come_back(make_world: MakeWorld) -> None:
    world = make_world(max_num_waiting=3, max_num_seqs=1)
    for _ in range(3):
        world.add([1], max_tokens=20)
    with pytest.raises(OverloadedError) as caught:
        world.add([1])
    assert caught.value.retry_after_s == 1.0, "nothing has been measured yet"
    for _ in range(41):  # Each takes 20 steps, and a step takes a second here.
        world.step()
    for _ in range(3):
        world.add([1])
    with pytest.raises(OverloadedError) as caught:
        world.add([1])
    assert caught.value.retry_after_s == pytest.approx(3 * 41 / 3), "three started in 41 s"
    world.drain()


# ---- Aborts ------------------------------------------------------------------------------------


def test_an_abort_frees_blocks_and_row_at_once(make_world: MakeWorld) -> None:
    world = make_world()
    world.add([5] * 10)
    world.step()
    (update,) = world.abort("request-1")
    assert (update.finish_reason, update.token_ids) == ("abort", ())
    assert not world.scheduler.has_work()
    assert world.scheduler.stats().cache.num_blocks_used == 0
    assert world.abort("request-1") == [], "it has ended already, which is no fault"
    world.add([6], name="request-1")
    assert world.schedule().finished_rows == (0,)
    world.finish_step()


def test_an_abort_in_flight_keeps_the_blocks_until_the_step_returns(make_world: MakeWorld) -> None:
    world = make_world()
    world.add([5] * 10)
    world.add([6] * 10)
    world.schedule()
    assert len(world.abort("request-1")) == 1
    assert world.scheduler.stats().cache.num_blocks_used == 6
    assert world.scheduler.stats().num_running == 1
    assert {update.request_id for update in world.finish_step()} == {"request-2"}
    assert world.scheduler.stats().cache.num_blocks_used == 3
    world.drain()


# ---- Two steps in flight -----------------------------------------------------------------------


def begin(world: Any) -> list[tuple[int, int]]:
    """Plan a step and leave it in flight; (tokens computed before, new ones) of each entry."""
    plan = world.schedule()
    if plan.scheduled:
        world.outputs.append(world.executor.run(plan))
    return [(entry.num_computed_tokens, entry.num_new_tokens) for entry in plan.scheduled]


def test_a_token_is_planned_before_the_one_before_it_is_known(make_world: MakeWorld) -> None:
    world = make_world()
    world.add([5] * 10, max_tokens=4)
    assert [begin(world) for _ in range(2)] == [[(0, 10)], [(10, 1)]]
    updates = [world._take_result() for _ in range(2)]
    assert [len(of_step) for of_step in updates] == [1, 1]
    assert begin(world) == [(11, 1)], "one more may come"
    assert begin(world) == [(12, 1)], "the last one is sampled here"
    assert begin(world) == [], "nothing follows the last token"
    world.drain()
    assert world.finish_reason("request-1") == "length"


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"use_beam_search": True, "temperature": 0, "n": 2},
    ],
)
def test_what_depends_on_earlier_tokens_waits_for_them(
    make_world: MakeWorld, params: dict[str, Any]
) -> None:
    world = make_world()
    world.add([5] * 10, **params)
    world.add([6] * 10)
    assert begin(world) == [(0, 10), (0, 10)]
    assert begin(world) == [(10, 1)], "the other one goes on"
    world._take_result()
    world.drain()


def test_nobody_is_preempted_while_a_step_is_in_flight(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=6, block_size=4)
    world.add([5] * 8, max_tokens=12)
    world.add([6] * 8, max_tokens=12)
    while world.scheduler.stats().cache.num_blocks_used < 6:
        world.step()
    while len(begin(world)) == 2:
        if len(world.outputs) > 1:
            world._take_result()
    assert world.scheduler.stats().num_preemptions == 0
    while world.outputs:
        world._take_result()
    world.step()
    assert world.scheduler.stats().num_preemptions == 1
    world.drain()


def test_a_text_that_ends_while_its_next_step_is_in_flight(make_world: MakeWorld) -> None:
    """What that step computes is thrown away, and it keeps row and blocks until it returns."""
    world = make_world()
    world.add([5] * 3, max_tokens=30)
    world.step()
    token = world.output("request-1")[0]
    world.add([5] * 3, max_tokens=30, stop_token_ids=(token,))
    begin(world)
    begin(world)
    ended = [update for update in world._take_result() if update.finish_reason]
    assert [(u.request_id, u.finish_reason) for u in ended] == [("request-2", "stop")]
    stats = world.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.cache.num_blocks_used) == (1, 0, 3)
    assert {update.request_id for update in world._take_result()} == {"request-1"}
    assert world.scheduler.stats().cache.num_blocks_used == 2
    world.drain()


def test_one_sequence_of_a_request_can_be_aborted(make_world: MakeWorld) -> None:
    world = make_world()
    world.add([5] * 3, n=3, max_tokens=6)
    world.step()
    assert [update.index for update in world.abort("request-1", 1)] == [1]
    world.drain()
    assert [world.finish_reason("request-1", i) for i in range(3)] == ["length", "abort", "length"]


# ---- Several sequences of one request ----------------------------------------------------------


@pytest.mark.parametrize("use_prefix_cache", [True, False])
def test_siblings_share_the_prompt_and_copy_one_block(
    make_world: MakeWorld, use_prefix_cache: bool
) -> None:
    world = make_world(block_size=4, use_prefix_cache=use_prefix_cache)
    world.add([5] * 10, n=3, max_tokens=5)
    assert [entry.num_new_tokens for entry in world.schedule().scheduled] == [10, 0, 0]
    world.finish_step()
    assert world.scheduler.stats().cache.num_blocks_used == 3
    plan = world.schedule()
    assert sorted(chunks(plan).values()) == [1, 1, 1]
    assert [copy.index for copy in plan.copies] == [2, 2], "the last one that holds it writes it"
    world.finish_step()
    assert world.scheduler.stats().cache.num_blocks_used == 2 + 3 * 1
    world.drain()
    assert len({tuple(world.output("request-1", index)) for index in range(3)}) == 3
    assert {update.num_cached_tokens for update in world.updates} == {0}, "it was not cached before"


def test_siblings_without_a_row_share_the_full_blocks_later(make_world: MakeWorld) -> None:
    world = make_world(block_size=4, max_num_seqs=2, use_prefix_cache=False)
    world.add([5] * 10, n=3, max_tokens=5)
    world.step()
    world.abort("request-1", 0)
    assert sorted(chunks(world.schedule()).values()) == [1, 2]
    world.finish_step()
    world.drain()


def test_samples_are_preempted_together_and_come_back_together(make_world: MakeWorld) -> None:
    world = make_world(block_size=4, num_blocks=9, max_model_len=32)
    world.add([5] * 8, max_tokens=24)
    world.add([6] * 8, n=3, max_tokens=12)
    while world.scheduler.stats().num_preemptions == 0:
        world.step()
    assert world.scheduler.stats().num_preemptions == 3
    assert (world.scheduler.stats().num_running, world.scheduler.stats().num_waiting) == (1, 3)
    world.drain()


def test_beams_share_blocks(make_world: MakeWorld) -> None:
    world = make_world(block_size=4)
    world.add([5] * 40, best_of=4, use_beam_search=True, max_tokens=9)
    world.step()
    assert world.scheduler.stats().cache.num_blocks_used == 10
    while world.scheduler.has_work():
        assert world.scheduler.stats().cache.num_blocks_used <= 10 + 4 * 3
        world.step()
    (update,) = world.updates
    assert (update.index, len(update.token_ids), update.finish_reason) == (0, 9, "length")


def test_when_the_first_is_aborted_the_next_takes_its_place(make_world: MakeWorld) -> None:
    world = make_world(max_num_batched_tokens=8)
    world.add([5] * 20, n=3)
    world.step()
    world.abort("request-1", 0)
    assert len(world.schedule().scheduled) == 1
    world.finish_step()
    world.drain()
    assert [world.finish_reason("request-1", i) for i in range(3)] == ["abort", "length", "length"]


# ---- The prefix cache --------------------------------------------------------------------------


def test_the_first_update_says_how_many_tokens_were_cached(make_world: MakeWorld) -> None:
    world = make_world(block_size=4)
    world.add([5] * 11)
    world.drain()
    world.add([5] * 11)
    world.drain()
    cached = [update.num_cached_tokens for update in world.updates]
    assert cached == [0, 0, 0, 0, 8, 0, 0, 0]
    assert world.output("request-1") == world.output("request-2")
    stats = world.scheduler.stats()
    assert (stats.cache.num_queries, stats.cache.num_hits) == (22, 8)
    assert (stats.prompt_tokens, stats.generation_tokens) == (22, 8)


def test_answers_are_cached_for_the_next_turn(make_world: MakeWorld) -> None:
    world = make_world(block_size=4)
    world.add([5] * 6, max_tokens=6)
    world.drain()
    world.add([5] * 6 + world.output("request-1") + [8, 8])
    world.step()
    assert world.updates[-1].num_cached_tokens == 8, "11 tokens were computed: two full blocks"


# ---- Preemption --------------------------------------------------------------------------------


def test_the_last_comer_is_preempted_and_resumes_with_its_tokens(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=10, block_size=4, use_prefix_cache=False)
    world.add([5] * 12, max_tokens=17)
    world.add([6] * 12, max_tokens=17)
    world.drain()
    assert world.scheduler.stats().num_preemptions == 1
    alone = make_world()
    alone.add([5] * 12, max_tokens=17)
    alone.drain()
    alone.add([6] * 12, max_tokens=17)
    alone.drain()
    for request_id in ("request-1", "request-2"):
        assert world.output(request_id) == alone.output(request_id)
    first_end, second_end = (
        next(i for i, u in enumerate(world.updates) if u.request_id == r and u.finish_reason)
        for r in ("request-1", "request-2")
    )
    assert first_end < second_end


def test_the_least_urgent_is_preempted_under_the_priority_policy(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=10, block_size=4, use_prefix_cache=False, policy="priority")
    world.add([5] * 12, max_tokens=17, priority=1)
    world.add([6] * 12, max_tokens=17, priority=0)
    world.drain()
    ends = [update.request_id for update in world.updates if update.finish_reason]
    assert ends == ["request-2", "request-1"]


def test_a_newcomer_leaves_a_block_for_each_running_sequence(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=10, block_size=4, max_num_batched_tokens=64)
    world.add([1] * 12, max_tokens=2)
    world.add([2] * 12, max_tokens=2)
    world.add([3] * 12, max_tokens=2)  # Nine blocks of ten, but two must stay free.
    world.step()
    stats = world.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    world.drain()
    assert stats.num_preemptions == 0


def test_many_that_hardly_fit_all_finish(make_world: MakeWorld) -> None:
    world = make_world(num_blocks=12, block_size=4, max_num_batched_tokens=16)
    for i in range(30):
        world.add([i % 3] * (i % 17 + 1), max_tokens=25)
    world.drain(max_steps=30 * 42)
    assert all(world.finish_reason(f"request-{i + 1}") == "length" for i in range(30))


# ---- Policies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abc"), ("priority", "bca")])
def test_the_policy_orders_the_waiting_queue(
    make_world: MakeWorld, policy: str, order: str
) -> None:
    world = make_world(policy=policy, max_num_seqs=1)
    for name, priority in (("a", 5), ("b", -5), ("c", 0)):
        world.add([1, 2], name=name, priority=priority, max_tokens=2)
    world.drain()
    assert "".join(u.request_id for u in world.updates if u.finish_reason) == order

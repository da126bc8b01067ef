"""EngineCore over a fake executor: the loop, refusals, a step that breaks."""

from __future__ import annotations

import logging
from concurrent.futures import Future

import msgspec
import pytest

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore, log_prefix, warm_up
from octavo.errors import ContextLengthError, EngineDeadError, KernelError, ModelFileError
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    Capacity,
    EngineRequest,
    KVPool,
    ModelOutput,
    PrefixReport,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
)

CAPACITY = Capacity(
    model="m", architecture="A", num_parameters=1, max_model_len=64,
    kv_pool=KVPool(num_blocks=8, block_size=16, num_bytes=1),
    weights_bytes=1, vocab_size=100, backend="fake",
)  # fmt: skip
CONFIG = EngineConfig(model="m", served_name="m", memory_bytes=1, num_threads=1)


class FakeExecutor:
    """Samples token 5 for each row, or fails."""

    depth = 1

    def __init__(self, token: int = 5) -> None:
        self.plans: list[SchedulerOutput] = []
        self.error: Exception | None = None
        self.token = token
        self.is_closed = False

    def start(self) -> Capacity:
        return CAPACITY

    def submit(self, plan: SchedulerOutput) -> Future[ModelOutput]:
        self.plans.append(plan)
        future: Future[ModelOutput] = Future()
        if self.error is not None:
            future.set_exception(self.error)
        else:
            rows = [s.row for s in plan.scheduled if s.is_sampling]
            sampled = tuple(SampledTokens(row, (self.token,)) for row in rows)
            future.set_result(ModelOutput(sampled=sampled))
        return future

    def close(self) -> None:
        self.is_closed = True


def make_core() -> tuple[EngineCore, FakeExecutor]:
    executor = FakeExecutor()
    ticks = iter(range(1000))
    scheduler = Scheduler(CONFIG, CAPACITY, frozenset({99}))
    return EngineCore(executor, scheduler, CAPACITY, lambda: float(next(ticks))), executor


def request(name: str, **params: object) -> EngineRequest:
    settings = {"max_tokens": 2, "seed": 0, **params}
    return EngineRequest(
        request_id=name,
        prompt_ids=[1, 2, 3],
        params=SamplingParams(**settings),  # type: ignore[arg-type]
    )


def test_steps_until_there_is_no_work() -> None:
    core, executor = make_core()
    assert not core.has_work()
    core.add(request("a"))
    updates = []
    while core.has_work():
        updates += core.step()
    assert [(u.token_ids, u.finish_reason) for u in updates] == [((5,), None), ((5,), "length")]
    stats = core.stats()
    assert (stats.num_steps, stats.step_time_s) == (2, 2.0)
    assert stats.cache.num_blocks_used == 0
    assert len(executor.plans) == 2
    core.close()
    assert executor.is_closed


def test_the_next_step_is_on_its_way_before_the_last_one_is_taken() -> None:
    core, executor = make_core()
    executor.depth = 2
    core.add(request("a", max_tokens=3))
    assert core.step() == []
    assert [u.token_ids for u in core.step()] == [(5,)]
    assert [p.scheduled[0].num_computed_tokens for p in executor.plans] == [0, 3]
    assert [u.token_ids for u in core.step()] == [(5,)]
    assert [p.scheduled[0].num_computed_tokens for p in executor.plans] == [0, 3, 4]
    assert [(u.token_ids, u.finish_reason) for u in core.step()] == [((5,), "length")]
    assert not core.has_work()
    assert core.stats().cache.num_blocks_used == 0


def test_what_is_on_its_way_is_taken_before_the_engine_rests() -> None:
    core, executor = make_core()
    executor.depth = 2
    executor.token = 99  # It ends the text; a step more is on its way by then.
    core.add(request("a", max_tokens=9))
    updates = []
    while core.has_work():
        updates += core.step()
    assert [u.finish_reason for u in updates] == ["stop"]
    assert len(executor.plans) == 2
    stats = core.stats()
    assert (stats.num_running, stats.cache.num_blocks_used) == (0, 0)


def test_an_aborted_request_leaves_nothing() -> None:
    core, _ = make_core()
    core.add(request("a", max_tokens=50))
    core.step()
    assert core.stats().cache.num_blocks_used == 1
    assert [u.finish_reason for u in core.abort("a")] == ["abort"]
    assert core.abort("a") == core.abort("nobody") == []
    assert not core.has_work()
    assert core.stats().cache.num_blocks_used == 0


def test_a_report_of_the_prefix_cache_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "octavo.engine")
    report = PrefixReport(
        request_id="17", index=0, num_tokens=100, num_cached_tokens=32, block_size=16,
        miss="evicted",
    )  # fmt: skip
    log_prefix(report)
    log_prefix(msgspec.structs.replace(report, num_cached_tokens=96, miss=None))
    assert caplog.messages == [
        "request 17, sequence 0: 32 of 100 tokens cached; block 2 missed: evicted",
        "request 17, sequence 0: 96 of 100 tokens cached; all that could be",
    ]


def test_a_refused_request_changes_nothing() -> None:
    core, _ = make_core()
    core.add(request("a"))
    core.abort("a")
    long = EngineRequest(request_id="b", prompt_ids=[1] * 64, params=SamplingParams(seed=0))
    with pytest.raises(ContextLengthError):
        core.add(long)
    assert not core.has_work()


def test_the_error_of_a_step_comes_out() -> None:
    core, executor = make_core()
    core.add(request("a"))
    executor.error = KernelError("broken")
    with pytest.raises(KernelError, match="broken"):
        core.step()
    executor.error = None
    with pytest.raises(EngineDeadError, match="a step has failed"):
        core.step()


def test_who_needs_the_last_token_waits_for_it_once_a_step() -> None:
    core, executor = make_core()
    executor.depth = 2
    core.add(request("penalized", max_tokens=20, repetition_penalty=1.1))
    core.add(request("free", max_tokens=20))
    tokens = {"penalized": 0, "free": 0}
    for _ in range(8):
        for update in core.step():
            tokens[update.request_id] += len(update.token_ids)
    assert tokens == {"penalized": 7, "free": 7}
    assert len(executor.plans) == 8


def test_the_warm_up_leaves_no_row() -> None:
    executor = FakeExecutor()
    warm_up(executor)
    assert [s.num_new_tokens for s in executor.plans[0].scheduled] == [1]
    assert executor.plans[-1].finished_rows == (0,)


def test_weights_that_compute_nonsense_are_found_before_any_request() -> None:
    with pytest.raises(ModelFileError, match="not finite"):
        warm_up(FakeExecutor(token=-1))

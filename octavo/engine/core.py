"""EngineCore: a scheduler and an executor, and the loop that joins them. Knows ids, no text."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from octavo.config import EngineConfig
from octavo.errors import EngineDeadError, ModelFileError
from octavo.runner.executor import InProcessExecutor
from octavo.scheduler.scheduler import Scheduler
from octavo.tokenizer.eos import eos_token_ids
from octavo.types import (
    Capacity,
    EngineRequest,
    EngineStats,
    ModelOutput,
    NewSequence,
    PrefixReport,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
    TokenUpdate,
)

PhaseProgress = Callable[[str, float], None]
"""Called with the name of the phase of loading and the fraction of it that is done."""

_log = logging.getLogger("octavo.engine")


class PendingStep(Protocol):
    """A step on its way."""

    def result(self) -> ModelOutput:
        """Wait for it."""
        ...


class Executor(Protocol):
    """Where steps are computed.

    Attributes:
        depth: how many may be on their way at a time.
    """

    depth: int

    def start(self) -> Capacity:
        """Load the model; raises ConfigError."""
        ...

    def submit(self, plan: SchedulerOutput) -> PendingStep:
        """Begin a step; results are taken in order."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class EngineCore:
    """An engine in the caller's thread: add requests, call `step` while `has_work`.

    A step that raises has broken the engine: close it.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        capacity: Capacity,
        clock: Callable[[], float],
    ) -> None:
        """Join a started executor with a scheduler of its capacity; `load` does both."""
        self._executor = executor
        self._scheduler = scheduler
        self.capacity = capacity
        self._clock = clock
        self._in_flight: deque[PendingStep] = deque()
        self._num_steps = 0
        self._step_time_s = 0.0
        self._is_broken = False

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        *,
        progress: PhaseProgress = lambda phase, fraction: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> EngineCore:
        """Load a model, allocate its KV pool and decode one token.

        Raises:
            ConfigError: the model cannot be loaded as asked.
        """
        find_eos = functools.cache(lambda: eos_token_ids(config.model))
        executor = InProcessExecutor(config, find_eos, progress)
        try:
            capacity = executor.start()
            progress("warm-up", 0.0)
            warm_up(executor)
        except BaseException:
            executor.close()
            raise
        # Asked once: a scheduler that explains misses remembers what it lost from the beginning.
        on_admitted = log_prefix if _log.isEnabledFor(logging.DEBUG) else None
        scheduler = Scheduler(config, capacity, find_eos(), executor.tier, on_admitted)
        return cls(executor, scheduler, capacity, clock)

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raises a RequestError if it could never run or the queue is full."""
        self._scheduler.add(request, self._clock())

    def abort(self, request_id: str, index: int | None = None) -> list[TokenUpdate]:
        """End a request, or one sequence of it; return the last update of each that ends.

        A request that is unknown, or has ended, is no fault.
        """
        return self._scheduler.abort(request_id, index)

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes, pinned ones too; return how many blocks they had."""
        return self._scheduler.reset_prefix_cache()

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self._scheduler.has_work() or bool(self._in_flight)

    def step(self) -> list[TokenUpdate]:
        """Compute one step and return what it added to each sequence.

        Where steps are computed elsewhere, the next one is on its way before the result of the last
        one is taken; the first call then returns nothing. Who needs that result to go on, for
        instance to penalize its tokens, has all wait for it: half as many steps are worse.

        Raises:
            EngineDeadError: an earlier step has raised.
        """
        if self._is_broken:
            raise EngineDeadError("a step has failed: this engine computes nothing any more")
        self._is_broken = True  # What breaks off here leaves scheduler and executor at odds.
        updates = self._advance()
        self._is_broken = False
        return updates

    def _advance(self) -> list[TokenUpdate]:
        began = self._clock()
        updates = self._take() if self._scheduler.awaits_result() else []
        plan = self._scheduler.schedule(now=began)
        if plan.scheduled:
            self._in_flight.append(self._executor.submit(plan))
        has_room = len(self._in_flight) < self._executor.depth
        if self._in_flight and not (plan.scheduled and has_room):
            updates += self._take()
        self._step_time_s += self._clock() - began
        return updates

    def _take(self) -> list[TokenUpdate]:
        """Wait for the first step on its way."""
        self._num_steps += 1
        return self._scheduler.update(self._in_flight.popleft().result())

    def stats(self) -> EngineStats:
        """A snapshot of gauges and counters."""
        return msgspec.structs.replace(
            self._scheduler.stats(), num_steps=self._num_steps, step_time_s=self._step_time_s
        )

    def close(self) -> None:
        """Free the model; idempotent."""
        self._executor.close()


def log_prefix(report: PrefixReport) -> None:
    """Say what the prefix cache did for a sequence, and why not more."""
    block = report.num_cached_tokens // report.block_size
    miss = f"block {block} missed: {report.miss}" if report.miss else "all that could be"
    _log.debug(
        "request %s, sequence %d: %d of %d tokens cached; %s",
        report.request_id,
        report.index,
        report.num_cached_tokens,
        report.num_tokens,
        miss,
    )


def warm_up(executor: Executor) -> None:
    """Decode one token outside of any request: the proof that the model runs.

    It writes to block 0, which no sequence owns yet, and leaves no row behind.
    """
    row = NewSequence(
        row=0,
        index=0,
        token_ids=[0],
        num_prompt_tokens=1,
        params=SamplingParams(temperature=0.0, max_tokens=1, seed=0),
    )
    plan = SchedulerOutput(
        new_sequences=(row,), scheduled=(ScheduledSequence(0, 0, 1, (0,), True),)
    )
    output = executor.submit(plan).result()
    executor.submit(SchedulerOutput(finished_rows=(0,))).result()
    if output.sampled[0].token_ids[0] < 0:
        raise ModelFileError(
            "the first logits are not finite: the weights are damaged; fetch the model again"
        )

"""The real scheduler at the paper's scale, with an executor that answers at once in simulated time.

A step is planned by `Scheduler.schedule`, lasts as long as the cost model says, and returns a token
for each sequence that wants one; requests arrive meanwhile and are added before the next plan.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import policies
from beams import next_tokens
from cost import CONTIGUOUS_KERNEL, NO_OVERHEAD, PAGED_KERNEL, PYTHON, Model, Overhead, StepCost
from policies import BatchCache, ReservingCache
from workload import MAX_LENGTH, Job

from octavo.config import EngineConfig
from octavo.kv_cache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    Capacity,
    EngineRequest,
    KVPool,
    ModelOutput,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
    TokenUpdate,
)

MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2560
WARM_UP = 0.1
"""The part of a trace that averages over time leave out."""
TOKEN = 7
"""What the model says where ids do not matter."""

Observer = Callable[[SchedulerOutput, Sequence[TokenUpdate]], None]


@dataclass(frozen=True)
class System:
    """A way to manage KV memory.

    Attributes:
        need: what it reserves; None: it pages.
        is_static: it runs one batch after the other, and an answer is ready when its batch is.
    """

    name: str
    need: policies.Need | None = None
    is_static: bool = False
    use_prefix_cache: bool = False
    block_size: int = 16
    overhead: Overhead = PYTHON

    def make_cache(self, model: Model) -> KVCacheManager | ReservingCache:
        """Its KV manager, with everything free."""
        if self.need is None:
            num_blocks = model.num_slots // self.block_size
            return KVCacheManager(num_blocks, self.block_size, self.use_prefix_cache)
        if self.is_static:
            return BatchCache(model.num_slots, self.need)
        return ReservingCache(model.num_slots, self.need)


OCTAVO = System("Octavo")
OCTAVO_CACHED = System("Octavo, prefix cache", use_prefix_cache=True)
ORCA_ORACLE = System("Orca (Oracle)", policies.oracle)
ORCA_POW2 = System("Orca (Pow2)", policies.pow2)
ORCA_MAX = System("Orca (Max)", policies.maximum)
ORCA_CHAT = System("Orca", policies.chat)
FASTER_TRANSFORMER = System(
    "FasterTransformer", policies.maximum, is_static=True, overhead=NO_OVERHEAD
)


@dataclass
class Memory:
    """Slots, integrated over the time of the window.

    Attributes:
        held: slots that hold a token.
        final: slots that the running sequences will have filled (baselines).
        wanted: slots that were asked for (baselines).
        taken: slots that are not free.
        unshared: slots of blocks that sequences would take if each had its own (several samples).
    """

    held: float = 0.0
    final: float = 0.0
    wanted: float = 0.0
    taken: float = 0.0
    unshared: float = 0.0


@dataclass
class Result:
    """What one run showed.

    Attributes:
        normalized_latency: mean over requests of seconds from arrival to the end, over its tokens.
        num_batched: mean number of sequences in a step of the window.
        memory: integrated over `window_s`.
        num_copies: blocks that were copied because others held them too.
        hit_rate: prompt tokens that the prefix cache served, over all.
        is_complete: False if it was ended early: the latency is a lower bound then.
    """

    normalized_latency: float = 0.0
    num_batched: float = 0.0
    window_s: float = 0.0
    memory: Memory = field(default_factory=Memory)
    num_steps: int = 0
    num_preemptions: int = 0
    num_copies: int = 0
    hit_rate: float = 0.0
    is_complete: bool = True


def make_scheduler(
    system: System, model: Model, cache: KVCacheManager | ReservingCache
) -> Scheduler:
    """The scheduler with the paper's settings.

    A static batch is computed whole in its first step, hence a budget that binds nobody: a quarter
    of it goes by rank, which is who came first.
    """
    budget = 4 * model.num_slots if system.is_static else MAX_NUM_BATCHED_TOKENS
    config = EngineConfig(
        model="none",
        served_name="none",
        memory_bytes=1,
        num_threads=1,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=budget,
        max_num_waiting=10**9,
        block_size=cache.block_size,
        use_prefix_cache=system.use_prefix_cache,
    )
    pool = KVPool(num_blocks=cache.num_blocks, block_size=cache.block_size, num_bytes=0)
    capacity = Capacity(
        model="none",
        architecture="none",
        num_parameters=0,
        max_model_len=MAX_LENGTH,
        kv_pool=pool,
        weights_bytes=0,
        vocab_size=50_272,
        backend="none",
    )
    return Scheduler(config, capacity, frozenset(), cache=cache)


class Simulation:
    """One system that serves one trace."""

    def __init__(self, system: System, model: Model, jobs: list[Job]) -> None:
        """Start at time 0, without requests.

        Args:
            system: manages the memory.
            model: gives the size of the pool and the costs.
            jobs: in the order of their arrival.
        """
        self._system, self._jobs = system, jobs
        kernel = PAGED_KERNEL if system.need is None else CONTIGUOUS_KERNEL
        self._cost = StepCost(model, kernel, system.overhead)
        self.cache = system.make_cache(model)
        self.scheduler = make_scheduler(system, model, self.cache)
        self._now = 0.0
        self._num_added = 0
        self._num_held = 0  # Slots that hold a token, over all rows.
        self._held = [0] * MAX_NUM_SEQS
        self._tokens = [SampledTokens(row, (TOKEN,)) for row in range(MAX_NUM_SEQS)]
        self._is_counting = jobs[0].tokens is not None  # A row's ids count upwards.
        self._first = [0] * MAX_NUM_SEQS  # The id that a row would have at its first position.
        self._num_unfinished = [job.width for job in jobs]
        self._is_group = jobs[0].width > 1
        self._beam_rows: dict[int, int] = {}  # How many candidates each wants.
        self._rng = random.Random(1)
        self._ended: list[int] = []  # In a static batch that still runs.
        self._latency = 0.0
        self._result = Result()

    def run(
        self,
        give_up: float | None = None,
        is_window: bool = False,
        observe: Observer | None = None,
    ) -> Result:
        """Serve all requests.

        Args:
            give_up: end as soon as the normalized latency cannot stay below this.
            is_window: end with the last arrival: only averages over time are wanted.
            observe: is shown every step.
        """
        jobs, scheduler, result = self._jobs, self.scheduler, self._result
        window = (WARM_UP * jobs[-1].arrival, jobs[-1].arrival)
        num_ended = num_window_steps = num_window_seqs = 0
        while num_ended < len(jobs):
            self._add_arrivals()
            plan = scheduler.schedule(self._now)
            if not plan.scheduled:
                assert self._num_added < len(jobs), "requests wait that nothing can admit"
                self._now = jobs[self._num_added].arrival
                continue
            output, seconds = self._compute(plan)
            if window[0] <= self._now < window[1]:
                num_window_steps += 1
                num_window_seqs += len(plan.scheduled)
                self._count_memory(seconds)
            self._now += seconds
            result.num_steps += 1
            updates = scheduler.update(output)
            num_ended += self._take(updates)
            if observe is not None:
                observe(plan, updates)
            is_over = is_window and self._now >= window[1]
            if is_over or (give_up is not None and self._latency > give_up * len(jobs)):
                result.is_complete = False
                break
        stats = scheduler.stats()
        result.normalized_latency = self._latency / len(jobs)
        result.num_batched = num_window_seqs / max(1, num_window_steps)
        result.num_preemptions = stats.num_preemptions
        result.hit_rate = stats.cache.num_hits / max(1, stats.cache.num_queries)
        if result.is_complete and not jobs[0].is_beam_search:
            assert stats.generation_tokens == sum(job.num_output * job.width for job in jobs)
        return result

    def _add_arrivals(self) -> None:
        """Add who has arrived by now."""
        jobs, cache = self._jobs, self.cache
        while self._num_added < len(jobs) and jobs[self._num_added].arrival <= self._now:
            self._add(self._num_added, jobs[self._num_added])
            self._num_added += 1
        if isinstance(cache, ReservingCache):
            cache.begin_step()

    def _add(self, at: int, job: Job) -> None:
        """Add a job; to a system that shares nothing each of its samples is a request."""
        cache, names = self.cache, [str(at)]
        params = SamplingParams(max_tokens=job.num_output, ignore_eos=True)
        if isinstance(cache, ReservingCache):
            cache.expect(job.num_prompt, job.num_output)
            names = [f"{at}.{index}" for index in range(job.width)]
        elif job.is_beam_search:
            params = msgspec.structs.replace(
                params, n=job.width, use_beam_search=True, temperature=0.0
            )
        elif job.width > 1:
            params = msgspec.structs.replace(params, n=job.width)
        prompt_ids = job.prompt_ids()
        for name in names:
            request = EngineRequest(request_id=name, prompt_ids=prompt_ids, params=params)
            self.scheduler.add(request, self._now)

    def _compute(self, plan: SchedulerOutput) -> tuple[ModelOutput, float]:
        """The answer to a plan and the time that it takes."""
        held, tokens = self._held, self._tokens
        for row in plan.finished_rows:
            self._num_held -= held[row]
            held[row] = 0
        for new in plan.new_sequences:
            self._first[new.row] = new.token_ids[-1] - len(new.token_ids) + 1
        if self._is_group:
            self._follow_forks(plan)
        sampled = []
        num_tokens = pairs = context = 0
        for entry in plan.scheduled:
            row, num_new = entry.row, entry.num_new_tokens
            end = entry.num_computed_tokens + num_new
            num_tokens += num_new
            context += end
            pairs += num_new * (entry.num_computed_tokens + end)
            self._num_held += end - held[row]
            held[row] = end
            if entry.is_sampling:
                sampled.append(tokens[row])
        if self._beam_rows:
            sampled = [self._search(token.row) for token in sampled]
        if self._is_counting:
            sampled = [SampledTokens(t.row, (self._first[t.row] + held[t.row],)) for t in sampled]
        seconds = self._cost.seconds(len(plan.scheduled), num_tokens, context, pairs / 2)
        return ModelOutput(sampled=tuple(sampled)), seconds

    def _follow_forks(self, plan: SchedulerOutput) -> None:
        """Note which rows search, and how many blocks are copied."""
        for row in plan.finished_rows:
            self._beam_rows.pop(row, None)
        for fork in plan.forks:
            self._beam_rows[fork.row] = self._beam_rows[fork.parent_row]
        for new in plan.new_sequences:
            if new.params.use_beam_search:
                assert new.params.logprobs is not None
                self._beam_rows[new.row] = new.params.logprobs
        self._result.num_copies += len(plan.copies)

    def _search(self, row: int) -> SampledTokens:
        """The candidates of a beam."""
        best = next_tokens(self._rng, self._held[row], self._beam_rows[row])
        return SampledTokens(row, (best.token_id,), (best,))

    def _take(self, updates: Sequence[TokenUpdate]) -> int:
        """Note who has ended; return how many."""
        ended = []
        for update in updates:
            if update.finish_reason is not None:
                at = int(update.request_id.partition(".")[0])
                self._num_unfinished[at] -= 1
                if self._num_unfinished[at] == 0:
                    ended.append(at)
        if self._system.is_static:
            self._ended += ended
            if self.cache.num_referenced_blocks:
                return 0
            ended, self._ended = self._ended, []
        for at in ended:
            job = self._jobs[at]
            self._latency += (self._now - job.arrival) / job.num_output
        return len(ended)

    def _count_memory(self, seconds: float) -> None:
        """Add a step to the integrals."""
        memory, cache = self._result.memory, self.cache
        self._result.window_s += seconds
        memory.held += self._num_held * seconds
        memory.taken += cache.num_referenced_blocks * cache.block_size * seconds
        if self._is_group:
            size = cache.block_size
            memory.unshared += sum([-(-held // size) for held in self._held]) * size * seconds
        if isinstance(cache, ReservingCache):
            memory.final += cache.num_final * seconds
            memory.wanted += cache.num_wanted * seconds


def simulate(system: System, model: Model, jobs: list[Job], give_up: float | None = None) -> Result:
    """Serve a trace with a system."""
    return Simulation(system, model, jobs).run(give_up)

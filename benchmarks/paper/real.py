"""Paging against contiguous reservation for real: the default model on the CPU backend.

    python benchmarks/paper/real.py [MODEL] [--rates 1,2,...] [--requests 50]

Both systems are our engine with a KV pool of four reservations of the greatest length, here 512
tokens; they differ by who hands out blocks alone. Reserving gives each request, when it is
admitted, a contiguous range for the greatest length, so at most four run; paging gives blocks as
tokens come. Lengths are ShareGPT's (workload.py), a quarter as long, so that a run takes minutes;
arrivals are Poisson, in real time. Normalized latency (mean of a request's latency over its
output's length) is measured at rising rates, of both systems in turn; what is compared is the rate
at which it passes ten times the latency of a request alone.

Prints a table and exits with 1 if paging serves less than twice the rate.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import msgspec
from sweep import Point, rate_at
from workload import Job, poisson_trace, synthetic

from octavo.cli.options import add_engine_options, add_model, engine_config
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.kv_cache.manager import NO_PREFIX, BlockTable, KVCacheManager, PrefixMatch
from octavo.runner.executor import InProcessExecutor
from octavo.scheduler.scheduler import Scheduler
from octavo.types import Capacity, EngineRequest, SamplingParams

GREATEST_LENGTH = 512
NUM_RESERVATIONS = 4
SHRINK = 4
"""Lengths are divided by it."""
LATENCY_FACTOR = 10.0
TARGET = 2.0


class ReservedBlocks(KVCacheManager):
    """Contiguous ranges of blocks, each for a sequence of the greatest length."""

    def __init__(self, capacity: Capacity) -> None:
        """Divide the pool into ranges."""
        pool = capacity.kv_pool
        super().__init__(pool.num_blocks, pool.block_size, use_prefix_cache=False)
        size = -(-capacity.max_model_len // pool.block_size)
        starts = range(0, pool.num_blocks - size + 1, size)
        self._ranges = [tuple(range(start, start + size)) for start in starts]
        self._num_taken = 0

    @property
    def num_referenced_blocks(self) -> int:
        """Blocks of the ranges that are taken."""
        return self._num_taken

    def allocate(
        self,
        table: BlockTable,
        num_tokens: int,
        prefix: PrefixMatch = NO_PREFIX,
        num_reserved_blocks: int = 0,
    ) -> tuple[int, ...] | None:
        """Reserve a range for a sequence that is admitted."""
        assert not table.block_ids, "a running sequence never lacks a block"
        if not self._ranges:
            return None
        table.block_ids = [*self._ranges.pop()]
        self._num_taken += len(table.block_ids)
        return tuple(table.block_ids)

    def free(self, table: BlockTable) -> None:
        """Give the range back."""
        if table.block_ids:
            self._ranges.append(tuple(table.block_ids))
            self._num_taken -= len(table.block_ids)
            table.block_ids = []


@dataclass
class Run:
    """What one system did at one rate."""

    latencies: list[float] = field(default_factory=list)
    """Seconds a token, of each request."""
    running: list[int] = field(default_factory=list)
    """Requests that ran, at each step."""
    num_tokens: int = 0
    wall_s: float = 0.0


def load(config: EngineConfig) -> tuple[InProcessExecutor, Capacity]:
    """The model, once for all runs."""
    executor = InProcessExecutor(config, frozenset, lambda phase, fraction: None)
    return executor, executor.start()


def serve(core: EngineCore, jobs: list[Job], seed: int) -> Run:
    """Let the jobs arrive when they arrive."""
    dice = random.Random(seed)
    vocab_size = core.capacity.vocab_size
    waiting, arrived, run = jobs[::-1], dict[str, Job](), Run()
    began = time.monotonic()
    while waiting or arrived:
        now = time.monotonic() - began
        while waiting and waiting[-1].arrival <= now:
            job = waiting.pop()
            name = str(len(jobs) - len(waiting))
            prompt = [dice.randrange(vocab_size) for _ in range(job.num_prompt)]
            params = SamplingParams(
                temperature=0, ignore_eos=True, seed=0, max_tokens=job.num_output
            )
            core.add(EngineRequest(request_id=name, prompt_ids=prompt, params=params))
            arrived[name] = job
        if not core.has_work():
            time.sleep(max(0.0, waiting[-1].arrival - now))
            continue
        updates = core.step()
        run.running.append(core.stats().num_running)
        now = time.monotonic() - began
        for update in updates:
            if update.finish_reason is not None:
                job = arrived.pop(update.request_id)
                run.latencies.append((now - job.arrival) / job.num_output)
                run.num_tokens += job.num_output
    run.wall_s = time.monotonic() - began
    return run


def trace(rate: float, count: int) -> list[Job]:
    """The first `count` requests at a rate; lengths are the same at every rate."""
    jobs = []
    for job in poisson_trace(synthetic()["ShareGPT"], rate, 2 * count / rate + 60)[:count]:
        num_prompt = max(1, job.num_prompt // SHRINK)
        num_output = min(max(1, job.num_output // SHRINK), GREATEST_LENGTH - num_prompt)
        jobs.append(Job(job.arrival, num_prompt, num_output))
    return jobs


def curves(
    systems: dict[str, Callable[[], EngineCore]], rates: list[float], count: int, most: float
) -> dict[str, list[Point]]:
    """Normalized latency at rising rates, side by side, of each until it is past `most`."""
    points: dict[str, list[Point]] = {name: [] for name in systems}
    for rate in rates:
        for name, make_core in systems.items():
            if points[name] and points[name][-1][1] > most:
                continue
            run = serve(make_core(), trace(rate, count), seed=1)
            latency = fmean(run.latencies)
            points[name].append((rate, latency))
            print(
                f"{rate:6.2f}/s  {name:<10} {latency * 1e3:8.1f} ms a token  "
                f"{run.num_tokens / run.wall_s:6.1f} tok/s  {fmean(run.running):5.1f} running",
                flush=True,
            )
    for name, of_system in points.items():
        if of_system[-1][1] <= most:
            raise SystemExit(f"{name} never passes {most * 1e3:.0f} ms: give higher --rates")
    return points


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model(parser)
    parser.add_argument("--rates", default="1,2,2.5,3,4,5,6.5,8,10,13,16,20")
    parser.add_argument("--requests", type=int, default=50)
    add_engine_options(parser)
    options = parser.parse_args()
    options.max_model_len = GREATEST_LENGTH
    config = msgspec.structs.replace(engine_config(options), use_prefix_cache=False)
    probe, capacity = load(config)
    block_bytes = capacity.kv_pool.num_bytes // capacity.kv_pool.num_blocks
    probe.close()
    num_blocks = NUM_RESERVATIONS * -(-GREATEST_LENGTH // config.block_size)
    config = msgspec.structs.replace(config, memory_bytes=num_blocks * block_bytes)
    executor, capacity = load(config)
    assert capacity.kv_pool.num_blocks == num_blocks

    def core(cache: KVCacheManager | None) -> EngineCore:
        scheduler = Scheduler(config, capacity, frozenset(), cache=cache)
        return EngineCore(executor, scheduler, capacity, time.monotonic)

    alone = fmean(serve(core(None), [Job(0.0, 40, 85)], seed=2).latencies)
    print(f"{capacity.backend}, {num_blocks} blocks; a request alone: {alone * 1e3:.1f} ms a token")
    rates = [float(rate) for rate in options.rates.split(",")]
    systems: dict[str, Callable[[], EngineCore]] = {
        "reserving": lambda: core(ReservedBlocks(capacity)),
        "paging": lambda: core(None),
    }
    limit = LATENCY_FACTOR * alone
    points = curves(systems, rates, options.requests, limit)
    reached = {name: rate_at(of_system, limit) for name, of_system in points.items()}
    executor.close()
    ratio = reached["paging"] / reached["reserving"]
    print(
        f"at {limit * 1e3:.0f} ms a token: reserving {reached['reserving']:.2f}/s, "
        f"paging {reached['paging']:.2f}/s: {ratio:.2f}x (target {TARGET}x)"
    )
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())

"""What scheduling costs: the time of `schedule` + `update`, and the memory of a large pool.

    python benchmarks/scheduler.py [--requests 256] [--prompt 2000] [--output 500] [--json]
    python benchmarks/scheduler.py --fairness | --reserve

The executor is left out: it answers every plan with tokens at once. "decode" is a step in which all
requests are running and each gets one token; "first" are steps that compute prompts too; "waiting"
is decoding with a full waiting queue behind it. Times are CPU time, so that a busy machine does not
show; the wall clock's p50 stands beside them. Must: p99 of a decode step ≤ 2 ms; aim: 0.5 ms.

`--fairness` counts the steps until the first token of short and long prompts that arrive together,
for several ways to share a step (docs/decisions/040-fair-chunking.md); `--reserve` counts steps and
recomputed tokens in a pool that is too small (docs/decisions/042-admission-reserve.md).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import tracemalloc
from array import array

from octavo.config import EngineConfig
from octavo.kv_cache.manager import KVCacheManager
from octavo.scheduler import policy
from octavo.scheduler import scheduler as scheduler_module
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    Capacity,
    EngineRequest,
    KVPool,
    ModelOutput,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
)

BLOCK_SIZE = 16


def make_scheduler(
    num_rows: int, max_model_len: int, budget: int, num_blocks: int = 0
) -> Scheduler:
    """A scheduler whose pool holds a sequence of full length in each row, or has `num_blocks`."""
    num_blocks = num_blocks or num_rows * (max_model_len // BLOCK_SIZE + 3)
    config = EngineConfig(
        model="none",
        served_name="none",
        memory_bytes=1,
        num_threads=1,
        max_num_seqs=num_rows,
        max_num_batched_tokens=budget,
        max_num_waiting=10**6,
        block_size=BLOCK_SIZE,
    )
    capacity = Capacity(
        model="none",
        architecture="none",
        num_parameters=0,
        max_model_len=max_model_len + 1,
        kv_pool=KVPool(num_blocks=num_blocks, block_size=BLOCK_SIZE, num_bytes=0),
        weights_bytes=0,
        vocab_size=50_000,
        backend="none",
    )
    return Scheduler(config, capacity, frozenset({2}))


def answer(plan: SchedulerOutput, step: int) -> ModelOutput:
    """A token for every row that wants one."""
    return ModelOutput(
        sampled=tuple(
            SampledTokens(entry.row, (1000 + (step * 31 + entry.row) % 40_000,))
            for entry in plan.scheduled
            if entry.is_sampling
        )
    )


def add_requests(scheduler: Scheduler, name: str, count: int, prompt: int, output: int) -> None:
    """Add requests with prompts that share nothing."""
    params = SamplingParams(max_tokens=output, ignore_eos=True, seed=1)
    for i in range(count):
        prompt_ids = [1000 + (i * 7919 + j) % 40_000 for j in range(prompt)]
        scheduler.add(
            EngineRequest(request_id=f"{name}-{i}", prompt_ids=prompt_ids, params=params), 0.0
        )


def measure_steps(
    num_requests: int, prompt: int, output: int, num_waiting: int
) -> dict[str, list[float]]:
    """Seconds of each step, by kind; "… wall" by the clock on the wall, else CPU time."""
    scheduler = make_scheduler(num_requests, prompt + output, budget=8192)
    add_requests(scheduler, "running", num_requests, prompt, output)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("first", "first wall", "decode", "decode wall")
    }
    step = 0
    while scheduler.has_work():
        began_cpu, began = time.thread_time(), time.perf_counter()
        plan = scheduler.schedule(began)
        planned_cpu, planned = time.thread_time(), time.perf_counter()
        sampled = answer(plan, step)
        resumed_cpu, resumed = time.thread_time(), time.perf_counter()
        scheduler.update(sampled)
        took_cpu = time.thread_time() - resumed_cpu + planned_cpu - began_cpu
        took = time.perf_counter() - resumed + planned - began
        is_decode = len(plan.scheduled) == plan.num_tokens == num_requests
        kind = "decode" if is_decode else "first"
        seconds[kind].append(took_cpu)
        seconds[f"{kind} wall"].append(took)
        step += 1
        if is_decode and num_waiting:
            add_requests(scheduler, "waiting", num_waiting, prompt, output)
            num_waiting = 0
        if len(seconds["decode"]) == output - 100:
            break
    return seconds


def percentiles(seconds: dict[str, list[float]], kind: str) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(seconds[kind], n=100)
    return {
        "steps": len(seconds[kind]),
        "p50_ms": round(cuts[49] * 1e3, 3),
        "p99_ms": round(cuts[98] * 1e3, 3),
        "max_ms": round(max(seconds[kind]) * 1e3, 3),
        "wall_p50_ms": round(statistics.median(seconds[f"{kind} wall"]) * 1e3, 3),
    }


def measure_memory(num_blocks: int) -> dict[str, float]:
    """Bytes that book-keeping takes for a pool, empty and with every block cached."""
    began = time.thread_time()
    KVCacheManager(num_blocks, BLOCK_SIZE)
    built_s = time.thread_time() - began
    tracemalloc.start()
    manager = KVCacheManager(num_blocks, BLOCK_SIZE)
    empty = tracemalloc.get_traced_memory()[0]
    for start in range(0, num_blocks, 1000):
        token_ids = array("i", [start]) * (1000 * BLOCK_SIZE)
        table = manager.new_table()
        manager.allocate(table, len(token_ids))
        manager.commit(table, token_ids, len(token_ids))
        manager.free(table)
    del table, token_ids
    full = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {
        "num_blocks": num_blocks,
        "build_s": round(built_s, 3),
        "empty_mb": round(empty / 1e6, 1),
        "all_cached_mb": round(full / 1e6, 1),
    }


def measure_fairness(guaranteed_part: int, load: float) -> dict[str, list[int]]:
    """Steps to the first token, [p50, p99], of short and long prompts at a part of the capacity."""
    policy.GUARANTEED_PART = guaranteed_part
    draw, budget, output, num_steps = random.Random(1), 256, 100, 4000
    scheduler = make_scheduler(64, 10_000 + output, budget)
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    arrivals_a_step = load * budget / (0.95 * 175 + 0.05 * 7500 + output)
    waits: dict[str, list[int]] = {"short": [], "long": []}
    arrived: dict[str, int] = {}
    step, next_arrival = 0, draw.expovariate(arrivals_a_step)
    while step < num_steps or scheduler.has_work():
        while next_arrival <= step < num_steps:
            is_long = draw.random() < 0.05
            length = draw.randint(5000, 10_000) if is_long else draw.randint(50, 300)
            request_id = f"{'long' if is_long else 'short'}-{next_arrival}"
            prompt_ids = [draw.randint(3, 90_000) for _ in range(length)]
            request = EngineRequest(request_id=request_id, prompt_ids=prompt_ids, params=params)
            scheduler.add(request, step)
            arrived[request_id] = step
            next_arrival += draw.expovariate(arrivals_a_step)
        plan = scheduler.schedule(step)
        step += 1
        for update in scheduler.update(answer(plan, step)):
            if update.request_id in arrived:
                kind = update.request_id.split("-")[0]
                waits[kind].append(step - arrived.pop(update.request_id))
    return {
        kind: [
            round(statistics.quantiles(values, n=100, method="inclusive")[at]) for at in (49, 98)
        ]
        for kind, values in waits.items()
    }


def print_fairness() -> None:
    """A table of loads and shares."""
    parts = {"by rank": 1, "shortest": 10**9, "an eighth": 8, "a quarter": 4, "half": 2}
    for load in (0.7, 0.95):
        for name, part in parts.items():
            print(f"load {load:.0%}  {name:10}", measure_fairness(part, load))


def measure_reserve(num_blocks: int, reserved_blocks: int) -> dict[str, int]:
    """What 400 requests at once take in a pool that holds about 43 (1,500 blocks) or 12 (400)."""
    scheduler_module.RESERVED_BLOCKS = reserved_blocks
    draw = random.Random(3)
    scheduler = make_scheduler(128, 1200, 256, num_blocks)
    for i in range(400):
        prompt_ids = [draw.randint(3, 90_000) for _ in range(draw.randint(50, 600))]
        params = SamplingParams(max_tokens=draw.randint(50, 500), ignore_eos=True)
        request = EngineRequest(request_id=str(i), prompt_ids=prompt_ids, params=params)
        scheduler.add(request, 0.0)
    num_steps = num_tokens = 0
    while scheduler.has_work():
        plan = scheduler.schedule(0.0)
        num_steps += 1
        num_tokens += plan.num_tokens
        scheduler.update(answer(plan, num_steps))
    num_preemptions = scheduler.stats().num_preemptions
    return {"steps": num_steps, "tokens": num_tokens, "preemptions": num_preemptions}


def print_reserve() -> None:
    """A table of pools and reserves."""
    for num_blocks in (1500, 400):
        for reserved_blocks in (0, 1, 2, 4):
            figures = measure_reserve(num_blocks, reserved_blocks)
            print(f"{num_blocks} blocks, {reserved_blocks} reserved a running sequence", figures)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--output", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fairness", action="store_true")
    parser.add_argument("--reserve", action="store_true")
    args = parser.parse_args()
    if args.reserve:
        print_reserve()
        return
    if args.fairness:
        print_fairness()
        return
    alone = measure_steps(args.requests, args.prompt, args.output, num_waiting=0)
    queued = measure_steps(args.requests, args.prompt, args.output, num_waiting=2000)
    report = {
        "decode": percentiles(alone, "decode"),
        "first": percentiles(alone, "first"),
        "waiting": percentiles(queued, "decode"),
        "memory": measure_memory(args.blocks),
    }
    if args.json:
        print(json.dumps(report))
        return
    for name, figures in report.items():
        print(f"{name:8}", "  ".join(f"{key} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()

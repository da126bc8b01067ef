"""Many requests through the engine in this process, without HTTP."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import msgspec

from octavo.cli.bench.workload import (
    Job,
    Timing,
    add_workload_options,
    make_jobs,
    summarize,
)
from octavo.cli.options import add_engine_options, add_model, engine_config
from octavo.cli.progress import ProgressLine
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError
from octavo.types import EngineRequest, SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model(parser)
    parser.add_argument(
        "--concurrency", type=int, default=64, help="requests at once (default: %(default)s)"
    )
    add_workload_options(parser, requests=192)
    add_engine_options(parser)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """A closed loop: as one request ends the next begins."""
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency must be at least 1, not {options.concurrency}")
    config = engine_config(options)
    with ProgressLine() as line:
        core = EngineCore.load(config, progress=line.fraction)
    try:
        capacity = core.capacity
        jobs = make_jobs(options, capacity.vocab_size)
        closed_loop(core, jobs[: min(4, len(jobs))], 4)
        began = time.perf_counter()
        timings = closed_loop(core, jobs, options.concurrency)
        wall_s = time.perf_counter() - began
    finally:
        core.close()
    figures = summarize(jobs, timings, wall_s)
    return {"concurrency": options.concurrency, "backend": capacity.backend, **figures}


def closed_loop(
    core: EngineCore,
    jobs: list[Job],
    concurrency: int,
    params: SamplingParams = GREEDY,
    after_step: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Run the jobs, at most `concurrency` at once, to their full length."""
    waiting = list(enumerate(jobs))[::-1]
    began: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    running = 0
    while waiting or running:
        while waiting and running < concurrency:
            number, job = waiting.pop()
            name = f"bench-{number}"
            began[name], times[name] = time.perf_counter(), []
            core.add(_request(name, job, params))
            running += params.n
        for update in core.step():
            now = time.perf_counter() - began[update.request_id]
            times[update.request_id].extend([now] * len(update.token_ids))
            running -= update.finish_reason is not None
        after_step()
    return [Timing(t) for t in times.values()]


def _request(name: str, job: Job, params: SamplingParams) -> EngineRequest:
    whole = msgspec.structs.replace(params, max_tokens=job.num_output_tokens)
    return EngineRequest(request_id=name, prompt_ids=job.prompt_ids, params=whole)

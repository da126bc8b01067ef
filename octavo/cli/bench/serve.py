"""Many clients against a running server (Octavo or another with /v1/completions), a closed loop."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import SplitResult

from octavo.cli.bench.client import get, parse_url, stream
from octavo.cli.bench.workload import (
    Job,
    Timing,
    add_workload_options,
    make_jobs,
    summarize,
)
from octavo.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    parser.add_argument(
        "--concurrency", type=int, default=16, help="requests at once (default: %(default)s)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="ids are drawn below (default: %(default)s)"
    )
    add_workload_options(parser, requests=64)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Send the jobs, `concurrency` at once. Times are taken at the client, a chunk a token."""
    url = parse_url(options.url)
    model = options.model or get(url, "/v1/models", options.api_key)["data"][0]["id"]
    jobs = make_jobs(options, options.vocab_size)
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency must be at least 1, not {options.concurrency}")
    began = time.perf_counter()
    with ThreadPoolExecutor(options.concurrency) as pool:
        timings = list(pool.map(lambda job: send(url, model, job, options.api_key), jobs))
    figures = summarize(jobs, timings, time.perf_counter() - began)
    return {"model": model, "concurrency": options.concurrency, **figures}


def send(url: SplitResult, model: str, job: Job, key: str | None) -> Timing:
    """One request, to its full length."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": job.prompt_ids,
        "max_tokens": job.num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    times = [now - began for now in stream(url, "/v1/completions", body, key)]
    if not times:
        raise ConfigError("the server sent no token")
    return Timing(times)

"""The workload of the benchmarks: seeded random prompts, and what is reported of the answers."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from octavo.errors import ConfigError

FIRST_ORDINARY_ID = 100
"""Ids below it are often special tokens."""


class Job(NamedTuple):
    """One request: what goes in and how much shall come out."""

    prompt_ids: list[int]
    num_output_tokens: int


class Timing(NamedTuple):
    """When the tokens of one request came, in seconds since it was sent."""

    token_times_s: list[float]


def add_workload_options(parser: argparse.ArgumentParser, requests: int) -> None:
    """Add lengths, count and seed."""
    parser.add_argument("--requests", type=int, default=requests, help="default: %(default)s")
    parser.add_argument(
        "--input-len", default="180-330", metavar="MIN-MAX", help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--output-len", default="90-166", metavar="MIN-MAX", help="tokens (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def parse_range(text: str, option: str) -> tuple[int, int]:
    """Read 180-330 or 256 as (least, most)."""
    low, _, high = text.partition("-")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise ConfigError(f"{option} must be a number or MIN-MAX, not {text!r}") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"{option} must grow from 1 up, not {text!r}")
    return bounds


def make_jobs(options: argparse.Namespace, vocab_size: int) -> list[Job]:
    """The jobs of a seed: the same for every engine and every run."""
    generator = random.Random(options.seed)
    inputs = parse_range(options.input_len, "--input-len")
    outputs = parse_range(options.output_len, "--output-len")
    first = min(FIRST_ORDINARY_ID, vocab_size // 2)
    return [
        Job(
            [generator.randrange(first, vocab_size) for _ in range(generator.randint(*inputs))],
            generator.randint(*outputs),
        )
        for _ in range(options.requests)
    ]


def summarize(jobs: Sequence[Job], timings: Sequence[Timing], wall_s: float) -> dict[str, object]:
    """Rates over the whole run; medians and 99th percentiles of the latencies."""
    first = [t.token_times_s[0] for t in timings]
    gaps = [
        b - a for t in timings for a, b in zip(t.token_times_s, t.token_times_s[1:], strict=False)
    ]
    whole = [t.token_times_s[-1] for t in timings]
    output = sum(len(t.token_times_s) for t in timings)
    prompt = sum(len(job.prompt_ids) for job in jobs)
    return {
        "requests": len(timings),
        "wall_s": wall_s,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "output_tokens_per_s": output / wall_s,
        "total_tokens_per_s": (output + prompt) / wall_s,
        "ttft_ms_p50": percentile(first, 50) * 1e3,
        "ttft_ms_p99": percentile(first, 99) * 1e3,
        "itl_ms_p50": percentile(gaps, 50) * 1e3,
        "itl_ms_p99": percentile(gaps, 99) * 1e3,
        "e2e_s_p50": percentile(whole, 50),
        "e2e_s_p99": percentile(whole, 99),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The given percentile; 0 of nothing."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]

"""What every byte of the KV pool is while many requests run: tokens, reserved, shared, cached."""

from __future__ import annotations

import argparse
from statistics import fmean

from octavo.cli.bench.throughput import closed_loop
from octavo.cli.bench.workload import add_workload_options, make_jobs
from octavo.cli.options import add_engine_options, add_model, engine_config
from octavo.cli.progress import ProgressLine
from octavo.engine.core import EngineCore
from octavo.engine.validation import validate_params
from octavo.errors import ConfigError
from octavo.types import CacheStats, SamplingParams


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model(parser)
    parser.add_argument(
        "--concurrency", type=int, default=64, help="sequences at once (default: %(default)s)"
    )
    parser.add_argument("--n", type=int, default=1, help="samples of each prompt")
    parser.add_argument("--beams", type=int, help="search with so many beams instead")
    add_workload_options(parser, requests=96)
    add_engine_options(parser)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The means over all steps."""
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency must be at least 1, not {options.concurrency}")
    params = SamplingParams(ignore_eos=True, seed=0, n=options.n)
    if options.beams is not None:
        params = SamplingParams(
            ignore_eos=True, temperature=0.0, best_of=options.beams, use_beam_search=True
        )
    validate_params(params)
    config = engine_config(options)
    with ProgressLine() as line:
        core = EngineCore.load(config, progress=line.fraction)
    samples: list[CacheStats] = []

    def note() -> None:
        cache = core.stats().cache
        if cache.num_blocks_used:
            samples.append(cache)

    try:
        pool = core.capacity.kv_pool
        jobs = make_jobs(options, core.capacity.vocab_size)
        closed_loop(core, jobs, options.concurrency, params, note)
        stats = core.stats()
    finally:
        core.close()
    return {
        "pool_bytes": pool.num_bytes,
        "block_size": pool.block_size,
        "steps": len(samples),
        "preemptions": stats.num_preemptions,
        "block_copies": stats.cache.use.num_copies,
        **_means(samples, pool.num_bytes // pool.num_blocks, pool.block_size),
    }


def _means(samples: list[CacheStats], block_bytes: int, block_size: int) -> dict[str, object]:
    """Bytes of the pool by what they are (they sum up to it), and the shares of the paper."""
    uses = [sample.use for sample in samples]
    used = fmean(sample.num_blocks_used for sample in samples)
    tokens = fmean(use.num_tokens for use in uses)
    cached = fmean(sample.num_blocks_cached for sample in samples)
    total = samples[0].num_blocks
    saved = fmean(use.num_saved_blocks for use in uses)
    token_bytes = block_bytes / block_size
    return {
        "tokens_bytes": round(tokens * token_bytes),
        "reserved_bytes": round((used * block_size - tokens) * token_bytes),
        "cached_bytes": round(cached * block_bytes),
        "free_bytes": round((total - used - cached) * block_bytes),
        "shared_bytes": round(fmean(use.num_shared_blocks for use in uses) * block_bytes),
        "saved_by_sharing_bytes": round(saved * block_bytes),
        "holding_tokens_ratio": tokens / (used * block_size),
        "saved_by_sharing_ratio": saved / (used + saved),
    }

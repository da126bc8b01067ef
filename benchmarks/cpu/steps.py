"""Steps of the CPU backend alone: prefill and decode, without scheduler or server.

    python benchmarks/cpu/steps.py MODEL.gguf [--threads 2] [--context 300] [--block-size 16 64]
        [--kv-dtype int8]

Prints tokens/s of a prompt chunk of 256 tokens, and of decode steps of 1, 16 and 64 sequences with
the given context; the best of several repetitions, and the median. The KV cache holds zeros: what
attention costs does not depend on what it reads. With one thread the clock is the thread's own, so
that other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

from octavo.backends.program import Program
from octavo.config import EngineConfig
from octavo.graph.batch import Batch, Bias, Filters, Noise, Penalties, SamplingRows
from octavo.runner import loading


def batch(starts: Sequence[int], counts: Sequence[int], block_size: int, width: int) -> Batch:
    """Sequence i holds starts[i] tokens and computes counts[i] more; its blocks are its own."""
    tables = np.arange(len(starts) * width, dtype=np.int32).reshape(len(starts), width)
    positions = [np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)]
    slots = [
        t[p // block_size] * block_size + p % block_size
        for t, p in zip(tables, positions, strict=True)
    ]
    ends = np.cumsum([0, *counts]).astype(np.int32)
    return Batch(
        token_ids=np.random.default_rng(1).integers(0, 1000, ends[-1]).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32)[None],
        query_start_loc=ends,
        seq_lens=np.add(starts, counts).astype(np.int32),
        block_tables=(tables,),
        slot_mapping=(np.concatenate(slots).astype(np.int32),),
        logits_rows=ends[1:] - 1,
    )


def sampling(count: int, temperature: float, top_p: float) -> SamplingRows:
    """Rows of one kind, without penalties, bias and logprobs."""

    def full(value: float) -> np.ndarray:  # type: ignore[type-arg]
        return np.full(count, value, np.float32)

    zeros, none = np.zeros(count, np.int32), np.zeros(0, np.int32)
    start = np.zeros(count + 1, np.int32)
    return SamplingRows(
        filters=Filters(
            temperature=full(temperature), top_k=zeros, top_p=full(top_p), min_p=full(0)
        ),
        noise=Noise(seed=np.arange(count, dtype=np.uint64), index=zeros, position=zeros),
        penalties=Penalties(
            repetition=full(1), presence=full(0), frequency=full(0), start=start, token_ids=none,
            counts=none,
        ),
        bias=Bias(start=start, token_ids=none, values=np.zeros(0, np.float32)),
        num_logprobs=np.full(count, -1, np.int32),
    )  # fmt: skip


def measure(name: str, tokens: int, step: Callable[[], object], clock: Callable[[], float]) -> None:
    """Repeat for about two seconds."""
    times: list[float] = []
    while sum(times) < 2 and len(times) < 200:
        begin = clock()
        step()
        times.append(clock() - begin)
    best, median = min(times), sorted(times)[len(times) // 2]
    print(f"{name:32} {tokens / best:8.0f} tokens/s, median {tokens / median:8.0f}")


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--kv-dtype", choices=("fp16", "int8"), default="fp16")
    parser.add_argument("--block-size", type=int, nargs="+", default=[16])
    options = parser.parse_args()
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for block_size in options.block_size:
        width = (max(options.context, 256) + 1) // block_size + 1
        config = EngineConfig(
            model=options.model,
            served_name="m",
            memory_bytes=16 << 30,
            num_threads=options.threads,
            max_num_seqs=64,
            max_model_len=width * block_size,
            block_size=block_size,
            kv_dtype=options.kv_dtype,
        )
        program: Program = loading.load(config, lambda phase, fraction: None).program
        print(f"{program.description}, blocks of {block_size}")
        chunk = batch([0], [256], block_size, width)
        measure("prefill, 256 tokens", 256, lambda: program.run(chunk, sampling(1, 0, 1)), clock)  # noqa: B023
        for count in (1, 16, 64):
            decode = batch([options.context] * count, [1] * count, block_size, width)
            for words, temperature, top_p in (("greedy", 0, 1), ("top_p 0.95", 1, 0.95)):
                rows = sampling(count, temperature, top_p)
                name = f"decode, {count} sequences, {words}"
                measure(name, count, lambda: program.run(decode, rows), clock)  # noqa: B023
        program.close()


if __name__ == "__main__":
    main()

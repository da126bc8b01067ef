"""Loading a model file on the CPU backend: from opening it to the compiled program.

    python benchmarks/cpu/load.py MODEL.gguf [MODEL.gguf ...] [--threads 2] [--runs 5]

Every run is the first of a process of its own that has imported everything, as in the server: the
memory that it packs into is fresh. The file is read once before, so that it is in the page cache.
The tokenizer and the KV cache are apart. Prints the median of the runs, the fastest, and what the
median is of the target, 500 MB/s with two threads; then the median of every phase.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from itertools import pairwise
from pathlib import Path

from octavo.backends import cpu
from octavo.backends.program import CompileOptions
from octavo.runner import loading
from octavo.weights.loader import open_model

TARGET = 500e6
"""Bytes a second: 100 MB in 0.2 s."""

PHASES = ("open", "declare", "views", "pack", "lower", "close")


def load(path: str, num_threads: int) -> list[float]:
    """Load once; the seconds of every phase."""
    clock = [time.perf_counter()]

    def done() -> None:
        clock.append(time.perf_counter())

    files = open_model(Path(path))
    done()
    model = loading.declare(files)
    done()
    weights = loading.stored_weights(model, files)
    done()
    options = CompileOptions(
        num_threads=num_threads, block_size=16, max_num_tokens=512, max_num_rows=64,
        max_model_len=2048,
    )  # fmt: skip
    program = cpu.compile(
        model.graph,
        weights,
        options,
        progress=lambda fraction: done() if fraction == 1 else None,
    )
    done()
    del weights
    files.close()
    done()
    program.close()
    return [after - before for before, after in pairwise(clock)]


def main() -> None:
    """Load each file in several processes and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")
    for path in options.models:
        size = len(Path(path).read_bytes())
        runs = []
        for _ in range(options.runs):
            with fresh.Pool(1) as pool:
                runs.append(pool.apply(load, (path, options.threads)))
        totals = [sum(run) for run in runs]
        median = statistics.median(totals)
        print(
            f"{Path(path).name}: {size / 1e6:.0f} MB in {median:.3f} s (fastest "
            f"{min(totals):.3f}), {size / median / 1e6:.0f} MB/s, "
            f"{median / (size / TARGET):.2f} of the target's time"
        )
        for name, seconds in zip(PHASES, zip(*runs, strict=True), strict=True):
            print(f"  {name:8} {statistics.median(seconds) * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()

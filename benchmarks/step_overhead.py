"""What a step costs beside the model: scheduler, runner, batch building, frames.

    python benchmarks/step_overhead.py

CPU time of one thread a step, the best of several rounds, with a Program that answers at once.
`greedy` rows have neither penalties nor logprobs, `full` rows have both, top_k and top_p.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.transport import encode
from octavo.graph.batch import Batch, SamplingRows, StepOutput
from octavo.runner.runner import Runner
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    Capacity,
    EngineRequest,
    EngineUpdates,
    KVPool,
    ModelOutput,
    SamplingParams,
    SchedulerOutput,
)

CAPACITY = Capacity(
    model="none", architecture="none", num_parameters=0, max_model_len=4096,
    kv_pool=KVPool(num_blocks=65536, block_size=16, num_bytes=0),
    weights_bytes=0, vocab_size=50_000, backend="none",
)  # fmt: skip
KINDS = {
    "greedy": {"temperature": 0.0},
    "full": {
        "temperature": 0.8, "top_k": 40, "top_p": 0.95, "logprobs": 2, "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    },
}  # fmt: skip


class InstantProgram:
    """Samples token 5 everywhere in no time."""

    description = "instant"
    weights_bytes = 0

    def block_bytes(self) -> int:
        """Any."""
        return 1

    def allocate_cache(self, num_blocks: int) -> None:
        """Nothing to allocate."""

    def close(self) -> None:
        """Nothing to free."""

    def run(self, batch: Batch, rows: SamplingRows | None, wants: Iterable[str] = ()) -> StepOutput:
        """Answer at once."""
        count = len(batch.logits_rows)
        return StepOutput(
            tokens=np.full(count, 5, np.int32),
            logprobs=np.zeros(count, np.float32),
            top_ids=np.zeros((count, 2), np.int32),
            top_logprobs=np.zeros((count, 2), np.float32),
        )


class InstantExecutor:
    """A Runner over an InstantProgram."""

    def __init__(self, num_rows: int) -> None:
        """Serve as many rows."""
        self._runner = Runner(
            InstantProgram(),
            num_rows=num_rows,
            max_model_len=CAPACITY.max_model_len,
            block_size=CAPACITY.kv_pool.block_size,
            eos_token_ids=(),
        )

    def start(self) -> Capacity:
        """Nothing to load."""
        return CAPACITY

    def submit(self, plan: SchedulerOutput) -> Future[ModelOutput]:
        """Run a step."""
        future: Future[ModelOutput] = Future()
        future.set_result(self._runner.step(plan))
        return future

    def close(self) -> None:
        """Nothing to free."""


def measure(batch: int, kind: str, rounds: int, steps: int = 100) -> float:
    """Milliseconds of CPU a decode step of `batch` rows, its frame to the parent included."""
    config = EngineConfig(
        model="", served_name="", memory_bytes=1, num_threads=1, max_num_seqs=batch,
        max_num_batched_tokens=512,
    )  # fmt: skip
    scheduler = Scheduler(config, CAPACITY, frozenset())
    core = EngineCore(InstantExecutor(batch), scheduler, CAPACITY, time.monotonic)
    for number in range(batch):
        params = SamplingParams(
            max_tokens=(rounds + 2) * steps, ignore_eos=True, seed=number, **KINDS[kind]
        )
        ids = [(7 * number + i) % 50_000 for i in range(200)]
        core.add(EngineRequest(request_id=f"r{number}", prompt_ids=ids, params=params))
    while core.stats().num_waiting or core.stats().generation_tokens < 2 * batch:
        core.step()
    best = float("inf")
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(steps):
            encode(EngineUpdates(updates=core.step(), stats=core.stats()))
        best = min(best, (time.thread_time() - began) / steps)
    return best * 1e3


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    figures = {
        f"{kind}_{batch}": round(measure(batch, kind, options.rounds), 4)
        for kind in KINDS
        for batch in (1, 16, 64, 256)
    }
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>12} rows  {value:.3f} ms a step")


if __name__ == "__main__":
    main()

"""A step writes into the blocks that its plan names and into no other, by the bytes of the pool."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.backends.program import PendingOutput, Program
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.graph.batch import Batch, SamplingRows
from tests.e2e.test_same_bytes import GROUPS, make_requests, run

NUM_BLOCKS = 20


class GuardedProgram:
    """Compares the whole pool before and after every step and every copy."""

    def __init__(self, program: Program, block_size: int) -> None:
        self._program = program
        self._block_size = block_size
        self.num_steps = 0
        self.num_copies = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def start(self, batch: Batch, rows: SamplingRows | None) -> PendingOutput:
        self.num_steps += 1
        before = self._pool()
        pending = self._program.start(batch, rows)
        written = set((batch.slot_mapping[0] // self._block_size).tolist())
        self._check(before, written)
        held: Counter[int] = Counter()
        for table, length in zip(batch.block_tables[0], batch.seq_lens.tolist(), strict=True):
            held.update(table[: -(-length // self._block_size)].tolist())
        assert all(held[block_id] == 1 for block_id in written), "two rows hold what one writes"
        return pending

    def copy_blocks(self, pairs: np.ndarray) -> None:
        self.num_copies += len(pairs)
        before = self._pool()
        self._program.copy_blocks(pairs)
        self._check(before, set(pairs[:, 1].tolist()))
        last = {destination: source for source, destination in pairs.tolist()}
        after = self._pool()
        for destination, source in last.items():
            assert np.array_equal(after[destination], before[source])

    def _pool(self) -> np.ndarray:
        return np.array(self._program.read_blocks(np.arange(NUM_BLOCKS, dtype=np.int32)))

    def _check(self, before: np.ndarray, written: set[int]) -> None:
        changed = np.flatnonzero((self._pool() != before).any(axis=1)).tolist()
        assert set(changed) <= written, "a block is written that the plan does not name"


@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_no_step_writes_into_a_block_that_it_does_not_own(
    tiny_model_path: Path, backend: str, kv_dtype: str
) -> None:
    token_bytes = {"fp16": 2 * 2 * 2 * 16 * 2, "int8": 2 * 2 * 2 * (16 + 4)}[kv_dtype]
    config = EngineConfig(
        model=str(tiny_model_path),
        served_name="m",
        memory_bytes=NUM_BLOCKS * 8 * token_bytes,
        num_threads=2,
        block_size=8,
        backend=backend,
        device="cpu",
        kv_dtype=kv_dtype,
    )
    core = EngineCore.load(config.validate())
    try:
        assert core.capacity.kv_pool.num_blocks == NUM_BLOCKS
        executor: Any = core._executor
        runner = executor._runner
        guard = runner._program = GuardedProgram(runner._program, 8)
        count = 12 if backend == "cpu" else 6
        requests = make_requests(count, 262, max_prompt=9, max_tokens=30, kinds=GROUPS)
        run(core, requests)
        assert guard.num_steps > 30
        assert guard.num_copies > 10
        assert core.stats().num_preemptions > 0 or backend != "cpu"
    finally:
        core.close()

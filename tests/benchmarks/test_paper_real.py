from __future__ import annotations

from pathlib import Path

import pytest
import real
from real import ReservedBlocks

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.scheduler.scheduler import Scheduler
from octavo.types import Capacity, KVPool


def test_ranges_are_contiguous_apart_and_given_back() -> None:
    pool = KVPool(num_blocks=13, block_size=4, num_bytes=13)
    capacity = Capacity(
        model="m",
        architecture="a",
        num_parameters=1,
        max_model_len=14,
        kv_pool=pool,
        weights_bytes=1,
        vocab_size=10,
        backend="cpu",
    )
    cache = ReservedBlocks(capacity)
    tables = [cache.new_table() for _ in range(4)]
    given = [cache.allocate(table, 1) for table in tables]
    assert given[3] is None, "13 blocks hold three ranges of 4"
    assert len({block_id for ids in given[:3] for block_id in ids or ()}) == 12
    for ids in given[:3]:
        assert ids is not None
        assert list(ids) == list(range(ids[0], ids[0] + 4))
    cache.free(tables[1])
    assert cache.num_referenced_blocks == 8
    assert cache.allocate(tables[3], 1) == given[1]


@pytest.mark.parametrize("is_paging", [True, False])
def test_a_trace_is_served_whole(tiny_model_path: Path, is_paging: bool) -> None:
    config = EngineConfig(
        model=str(tiny_model_path),
        served_name="tiny",
        memory_bytes=1 << 20,
        num_threads=1,
        max_model_len=64,
        use_prefix_cache=False,
    )
    executor, capacity = real.load(config)
    scheduler = Scheduler(
        config, capacity, frozenset(), cache=None if is_paging else ReservedBlocks(capacity)
    )
    core = EngineCore(executor, scheduler, capacity, float)
    jobs = [real.Job(0.001 * number, 5 + number, 3 + number) for number in range(20)]
    run = real.serve(core, jobs, seed=1)
    executor.close()
    assert len(run.latencies) == 20
    assert run.num_tokens == sum(job.num_output for job in jobs)
    assert core.stats().cache.num_blocks_used == 0

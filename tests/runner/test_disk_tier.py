"""DiskTier: what it moves, how long it reads, and when it lets the blocks be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.runner import disk_tier
from octavo.runner.block_store import DiskBlockStore
from octavo.runner.disk_tier import DiskTier

BLOCK_BYTES, BLOCK_SIZE, BUDGET = 64, 16, 512


class Pool:
    """A Program's blocks, and nothing else of it."""

    def __init__(self) -> None:
        self.blocks = np.arange(100 * BLOCK_BYTES, dtype=np.uint32).astype(np.uint8)
        self.blocks = (
            self.blocks.reshape(100, BLOCK_BYTES) ^ np.arange(100, dtype=np.uint8)[:, None]
        )
        self.reads: list[list[int]] = []

    def read_blocks(self, ids: NDArray[np.int32]) -> NDArray[np.uint8]:
        self.reads.append(ids.tolist())
        return self.blocks[ids]

    def write_blocks(self, ids: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        assert ids.dtype == np.int32
        assert data.flags.c_contiguous
        self.blocks[ids] = data


class SlowStore:
    """A store in which reading a block takes a given time."""

    def __init__(self, store: DiskBlockStore) -> None:
        self._store = store
        self.now = 0.0
        self.block_s = 0.0
        self.num_read = 0

    def get(self, hashes: Sequence[bytes]) -> Any:
        self.now += self.block_s * len(hashes)
        self.num_read += len(hashes)
        return self._store.get(hashes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A tier over a pool of a hundred blocks and a store that takes the time it is told."""
    store = DiskBlockStore(tmp_path, b"key", BLOCK_BYTES, 1 << 20)
    slow, pool = SlowStore(store), Pool()
    tier = DiskTier(pool, slow, BLOCK_SIZE, BUDGET, clock=lambda: slow.now)  # type: ignore[arg-type]
    yield SimpleNamespace(tier=tier, store=slow, pool=pool)
    tier.close()


def name(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def names(count: int) -> list[bytes]:
    return [name(n) for n in range(count)]


def compute(world: SimpleNamespace, token_s: float, num_tokens: int = BUDGET) -> None:
    """A step that takes so long a token."""
    world.tier.begin(num_tokens)
    world.store.now += token_s * num_tokens
    world.tier.end()


def test_a_step_that_waits_for_another_is_not_slower(world: SimpleNamespace) -> None:
    for count in (BUDGET, BUDGET):
        world.tier.begin(count)
    for _ in range(2):
        world.store.now += 3.0
        world.tier.end()
    assert world.tier._compute.seconds == pytest.approx(3.0 / BUDGET)


def test_blocks_go_down_and_come_back(world: SimpleNamespace) -> None:
    tier, pool = world.tier, world.pool
    before = pool.blocks.copy()
    tier.save([(name(n), 10 + n) for n in range(20)])
    pool.blocks[10:30] = 0
    assert tier.fetch([*names(20), name(99)]) == 20
    assert not pool.blocks[10:30].any(), "only the step's loads write"
    tier.load([(name(n), 50 + n) for n in range(20)])
    assert (pool.blocks[50:70] == before[10:30]).all()
    assert (pool.blocks[:10] == before[:10]).all()
    assert tier.stats().num_hits == 20


def test_a_block_is_read_from_the_pool_once(world: SimpleNamespace) -> None:
    world.tier.save([(name(1), 1), (name(2), 2)])
    world.tier.save([(name(2), 5), (name(3), 3)])
    world.tier.save([(name(2), 5)])
    world.tier.save([])
    assert world.pool.reads == [[1, 2], [3]]


def test_a_gap_ends_what_is_fetched(world: SimpleNamespace) -> None:
    world.tier.save([(name(n), n) for n in range(20) if n != 11])
    assert world.tier.fetch(names(20)) == 11
    world.tier.load([])
    assert world.tier.fetch([name(11), name(12)]) == 0


def test_a_damaged_block_ends_what_is_fetched(world: SimpleNamespace, tmp_path: Path) -> None:
    world.tier.save([(name(n), n) for n in range(20)])
    while world.store._queue:
        pass
    [path] = tmp_path.glob("*.kv")
    raw = bytearray(path.read_bytes())
    raw[-7 * BLOCK_BYTES] ^= 1
    path.write_bytes(raw)
    assert world.tier.fetch(names(20)) == 13
    assert world.tier.stats().num_corrupt == 1


def test_a_step_reads_for_no_longer_than_one_computes(world: SimpleNamespace) -> None:
    world.tier.save([(name(n), n) for n in range(100)])
    world.store.block_s = 0.001
    compute(world, 0.05 / BUDGET)  # 50 ms a step: 50 blocks, in chunks of 8.
    assert world.tier.fetch(names(100)) == 56
    assert world.tier.fetch(names(100)[56:]) == 0, "for this step it is enough"
    world.tier.load([(n, i) for i, n in enumerate(names(56))])
    assert world.tier.fetch(names(100)[56:]) == 44


def test_before_any_step_it_reads_for_a_tenth_of_a_second(world: SimpleNamespace) -> None:
    world.tier.save([(name(n), n) for n in range(100)])
    world.store.block_s = 0.005
    assert world.tier.fetch(names(100)) == 24


def test_two_sequences_share_what_is_staged(world: SimpleNamespace) -> None:
    world.tier.save([(name(n), n) for n in range(8)])
    assert world.tier.fetch(names(8)) == world.tier.fetch(names(8)) == 8
    assert world.store.num_read == 8


def test_reading_that_is_slower_than_computing_is_left(world: SimpleNamespace) -> None:
    world.tier.save([(name(n), n) for n in range(50)])
    compute(world, 0.001)
    world.store.block_s = 0.015  # Sixteen tokens take 16 ms.
    for _ in range(100):
        assert world.tier.fetch(names(8)) == 8
        world.tier.load([])
    world.store.block_s = 0.017
    found = [world.tier.fetch(names(8)) for _ in range(12) if world.tier.load([]) is None]
    assert found[0] == 8
    assert found[-1] == 0
    # Once in a while it is tried again, and found to be fast.
    world.store.block_s = 0.0001
    found = [
        world.tier.fetch(names(8))
        for _ in range(3 * disk_tier.PROBE_INTERVAL)
        if world.tier.load([]) is None
    ]
    assert found[-1] == 8
    assert found.count(0) < 3 * disk_tier.PROBE_INTERVAL - 8


def test_small_steps_say_nothing_of_a_prompts_speed(world: SimpleNamespace) -> None:
    """One token takes as long as fifty; a prompt that is computed whole is what reading saves."""
    world.tier.save([(name(n), n) for n in range(8)])
    compute(world, 0.001)
    compute(world, 1.0, num_tokens=1)
    world.store.block_s = 0.02
    world.tier.fetch(names(8))
    world.tier.load([])
    assert world.tier.fetch(names(8)) == 0


def test_what_was_discarded_is_not_found(world: SimpleNamespace) -> None:
    world.tier.save([(name(n), n) for n in range(4)])
    world.tier.discard([name(2)])
    assert world.tier.fetch(names(4)) == 2
    world.tier.clear()
    world.tier.load([])
    assert world.tier.fetch(names(4)) == 0

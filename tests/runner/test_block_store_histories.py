"""Random histories of a DiskBlockStore: whatever happens to its files, no block is ever wrong."""

from __future__ import annotations

import random
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from octavo.runner.block_store import DiskBlockStore

BLOCK_BYTES = 600
NUMBERS = st.lists(st.integers(0, 60), min_size=1, max_size=20)


def name(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK_BYTES)


class StoreHistories(RuleBasedStateMachine):
    """`alive` are the blocks that may come back; none of them must."""

    @initialize(max_blocks=st.integers(60, 400))
    def start(self, max_blocks: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.max_bytes = max_blocks * BLOCK_BYTES
        self.alive: set[int] = set()
        self.open()

    def open(self, key: bytes = b"key") -> None:
        self.store = DiskBlockStore(self.folder, key, BLOCK_BYTES, self.max_bytes)

    @rule(numbers=NUMBERS)
    def put(self, numbers: list[int]) -> None:
        for number in numbers:
            self.store.put(name(number), block(number))
            self.alive.add(number)

    @rule(numbers=NUMBERS)
    def get(self, numbers: list[int]) -> None:
        found = self.store.get([name(number) for number in numbers])
        assert len(found) == len(numbers)
        for number, data in zip(numbers, found, strict=True):
            assert data is None or bytes(data) == block(number), "another block's bytes"
            assert data is None or number in self.alive, "a block that was forgotten"

    @rule(numbers=NUMBERS)
    def discard(self, numbers: list[int]) -> None:
        self.store.discard([name(number) for number in numbers])
        self.alive.difference_update(numbers)

    @rule(is_other=st.booleans())
    def restart(self, is_other: bool) -> None:
        self.store.close()
        total = sum(p.stat().st_size for p in self.folder.glob("*.kv"))
        assert total <= self.max_bytes
        if is_other:
            self.open(b"another")
            assert not any(self.store.contains(name(number)) for number in range(61))
            self.store.close()
        self.open()

    @rule()
    def clear(self) -> None:
        self.store.discard(None)
        self.alive.clear()

    @rule(which=st.integers(0, 99), where=st.integers(0, 99_999), change=st.integers(0, 255))
    def damage(self, which: int, where: int, change: int) -> None:
        """Change a byte, or cut the file there. The writer's pace decides which files there are."""
        self.store.close()
        paths = [p for p in sorted(self.folder.glob("*.kv")) if p.stat().st_size]
        if paths:
            path = paths[which % len(paths)]
            raw = bytearray(path.read_bytes())
            at = where % len(raw)
            if change:
                raw[at] ^= change
            else:
                del raw[at:]
            path.write_bytes(raw)
        self.open()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for number in range(61):
                self.get([number])
            self.store.close()
            shutil.rmtree(self.folder)


def run_histories(max_examples: int) -> None:
    run_state_machine_as_test(
        StoreHistories,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_histories_serve_no_wrong_block() -> None:
    run_histories(60)


@pytest.mark.slow
def test_many_random_histories_serve_no_wrong_block() -> None:
    run_histories(3000)

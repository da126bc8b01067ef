"""MemoryBlockStore: which blocks it has, where they lie, and what goes to the store below it."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Container, Sequence
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from octavo.backends.program import Bytes
from octavo.errors import ConfigError
from octavo.runner import memory_store
from octavo.runner.memory_store import MemoryBlockStore
from octavo.types import TierStats

BLOCK_BYTES = 48


def name(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def names(*numbers: int) -> list[bytes]:
    return [name(number) for number in numbers]


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK_BYTES)


class Below:
    """A store that takes what it is told to take."""

    def __init__(self, most: int = 1000) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self._most = most

    def contains(self, prefix_hash: bytes) -> bool:
        return prefix_hash in self.blocks

    def reserve(self, hashes: Sequence[bytes], keep: Container[bytes] = ()) -> dict[bytes, None]:
        new = [h for h in hashes if h not in self.blocks]
        return dict.fromkeys(new[: self._most - len(self.blocks)])

    def put(self, prefix_hash: bytes, data: memoryview) -> None:
        assert prefix_hash not in self.blocks
        assert len(self.blocks) < self._most
        self.blocks[prefix_hash] = data  # type: ignore[assignment]

    def get(self, hashes: Sequence[bytes]) -> list[None]:
        raise AssertionError("the tier asks it itself")

    def discard(self, hashes: Sequence[bytes] | None) -> None:
        raise AssertionError("the tier tells it itself")

    def stats(self) -> TierStats:
        raise AssertionError("the tier asks it itself")


class Host:
    """Memory of which there is so much."""

    def __init__(self, most: int = 1 << 30) -> None:
        self._left = most
        self.pieces: list[Bytes] = []

    def allocate(self, num_bytes: int) -> Bytes:
        if num_bytes > self._left:
            raise MemoryError("no more")
        self._left -= num_bytes
        self.pieces.append(np.zeros(num_bytes, np.uint8))
        return self.pieces[-1]


def make(num_blocks: int, below: Below | None = None, host: Host | None = None) -> MemoryBlockStore:
    allocate = (host or Host()).allocate
    return MemoryBlockStore(BLOCK_BYTES, num_blocks * BLOCK_BYTES + 17, allocate, below)


def put(store: MemoryBlockStore, *numbers: int, keep: Container[bytes] = ()) -> None:
    """As the tier does it: rooms, then blocks in them."""
    rooms = store.reserve(names(*numbers), keep)
    for number in numbers:
        room = rooms.get(name(number))
        if room is not None:
            room[:] = np.frombuffer(block(number), np.uint8)
            store.put(name(number), room.data)


def known(store: MemoryBlockStore, count: int = 100) -> list[int]:
    return [number for number in range(count) if store.contains(name(number))]


def check(store: MemoryBlockStore, *numbers: int) -> None:
    for number, data in zip(numbers, store.get(names(*numbers)), strict=True):
        assert data is not None, number
        assert bytes(data) == block(number)


def test_what_is_put_comes_back() -> None:
    store = make(8)
    assert store.get([]) == []
    assert store.get([name(1)]) == [None]
    put(store, 1, 2, 3)
    check(store, 3, 1)
    assert store.get(names(9, 2))[0] is None
    stats = store.stats()
    assert (stats.num_blocks, stats.num_writes, stats.num_hits, stats.num_drops) == (3, 3, 3, 0)
    assert not store.reserve(names(1, 2)), "they are known"


def test_a_block_is_known_when_it_is_put() -> None:
    store = make(8)
    rooms = store.reserve(names(1, 2))
    assert not store.contains(name(1))
    assert store.get([name(1)]) == [None]
    store.put(name(2), rooms[name(2)].data)
    assert known(store) == [2]
    with pytest.raises(AssertionError, match="lies elsewhere"):
        store.put(name(1), np.zeros(BLOCK_BYTES, np.uint8).data)


def test_the_bound_holds_and_the_least_recently_used_goes() -> None:
    host = Host()
    store = make(5, host=host)
    for number in range(20):
        put(store, number)
    assert known(store) == [15, 16, 17, 18, 19]
    check(store, 15)
    assert not store.reserve([name(16)])
    put(store, 30, 31)
    assert known(store) == [15, 16, 19, 30, 31]
    assert sum(piece.nbytes for piece in host.pieces) == store.stats().num_bytes == 5 * BLOCK_BYTES


def test_the_first_of_a_chain_stay_longer_than_the_last() -> None:
    store = make(5)
    put(store, 0, 1, 2, 3, 4)
    check(store, 0, 1, 2, 3, 4)
    put(store, 10, 11)
    assert known(store) == [0, 1, 2, 10, 11]


def test_memory_is_taken_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_store, "PIECE_BYTES", 4 * BLOCK_BYTES)
    host = Host()
    store = make(10, host=host)
    sizes = []
    for number in range(15):
        put(store, number)
        sizes.append(len(host.pieces))
    assert sizes == [1] * 4 + [2] * 4 + [3] * 7
    assert [piece.nbytes // BLOCK_BYTES for piece in host.pieces] == [4, 4, 2]


def test_when_there_is_no_more_memory_it_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_store, "PIECE_BYTES", 4 * BLOCK_BYTES)
    store = make(100, host=Host(6 * BLOCK_BYTES))
    for number in range(12):
        put(store, number)
    assert known(store) == [8, 9, 10, 11]
    assert [record.getMessage() for record in caplog.records] == [
        "--kv-host stays at 192 bytes, for the system gives no more: no more"
    ]
    store = make(100, host=Host(0))
    put(store, 1)
    assert not known(store)
    assert store.stats().num_drops == 1


def test_what_is_dropped_goes_below() -> None:
    below = Below()
    store = make(4, below)
    for number in range(10):
        put(store, number)
    assert below.blocks.keys() == set(names(*range(6)))
    for number in range(20, 30):  # The rooms get another content.
        put(store, number)
    assert all(bytes(below.blocks[name(number)]) == block(number) for number in range(10))
    put(store, 0, 1, 2, 3)
    put(store, 40, 41, 42, 43)  # Those below know it already.
    full = make(4, Below(most=1))
    for number in range(10):
        put(full, number)
    assert known(full) == [6, 7, 8, 9]


def test_what_is_still_needed_is_not_dropped() -> None:
    store = make(4)
    put(store, 0, 1, 2, 3)
    held = store.get(names(1, 2))
    put(store, 10, 11, 12, keep=names(1, 2))
    assert known(store) == [1, 2, 10, 11]
    assert [bytes(data) for data in held if data is not None] == [block(1), block(2)]
    assert store.stats().num_drops == 1


def test_what_is_discarded_is_not_served_and_its_room_is_free() -> None:
    below = Below()
    store = make(4, below)
    put(store, 0, 1, 2, 3)
    store.discard(names(1, 99))
    assert known(store) == [0, 2, 3]
    room = store.reserve([name(5)])[name(5)]
    store.discard([name(5)])  # On its way.
    with pytest.raises(KeyError):
        store.put(name(5), room.data)
    put(store, 6)
    assert known(store) == [0, 2, 3, 6]
    assert not below.blocks
    store.reserve([name(7)])
    store.discard(None)
    assert not known(store)
    put(store, 1, 2, 3, 4)
    assert known(store) == [1, 2, 3, 4]


def test_a_store_for_no_block() -> None:
    with pytest.raises(ConfigError, match="--kv-host of 17 bytes holds no block of 48 bytes"):
        make(0)


NUMBERS = st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True)


class Histories(RuleBasedStateMachine):
    """Beside a model of it: an LRU of numbers, and those that are on their way."""

    @initialize(size=st.integers(1, 9), most=st.integers(0, 12))
    def start(self, size: int, most: int) -> None:
        self.size = size
        self.below = Below(most)
        self.store = make(size, self.below)
        self.lru: OrderedDict[int, None] = OrderedDict()
        self.coming: dict[int, Bytes] = {}
        self.dropped: set[int] = set()

    @rule(numbers=NUMBERS, keep=NUMBERS)
    def reserve(self, numbers: list[int], keep: list[int]) -> None:
        rooms = self.store.reserve(names(*numbers), set(names(*keep)))
        for number in [n for n in numbers if n in self.lru]:
            self.lru.move_to_end(number)
        expected = []
        for number in [n for n in numbers if n not in self.lru and n not in self.coming]:
            if len(self.lru) + len(self.coming) == self.size:
                victim = next((n for n in self.lru if n not in keep), None)
                if victim is None:
                    break
                del self.lru[victim]
                self.dropped.add(victim)
            self.coming[number] = rooms[name(number)]
            expected.append(name(number))
        assert list(rooms) == expected

    @rule(which=st.integers(0, 9))
    def arrive(self, which: int) -> None:
        if self.coming:
            number = list(self.coming)[which % len(self.coming)]
            room = self.coming.pop(number)
            room[:] = np.frombuffer(block(number), np.uint8)
            self.store.put(name(number), room.data)
            self.lru[number] = None

    @rule(numbers=NUMBERS)
    def get(self, numbers: list[int]) -> None:
        for number, data in zip(numbers, self.store.get(names(*numbers)), strict=True):
            assert (data is not None) == (number in self.lru)
            assert data is None or bytes(data) == block(number)
        for number in [n for n in reversed(numbers) if n in self.lru]:
            self.lru.move_to_end(number)

    @rule(numbers=st.none() | NUMBERS)
    def discard(self, numbers: list[int] | None) -> None:
        self.store.discard(None if numbers is None else names(*numbers))
        for number in range(21) if numbers is None else numbers:
            self.lru.pop(number, None)
            self.coming.pop(number, None)

    @invariant()
    def what_is_known(self) -> None:
        if hasattr(self, "store"):
            assert known(self.store, 21) == sorted(self.lru)
            assert self.store.stats().num_bytes <= self.size * BLOCK_BYTES
            assert self.below.blocks.keys() <= set(names(*self.dropped))
            for number in self.dropped:
                data = self.below.blocks.get(name(number))
                assert data is None or bytes(data) == block(number)


def test_random_histories() -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=150,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

"""Transfers of whole blocks: on the CPU as they are, and on a device whose streams are simulated.

The simulated device takes copies, gathers and scatters when it likes, within the order that its
streams and events demand. So what is right only by luck of timing fails here without a GPU.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.backends.program import Bytes
from octavo.backends.torch import transfers
from octavo.backends.torch.cache import KVCache
from octavo.backends.torch.transfers import Transfers, host_memory
from octavo.graph.trace import CacheGroup
from octavo.runner.memory_store import MemoryBlockStore
from octavo.runner.store_tier import StoreTier

CPU = torch.device("cpu")
NUM_BLOCKS = 12


@pytest.fixture
def cache(request: pytest.FixtureRequest) -> KVCache:
    cache = KVCache(CacheGroup("kv", (0, 1, 5), 1, 8), 8, "int8", CPU)
    cache.allocate(NUM_BLOCKS)
    return cache


def content(name: int, block_bytes: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(name).integers(0, 256, block_bytes, np.uint8))


def fill(cache: KVCache) -> list[bytes]:
    for number in range(NUM_BLOCKS):
        data = content(number, cache.block_bytes)
        cache.pool[:, number] = data.unflatten(0, (len(cache.pool), -1))
    return [content(number, cache.block_bytes).numpy().tobytes() for number in range(NUM_BLOCKS)]


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("chunk_blocks", [1, 2, 100])
def test_blocks_are_read_and_written_chunk_by_chunk(
    cache: KVCache, monkeypatch: pytest.MonkeyPatch, chunk_blocks: int
) -> None:
    monkeypatch.setattr(transfers, "CHUNK_BYTES", chunk_blocks * cache.block_bytes)
    before = fill(cache)
    moves = Transfers(cache, CPU)
    places = list(np.zeros((5, cache.block_bytes), np.uint8))
    reading = moves.read(ids(7, 0, 3, 11, 4), places)
    assert reading.is_done()
    assert reading.result() is places
    expected = [before[number] for number in (7, 0, 3, 11, 4)]
    assert [row.tobytes() for row in places] == expected
    assert [row.tobytes() for row in moves.read(ids(7, 0, 3, 11, 4), None).result()] == expected
    cache.pool.zero_()
    assert moves.write(ids(2, 9, 1, 0, 6), places)() == 0.0
    assert [row.tobytes() for row in moves.read(ids(2, 9, 1, 0, 6), None).result()] == expected
    assert not cache.pool[:, [3, 4, 5, 7, 8, 10, 11]].any()


def test_memory_that_is_not_there() -> None:
    with pytest.raises(MemoryError, match="bytes"):
        host_memory(1 << 60, CPU)


# ---- On a simulated device ------------------------------------------------------------------


class Event:
    """As of torch.cuda: it stands for the moment in which it was last recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._mark: list[bool] = []  # Never recorded: nothing to wait for.
        self._device: Device | None = None

    def record(self, stream: Stream) -> None:
        self._device = stream.device
        self._mark = mark = [False]
        stream.queue.append(lambda: mark.__setitem__(0, True) is None)

    def is_over(self) -> Callable[[], bool]:
        mark = self._mark
        return lambda: all(mark)

    def query(self) -> bool:
        return all(self._mark)

    def synchronize(self) -> None:
        while not self.query():
            assert self._device is not None
            self._device.work(1)

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        return 0.0


class Stream:
    """What waits to be done; each returns False while it must go on waiting."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.queue: deque[Callable[[], bool]] = deque()

    def wait_event(self, event: Event) -> None:
        self.queue.append(event.is_over())


class Device(TorchDispatchMode):
    """Puts what writes into tensors into the queue of the current stream."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self._dice = dice
        self._is_working = False
        self.computing = self.current = Stream(self)
        self.copying = Stream(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        lasting = torch.ops.aten
        writing = (lasting.copy_.default, lasting.index_copy_.default, lasting.index_select.out)
        if self._is_working or func not in writing:
            return func(*args, **given)
        self.current.queue.append(lambda: func(*args, **given) is not None)
        return given.get("out", args[0])

    def work(self, count: int) -> None:
        """Do what can be done, so many times."""
        self._is_working = True
        for _ in range(count):
            stream = self._dice.choice([self.computing, self.copying])
            if stream.queue and stream.queue[0]():
                stream.queue.popleft()
        self._is_working = False

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Engine:
    """A pool whose blocks get one content after another, and a tier below it."""

    def __init__(self, moves: Transfers, dice: random.Random) -> None:
        self.moves = moves
        self.dice = dice
        self.cache = cache = moves._cache
        self.host = MemoryBlockStore(
            cache.block_bytes,
            dice.choice([3, 9, 40]) * cache.block_bytes,
            lambda count: host_memory(count, moves._device),
        )
        self.tier = StoreTier(self, self.host, None, 16, 512)  # type: ignore[arg-type]
        self.names: list[int | None] = [None] * NUM_BLOCKS
        self.in_flight: deque[Any] = deque()
        self.num_loads = 0

    def read_blocks(self, blocks: Any, out: Sequence[Bytes] | None) -> Any:
        return self.moves.read(blocks, out)

    def write_blocks(self, blocks: Any, data: Sequence[Bytes]) -> Callable[[], float]:
        return self.moves.write(blocks, data)

    def step(self) -> None:
        """Give some blocks another content: what is known of it is loaded, the rest computed."""
        taken = self.dice.sample(range(NUM_BLOCKS), self.dice.randint(0, 6))
        unused = [name for name in range(30) if name not in self.names]
        wanted = self.dice.sample(unused, len(taken))
        hashes = [b"%d" % name for name in wanted]
        num_loads = self.tier.fetch(hashes) if hashes else 0
        pairs = [(self.names[block], block) for block in taken]
        self.tier.save([(b"%d" % name, block) for name, block in pairs if name is not None])
        self.tier.load(list(zip(hashes, taken, strict=True))[:num_loads])
        self.num_loads += num_loads
        for name, block in list(zip(wanted, taken, strict=True))[num_loads:]:
            data = content(name, self.cache.block_bytes)
            self.cache.pool[:, block].copy_(data.unflatten(0, (len(self.cache.pool), -1)))
        for name, block in zip(wanted, taken, strict=True):
            self.names[block] = name
        self.tier.begin(len(taken))
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.moves._device))
        self.in_flight.append(event)
        if len(self.in_flight) == 2:
            self.in_flight.popleft().synchronize()
            self.tier.end()
        if self.dice.random() < 0.1:
            self.tier.discard([b"%d" % self.dice.randrange(30) for _ in range(5)])

    def check(self) -> None:
        """Once all is done, the pool and the store have what they say that they have."""
        self.tier.close()
        while self.in_flight:
            self.in_flight.popleft().synchronize()
        block_bytes = self.cache.block_bytes
        for block, name in enumerate(self.names):
            if name is not None:
                row = self.cache.pool[:, block].flatten().cpu()
                assert row.equal(content(name, block_bytes)), (block, name)
        for name in range(30):
            [data] = self.host.get([b"%d" % name])
            assert data is None or bytes(data) == bytes(content(name, block_bytes).numpy())


def make_engine(monkeypatch: pytest.MonkeyPatch, dice: random.Random, device: Any) -> Engine:
    cache = KVCache(CacheGroup("kv", (0, 1), 1, 8), 8, "int8", device)
    cache.allocate(NUM_BLOCKS)
    chunk_bytes = dice.choice([1, 2, 9]) * cache.block_bytes
    monkeypatch.setattr(transfers, "CHUNK_BYTES", chunk_bytes)
    return Engine(Transfers(cache, device), dice)


@pytest.mark.gpu
def test_random_histories_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(30):
        engine = make_engine(monkeypatch, random.Random(seed), torch.device("cuda", 0))
        for _ in range(100):
            engine.step()
        engine.check()


@pytest.mark.parametrize("is_pinned", [True, False])
def test_random_histories_on_a_device_of_any_pace(
    monkeypatch: pytest.MonkeyPatch, is_pinned: bool
) -> None:
    num_loads = 0
    for seed in range(30):
        dice = random.Random(seed)
        engine = make_engine(monkeypatch, dice, CPU)
        device = Device(dice)
        engine.moves._stream = device.copying  # type: ignore[assignment]
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", device.use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, d=device: d.computing)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: is_pinned)
        with device:
            for _ in range(30):
                engine.step()
                device.work(dice.choice([0, 0, 5, 60]))
            engine.check()
        num_loads += engine.num_loads
    assert num_loads > 150

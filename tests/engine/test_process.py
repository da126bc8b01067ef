"""The loop of the engine process over a fake core: what it says when things go wrong."""

from __future__ import annotations

import gc
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from octavo.config import EngineConfig
from octavo.engine import process
from octavo.engine.core import EngineCore
from octavo.engine.transport import FrameBuffer, decode_from_engine, encode
from octavo.errors import ContextLengthError, KernelError, ModelFileError, OverloadedError
from octavo.types import (
    AbortRequest,
    AddRequest,
    Capacity,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineRequest,
    EngineStats,
    EngineUpdates,
    FromEngine,
    KVPool,
    PrefixCacheReset,
    RequestRejected,
    ResetPrefixCache,
    SamplingParams,
    StartEngine,
    ToEngine,
    TokenUpdate,
)

CAPACITY = Capacity(
    model="m", architecture="A", num_parameters=1, max_model_len=64,
    kv_pool=KVPool(num_blocks=8, block_size=16, num_bytes=1),
    weights_bytes=1, vocab_size=100, backend="fake",
)  # fmt: skip
CONFIG = EngineConfig(model="m", served_name="m", memory_bytes=1, num_threads=1)
START = StartEngine(config=msgspec.to_builtins(CONFIG))


class FakeCore:
    """Gives each request one token a step until it is aborted."""

    capacity = CAPACITY

    def __init__(self) -> None:
        self.alive: list[str] = []
        self.num_steps = 0
        self.is_closed = False
        self.add_error: Exception | None = None
        self.step_error: Exception | None = None

    def add(self, request: EngineRequest) -> None:
        if self.add_error is not None:
            raise self.add_error
        self.alive.append(request.request_id)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenUpdate]:
        self.alive.remove(request_id)
        return []

    def reset_prefix_cache(self) -> int:
        return 17

    def close(self) -> None:
        self.is_closed = True

    def has_work(self) -> bool:
        return bool(self.alive)

    def step(self) -> list[TokenUpdate]:
        if self.step_error is not None:
            raise self.step_error
        self.num_steps += 1
        return [TokenUpdate(name, 0, (self.num_steps,)) for name in self.alive]

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.alive), num_steps=self.num_steps)


class Parent:
    """The other end of an engine that runs in a thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(5)
        self._buffer = FrameBuffer()
        self._records: list[FromEngine] = []
        self.exit_code: int | None = None

    def send(self, *records: ToEngine) -> None:
        self.socket.sendall(b"".join(map(encode, records)))

    def receive(self) -> FromEngine:
        while not self._records:
            data = self.socket.recv(1 << 16)
            assert data, "the engine has hung up"
            self._records += [decode_from_engine(body) for body in self._buffer.feed(data)]
        return self._records.pop(0)

    def until(self, kind: type[FromEngine]) -> FromEngine:
        while not isinstance(record := self.receive(), kind):
            pass
        return record


@contextmanager
def engine(monkeypatch: pytest.MonkeyPatch, load: Callable[..., object]) -> Iterator[Parent]:
    """An engine that loads its core with `load`; ends when its parent hangs up."""
    monkeypatch.setattr(EngineCore, "load", load)
    ours, theirs = socket.socketpair()
    parent = Parent(ours)

    def serve() -> None:
        with theirs:
            parent.exit_code = process.serve(theirs)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield parent
    finally:
        ours.close()
        thread.join(5)
        assert not thread.is_alive()
        gc.unfreeze()  # the engine froze this process's objects for itself


def add(name: str) -> AddRequest:
    request = EngineRequest(request_id=name, prompt_ids=[1], params=SamplingParams())
    return AddRequest(request=request)


def test_from_start_to_hanging_up(monkeypatch: pytest.MonkeyPatch) -> None:
    core = FakeCore()

    def load(config: EngineConfig, progress: Callable[[str, float], None]) -> FakeCore:
        assert config == CONFIG
        for step in range(1000):
            progress("weights", step / 1000)
        progress("cache", 0.0)
        return core

    with engine(monkeypatch, load) as parent:
        parent.send(START)
        reports = []
        while isinstance(record := parent.receive(), EngineProgress):
            reports.append(record)
        assert 2 <= len(reports) < 50, "the parent is not flooded"
        assert {r.phase for r in reports} == {"weights", "cache"}
        assert record == EngineReady(capacity=CAPACITY)

        parent.send(add("a"))
        first = parent.receive()
        assert isinstance(first, EngineUpdates)
        assert first.updates == [TokenUpdate("a", 0, (1,))]
        assert first.stats.num_steps == 1
        parent.send(AbortRequest(request_id="a"))
        last = first
        while last.stats.num_running:
            record = parent.receive()
            assert isinstance(record, EngineUpdates)
            last = record
        assert last.updates == [], "an end without tokens still shows in the statistics"
    assert parent.exit_code == 0
    assert core.is_closed
    assert core.num_steps == last.stats.num_steps, "an idle engine takes no steps"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OverloadedError("full", retry_after_s=2.5),
            RequestRejected(
                request_id="a", error="OverloadedError", message="full", code="queue_full",
                retry_after_s=2.5,
            ),
        ),
        (
            ContextLengthError("long", param="prompt"),
            RequestRejected(
                request_id="a", error="ContextLengthError", message="long", param="prompt",
                code="context_length_exceeded",
            ),
        ),
    ],
)  # fmt: skip
def test_a_refusal_goes_back_and_nothing_ends(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: RequestRejected
) -> None:
    core = FakeCore()
    core.add_error = error
    with engine(monkeypatch, lambda config, progress: core) as parent:
        parent.send(START)
        parent.until(EngineReady)
        parent.send(add("a"))
        assert parent.until(RequestRejected) == expected
        core.add_error = None
        parent.send(add("b"))
        assert parent.until(EngineUpdates)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KernelError("row 3 is broken"), "row 3 is broken"),
        (ZeroDivisionError("by zero"), "the engine failed: ZeroDivisionError: by zero"),
        (MemoryError(), "the engine ran out of memory"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"),
            "the engine ran out of the device's memory; lower --memory (CUDA out of memory. Tried "
            "to allocate 2 GiB.)",
        ),
    ],
)
def test_a_broken_step_ends_the_engine_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    core = FakeCore()
    core.step_error = error
    with engine(monkeypatch, lambda config, progress: core) as parent:
        parent.send(START)
        parent.until(EngineReady)
        parent.send(add("a"))
        failed = parent.until(EngineFailed)
        assert isinstance(failed, EngineFailed)
        assert failed.message.startswith(message)
    assert parent.exit_code == 1
    assert core.is_closed


def test_a_failed_load_ends_the_engine_with_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: EngineConfig, progress: object) -> FakeCore:
        raise ModelFileError("the file is cut")

    with engine(monkeypatch, load) as parent:
        parent.send(START)
        assert parent.receive() == EngineFailed(message="the file is cut")
    assert parent.exit_code == 1


@pytest.mark.parametrize(
    "frames",
    [
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 1 << 31),
        encode(AbortRequest(request_id="a")),
        encode(START) + encode(START),
        encode(StartEngine(config={"model": 7})),
        encode(StartEngine(config=msgspec.to_builtins(CONFIG) | {"num_threads": 0})),
    ],
)
def test_nonsense_at_the_start_is_a_failure(monkeypatch: pytest.MonkeyPatch, frames: bytes) -> None:
    with engine(monkeypatch, lambda config, progress: FakeCore()) as parent:
        parent.socket.sendall(frames)
        assert isinstance(parent.receive(), EngineFailed)
    assert parent.exit_code == 1


def test_a_reset_of_the_prefix_cache_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(monkeypatch, lambda config, progress: FakeCore()) as parent:
        parent.send(START)
        parent.until(EngineReady)
        parent.send(ResetPrefixCache(5))
        assert parent.until(PrefixCacheReset) == PrefixCacheReset(5, 17)
        parent.send(add("a"), ResetPrefixCache(6))
        assert parent.until(PrefixCacheReset) == PrefixCacheReset(6, 17)


def test_a_second_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(monkeypatch, lambda config, progress: FakeCore()) as parent:
        parent.send(START)
        parent.until(EngineReady)
        parent.send(START)
        parent.until(EngineFailed)
    assert parent.exit_code == 1


def test_hanging_up_before_the_start_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(monkeypatch, lambda config, progress: FakeCore()) as parent:
        pass
    assert parent.exit_code == 0

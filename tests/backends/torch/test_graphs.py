"""Captured decode steps: what a graph does is recorded and repeated here, as there is no device.

A recording repeats every operation of torch and every launch of a kernel on the tensors, sizes and
numbers that it was made with: whatever of a step lies elsewhere, or is a number, is that of the
step that was captured, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from octavo.backends import torch as backend
from octavo.backends.program import CompileOptions, DeviceOptions
from octavo.backends.torch import graphs
from octavo.backends.torch.graphs import (
    DecodeGraphs,
    is_decode,
    padded_count,
    padded_width,
)
from octavo.backends.torch.program import TorchProgram
from octavo.graph.batch import Batch
from octavo.graph.tensors import StoredTensor
from octavo.graph.trace import CacheDtype, Graph

BLOCK_SIZE = 8
Model = tuple[Graph, dict[str, StoredTensor]]


class Recording(TorchDispatchMode):
    """A captured graph."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.is_capturing = False
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_capturing:
            self.steps.append(lambda: put(func(*args, **(kwargs or {})), result))
        return result

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        """Record from here on."""
        self.is_capturing = True
        self.__enter__()

    def capture_end(self) -> None:
        """Record no more."""
        self.__exit__(None, None, None)
        self.is_capturing = False

    def replay(self) -> None:
        """What a device does with the graph."""
        self.num_replays += 1
        for step in self.steps:
            step()


def put(values: Any, places: Any) -> None:
    """Write results where those of the capture lie, unless they are there or are views."""
    if isinstance(places, torch.Tensor):
        if values.data_ptr() != places.data_ptr():
            places.copy_(values)
    elif isinstance(places, list | tuple):
        for value, place in zip(values, places, strict=True):
            put(value, place)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """All that are made; torch.cuda makes them from here on."""
    made: list[Recording] = []

    def new() -> Recording:
        made.append(Recording())
        return made[-1]

    launch = interpreter.GridExecutor.__call__

    def launch_once(executor: Any, *args: Any, **kwargs: Any) -> None:
        capturing = [recording for recording in made if recording.is_capturing]
        for recording in capturing:
            recording.steps.append(lambda: launch(executor, *args, **kwargs))
            recording.is_capturing = False  # What the interpreter does is none of the graph.
        launch(executor, *args, **kwargs)
        for recording in capturing:
            recording.is_capturing = True

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_once)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    stream = Mock(spec=torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    return made


@pytest.fixture
def model(graph: Graph, weights: dict[str, StoredTensor]) -> Model:
    return graph, weights


def compiled(model: Model, cache_dtype: CacheDtype = "fp16", **device: Any) -> TorchProgram:
    options = CompileOptions(
        num_threads=1,
        block_size=BLOCK_SIZE,
        max_num_tokens=64,
        max_num_rows=16,
        max_model_len=64,
        cache_dtype=cache_dtype,
        device=DeviceOptions(**device),
    )
    program = backend.compile(*model, options)
    program.allocate_cache(24)
    return program


def history(kit: Any) -> Iterator[Batch]:
    """Three prompts, then steps of two to four sequences that come, go and grow beyond a block."""
    rng = np.random.default_rng(4)
    lengths = [5, 9, 3, 7]
    blocks = [[3, 1, 20], [4, 2, 6], [5, 11, 12], [7, 23, 0]]
    prompts = [kit.Part(blocks[s], 0, lengths[s]) for s in range(4)]
    yield kit.batch(prompts, BLOCK_SIZE, token_ids=rng.integers(0, 70, sum(lengths)).tolist())
    for alive in ([0, 1, 2], [0, 1, 2], [2, 0, 1, 3], [0, 3], [3, 1], [1, 3], [1, 2, 3]):
        parts = [kit.Part(blocks[s], lengths[s], 1) for s in alive]
        # The first of them is what the step before has sampled in its second row.
        ids = [-2, *rng.integers(0, 70, len(alive) - 1).tolist()]
        yield kit.batch(parts, BLOCK_SIZE, token_ids=ids)
        for s in alive:
            lengths[s] += 1


@pytest.mark.parametrize(
    ("cache_dtype", "deterministic"),
    [("int8", False), pytest.param("fp16", True, marks=pytest.mark.slow)],
)
def test_a_replay_computes_what_its_step_asks_for(
    kit: Any,
    model: Model,
    recordings: list[Recording],
    cache_dtype: CacheDtype,
    deterministic: bool,
) -> None:
    mode = {"kernels": "triton", "deterministic": deterministic}
    eager, captured = (compiled(model, cache_dtype, **mode) for _ in range(2))
    executor = captured._alive()
    captured._graphs = DecodeGraphs(torch.device("cpu"), executor, BLOCK_SIZE, 16)
    for batch in history(kit):
        rows = kit.rows(len(batch.logits_rows), num_logprobs=2)
        expected, actual = (program.run(batch, rows) for program in (eager, captured))
        assert actual.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    assert [recording.num_replays for recording in recordings] == [3, 2]
    pools = [program._cache.pool for program in (eager, captured) if program._cache is not None]
    assert torch.equal(*pools) or not deterministic


def test_without_memory_for_a_graph_steps_run_as_they_are(
    kit: Any,
    model: Model,
    recordings: list[Recording],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (graphs.LEAST_FREE_BYTES - 1, 0))
    program = compiled(model)
    program._graphs = DecodeGraphs(torch.device("cpu"), program._alive(), BLOCK_SIZE, 16)
    for batch in history(kit):
        assert (program.run(batch, kit.rows(len(batch.logits_rows))).tokens >= 0).all()
    assert not recordings
    (message,) = caplog.messages
    assert message.startswith("255 MiB are free on the device: further sizes of steps")


def test_memory_that_runs_out_in_a_capture_ends_nothing(
    kit: Any, model: Model, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compiled(model)
    executor = program._alive()
    program._graphs = DecodeGraphs(torch.device("cpu"), executor, BLOCK_SIZE, 16)
    run = executor.run

    def run_out(*args: Any) -> Any:
        if any(recording.is_capturing for recording in recordings):
            raise torch.OutOfMemoryError("no memory")
        return run(*args)

    monkeypatch.setattr(executor, "run", run_out)
    for batch in history(kit):
        assert (program.run(batch, kit.rows(len(batch.logits_rows))).tokens >= 0).all()
    assert [recording.num_replays for recording in recordings] == [0], "it is tried once"


def test_sizes_of_captured_steps() -> None:
    counts = [padded_count(count) for count in range(1, 300)]
    assert all(padded >= count for count, padded in enumerate(counts, start=1))
    assert all(padded <= max(8, 1.26 * count + 7) for count, padded in enumerate(counts, start=1))
    assert len(set(counts)) <= 24
    assert [padded_count(n) for n in (1, 2, 3, 9, 64, 65, 256)] == [1, 2, 4, 16, 64, 80, 256]
    assert [padded_width(n, 16) for n in (1, 64, 65, 300, 5000)] == [64, 64, 128, 512, 8192]


def test_what_counts_as_decode(kit: Any) -> None:
    prompts, decode, *_ = history(kit)
    assert is_decode(decode)
    assert not is_decode(prompts)
    assert not is_decode(replace(decode, logits_rows=np.array([0, 2, 1], np.int32)))
    assert not is_decode(replace(decode, logits_rows=np.array([0], np.int32)))

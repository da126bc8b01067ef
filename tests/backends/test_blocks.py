"""Whole KV blocks copied, read and written: alike on every backend, whatever is kept in them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.backends import cpu, reference
from octavo.backends import torch as torch_backend
from octavo.backends.program import Program
from octavo.errors import KernelError
from octavo.graph.batch import Float32
from octavo.graph.trace import Ops, Value

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
NUM_BLOCKS, BLOCK_SIZE = 12, 8


def attend(ops: Ops) -> Value:
    """Three layers of attention over the same named inputs."""
    q, k, v = (ops.input(n, h * HEAD_DIM) for n, h in zip("qkv", (HEADS, 2, 2), strict=True))
    x = q
    for layer in range(LAYERS):
        x = ops.paged_attention(x, k, v, layer, head_dim=HEAD_DIM, scale=0.25)
    return x


@pytest.fixture(params=["fp16", "int8"])
def kv_dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[cpu, reference, torch_backend], ids=["cpu", "reference", "torch"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture
def program(kit: Any, backend: ModuleType, kv_dtype: str) -> Program:
    return make(kit, backend, kv_dtype)


def make(kit: Any, backend: ModuleType, kv_dtype: str, num_blocks: int = NUM_BLOCKS) -> Program:
    options = kit.options(block_size=BLOCK_SIZE, cache_dtype=kv_dtype)
    program: Program = backend.compile(kit.graph(attend), {}, options)
    program.allocate_cache(num_blocks)
    return program


def decode(kit: Any, program: Program, blocks: list[int], start: int, count: int) -> Float32:
    """Tokens `start` on of one sequence, whose K and V are a function of the position alone."""
    rng = np.random.default_rng(start)
    inputs = {
        name: rng.normal(0, 1, (count, heads * HEAD_DIM)).astype(np.float32)
        for name, heads in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)
    }
    batch = kit.batch([kit.Part(blocks, start, count)], BLOCK_SIZE, inputs=inputs)
    out: Float32 = program.run(batch, None, ("out",)).values["out"]
    return out


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def pairs(*values: tuple[int, int]) -> NDArray[np.int32]:
    return np.array(values, np.int32).reshape(-1, 2)


def fill(program: Program) -> NDArray[np.uint8]:
    """Give every block bytes of its own; return them."""
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (NUM_BLOCKS, program.block_bytes()), dtype=np.uint8)
    program.write_blocks(np.arange(NUM_BLOCKS, dtype=np.int32), data)
    return data


def read(program: Program, *blocks: int) -> NDArray[np.uint8]:
    return np.stack(program.read_blocks(ids(*blocks)).result())


def whole(program: Program) -> NDArray[np.uint8]:
    return read(program, *range(NUM_BLOCKS))


def test_what_is_written_is_read(program: Program) -> None:
    assert not whole(program).any()
    data = fill(program)
    assert data.shape == whole(program).shape
    assert whole(program).tobytes() == data.tobytes()
    assert read(program, 7, 0, 7).tobytes() == data[[7, 0, 7]].tobytes()
    program.write_blocks(ids(5, 2), data[:2])
    data[[5, 2]] = data[:2]
    assert whole(program).tobytes() == data.tobytes()


def test_copies_are_made_one_after_another(program: Program) -> None:
    data = fill(program)
    # A chain, a swap by way of a third block, one onto itself, and a block written twice.
    order = [(0, 1), (1, 2), (3, 4), (5, 3), (4, 5), (6, 6), (7, 8), (9, 8), (8, 10)]
    program.copy_blocks(pairs(*order))
    for source, destination in order:
        data[destination] = data[source]
    assert whole(program).tobytes() == data.tobytes()


def test_nothing_asked_for_is_no_fault(program: Program) -> None:
    data = fill(program)
    program.copy_blocks(pairs())
    program.write_blocks(ids(), data[:0])
    assert not program.read_blocks(ids()).result()
    assert whole(program).tobytes() == data.tobytes()


@pytest.mark.parametrize("bad", [-1, NUM_BLOCKS, 2**31 - 1])
def test_ids_outside_the_pool_change_nothing(program: Program, bad: int) -> None:
    data = fill(program)
    for order in ([(0, 1), (bad, 2)], [(0, 1), (2, bad)]):
        with pytest.raises(KernelError, match="a block id lies outside"):
            program.copy_blocks(pairs(*order))
    with pytest.raises(KernelError, match="a block id lies outside"):
        program.read_blocks(ids(0, bad))
    with pytest.raises(KernelError, match="a block id lies outside"):
        program.write_blocks(ids(0, bad), data[[1, 1]])
    assert whole(program).tobytes() == data.tobytes()


def test_arrays_of_another_kind_are_refused(program: Program) -> None:
    data = fill(program)
    for wrong in (pairs((0, 1)).astype(np.int64), ids(0, 1), np.zeros((2, 3), np.int32)):
        with pytest.raises(KernelError):
            program.copy_blocks(wrong)
    for wrong in (ids(0).astype(np.int64), pairs((0, 1))):
        with pytest.raises(KernelError):
            program.read_blocks(wrong)
    for content in (data[:1], data[:2, 1:].copy(), data[:2].astype(np.int32)):
        with pytest.raises(KernelError):
            program.write_blocks(ids(0, 1), content)
    assert whole(program).tobytes() == data.tobytes()


def test_without_a_pool(kit: Any, backend: ModuleType, kv_dtype: str) -> None:
    options = kit.options(block_size=BLOCK_SIZE, cache_dtype=kv_dtype)
    program = backend.compile(kit.graph(attend), {}, options)
    with pytest.raises(KernelError, match="cache"):
        program.copy_blocks(pairs((0, 1)))
    with pytest.raises(KernelError, match="cache"):
        program.read_blocks(ids(0))
    program.close()
    with pytest.raises(KernelError, match="closed"):
        program.read_blocks(ids(0))


def test_a_decode_reads_copies_as_it_reads_the_blocks(kit: Any, program: Program) -> None:
    """Over copies, and over blocks that went through another Program, the same bits."""
    decode(kit, program, [4, 1, 6], 0, 20)
    kept = read(program, 4, 1, 6)
    program.copy_blocks(pairs((4, 0), (1, 9), (6, 11)))
    expected = decode(kit, program, [4, 1, 6], 20, 1)
    assert decode(kit, program, [0, 9, 11], 20, 1).tobytes() == expected.tobytes()
    program.write_blocks(ids(2, 3, 5), kept)
    assert decode(kit, program, [2, 3, 5], 20, 1).tobytes() == expected.tobytes()
    # The last block, of which only four tokens were written, is a part of what decides.
    program.write_blocks(ids(2, 3, 5), kept[[0, 1, 1]])
    assert decode(kit, program, [2, 3, 5], 20, 1).tobytes() != expected.tobytes()


def test_another_program_of_the_same_kind_reads_the_blocks(
    kit: Any, backend: ModuleType, kv_dtype: str
) -> None:
    first, second = (make(kit, backend, kv_dtype, count) for count in (NUM_BLOCKS, 5))
    decode(kit, first, [10, 3, 7], 0, 20)
    second.write_blocks(ids(1, 4, 0), read(first, 10, 3, 7))
    expected = decode(kit, first, [10, 3, 7], 20, 1)
    assert decode(kit, second, [1, 4, 0], 20, 1).tobytes() == expected.tobytes()


def test_many_blocks_over_many_threads(kit: Any, kv_dtype: str) -> None:
    """Enough bytes that several threads share the work."""
    options = kit.options(block_size=64, num_threads=3, cache_dtype=kv_dtype)
    program = cpu.compile(kit.graph(attend), {}, options)
    program.allocate_cache(200)
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (200, program.block_bytes()), dtype=np.uint8)
    every = np.arange(200, dtype=np.int32)
    program.write_blocks(every, data)
    order = rng.integers(0, 200, (300, 2)).astype(np.int32)
    program.copy_blocks(order)
    for source, destination in order:
        data[destination] = data[source]
    assert read(program, *range(200)).tobytes() == data.tobytes()

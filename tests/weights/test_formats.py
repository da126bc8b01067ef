"""Every format's stored form against the gguf package's dequantization, bit for bit."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.graph.tensors import BlockScales, DenseTensor, GroupedTensor, GroupScales
from octavo.weights.formats.registry import BLOCKS, SUPPORTED, read_tensor
from octavo.weights.gguf import TENSOR_TYPES, GGUFFile
from octavo.weights.mapping import TensorInfo

Blocks = Callable[[str, int, int], NDArray[np.uint8]]
SIZES = {kind.name: kind for kind in TENSOR_TYPES.values()}


def mapped(
    data: NDArray[np.uint8],
    name: str,
    shape: tuple[int, ...],
    offset: int = 0,
    rows: NDArray[np.int64] | None = None,
) -> object:
    buffer = mmap.mmap(-1, offset + data.size)
    buffer[offset:] = data.tobytes()
    return read_tensor(TensorInfo("x", shape, name, offset, data.size), buffer, rows)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    assert values.dtype == np.float32
    return np.ascontiguousarray(values).view(np.uint32)


def expected(data: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def test_the_supported_formats() -> None:
    assert set(SUPPORTED) == {
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    }


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("rows", "per_row"), [(1, 1), (1, 5), (7, 1), (5, 3)])
def test_grouped_formats(blocks: Blocks, name: str, rows: int, per_row: int) -> None:
    data = blocks(name, rows, per_row)
    shape = (rows, per_row * SIZES[name].block_len)
    tensor = mapped(data, name, shape)
    assert isinstance(tensor, GroupedTensor)
    assert tensor.shape == shape
    assert tensor.format == name
    np.testing.assert_array_equal(bits(tensor.dequantize()), bits(expected(data, name)))
    assert int(tensor.codes.values().max()) < 1 << tensor.bits
    order = np.random.default_rng(1).permutation(rows)
    for reordered in (tensor.take_rows(order), mapped(data, name, shape, rows=order)):
        assert isinstance(reordered, GroupedTensor)
        np.testing.assert_array_equal(
            bits(reordered.dequantize()), bits(expected(data[order], name))
        )


@pytest.mark.parametrize("name", BLOCKS)
def test_every_code_of_a_format_occurs_and_every_bit_counts(blocks: Blocks, name: str) -> None:
    """Over many random blocks each place takes each code: no bit is read twice or never."""
    data = blocks(name, 4096 if name == "Q8_0" else 1024, 1)
    tensor = mapped(data, name, (data.shape[0], SIZES[name].block_len))
    assert isinstance(tensor, GroupedTensor)
    codes = tensor.codes.values()
    for place in range(codes.shape[1]):
        assert len(np.unique(codes[:, place])) == 1 << tensor.bits, place


@pytest.mark.parametrize("name", BLOCKS)
def test_codes_are_views_of_the_file(blocks: Blocks, name: str) -> None:
    data = blocks(name, 2, 2)
    buffer = mmap.mmap(-1, data.size)
    buffer[:] = data.tobytes()
    info = TensorInfo("x", (2, 2 * SIZES[name].block_len), name, 0, data.size)
    tensor = read_tensor(info, buffer)
    assert isinstance(tensor, GroupedTensor)
    before = tensor.codes.values().copy()
    buffer[:] = bytes(byte ^ 0xFF for byte in data.tobytes())
    assert (tensor.codes.values() != before).all()
    for plane in tensor.codes.planes:
        assert plane.byte_of.dtype == np.uint16
        assert plane.shift_of.dtype == np.uint8
        assert len(plane.byte_of) == len(plane.shift_of) == SIZES[name].block_len
        assert int(plane.byte_of.max()) == plane.data.shape[2] - 1
        assert int(plane.shift_of.max()) + plane.bits <= 8
    assert isinstance(tensor.scales, BlockScales if name.endswith("K") else GroupScales)


@pytest.mark.parametrize(("name", "zero"), [("Q4_0", 8), ("Q5_0", 16), ("Q8_0", 128)])
def test_zero_codes(blocks: Blocks, name: str, zero: int) -> None:
    tensor = mapped(blocks(name, 1, 1), name, (1, 32))
    assert isinstance(tensor, GroupedTensor)
    assert (tensor.codes.zero, tensor.group, tensor.minimums) == (zero, 32, None)


@pytest.mark.parametrize("offset", [0, 1, 2, 64])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_dense_formats(shape: tuple[int, ...], offset: int) -> None:
    values = np.array([0.0, -0.0, 1.5, -3e-30, np.inf, 65504.0], dtype=np.float32)
    patterns = {
        "F32": values.view(np.uint8),
        "F16": values.astype(np.float16).view(np.uint8),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8),
    }
    for name, data in patterns.items():
        tensor = mapped(data, name, shape, offset)
        assert isinstance(tensor, DenseTensor)
        assert tensor.shape == shape
        assert tensor.dtype == name.lower()
        np.testing.assert_array_equal(
            bits(tensor.dequantize().reshape(-1)), bits(expected(data, name).reshape(-1))
        )


def test_unsupported_formats_are_named_with_the_supported_ones() -> None:
    with pytest.raises(ModelFileError, match=r"tensor x .* IQ4_XS, .*; take .* Q4_1.* Q6_K"):
        mapped(np.zeros(136, np.uint8), "IQ4_XS", (1, 256))
    with pytest.raises(ModelFileError, match="3 dimensions"):
        mapped(np.zeros(20, np.uint8), "Q4_1", (1, 1, 32))


def test_corrupt_scales_are_no_crash(blocks: Blocks) -> None:
    """Infinities and NaNs of a file come through as they are, without a warning."""
    for name in BLOCKS:
        data = np.full_like(blocks(name, 1, 1), 0xFF)
        tensor = mapped(data, name, (1, SIZES[name].block_len))
        assert isinstance(tensor, GroupedTensor)
        assert np.isnan(tensor.scales.values()).all()


def test_the_default_model(smollm2_path: Path) -> None:
    """A sample of every type and part of the real file, bit for bit."""
    with GGUFFile.open(smollm2_path) as file:
        infos = [i for n, i in file.tensors.items() if "blk." not in n or ".0." in n or ".29." in n]
        assert {info.type for info in infos} >= {"F32", "Q4_1"}
        for info in infos:
            rows = min(info.shape[0], 3000)
            part = TensorInfo(
                info.name,
                (rows, *info.shape[1:]),
                info.type,
                info.offset,
                info.nbytes // info.shape[0] * rows,
            )
            tensor = read_tensor(part, file.buffer)
            data = np.frombuffer(file.buffer, np.uint8, part.nbytes, part.offset)
            theirs = expected(data.reshape(rows, -1).copy(), info.type).reshape(part.shape)
            np.testing.assert_array_equal(bits(tensor.dequantize()), bits(theirs))

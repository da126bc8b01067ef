"""Stored weights on the device: what is packed means what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.backends.torch import weights
from octavo.backends.torch.kernels import QuantizedWeight
from octavo.backends.torch.uploads import Uploads
from octavo.graph.tensors import BlockFloatTensor, DenseTensor, GroupedTensor, GroupScales
from octavo.weights.formats.layout import BlockLayout
from octavo.weights.formats.registry import BLOCKS

CPU = Uploads(torch.device("cpu"))


def file_tensor(
    rng: np.random.Generator, layout: BlockLayout, rows: int, per_row: int
) -> GroupedTensor:
    """Random bytes of a file's format, with scales of ordinary size."""
    data = rng.integers(0, 256, (rows, per_row, layout.block_bytes), np.uint8)
    for halves in (layout.scales, layout.minimums):
        if halves is not None:
            values = rng.normal(0, 1, (rows, per_row, 1)).astype("<f2")
            data[:, :, halves.start : halves.start + 2] = values.view(np.uint8)
    return layout.read(data.reshape(-1), (rows, per_row * layout.block_len))


def bound(weight: GroupedTensor) -> np.ndarray:
    """What rounding scales and minimums to float16 may change of each weight."""
    peak = np.abs(weight.scales.values()) * 2.0**weight.bits
    if weight.minimums is not None:
        peak = peak + np.abs(weight.minimums.values())
    return np.repeat(peak, weight.group, 1) * 2.0**-11


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(kit: Any, rng: np.random.Generator, stored: str, dtype: torch.dtype) -> None:
    tensor = kit.dense(rng.normal(0, 1, (5, 7)), stored)
    tensor = DenseTensor(tensor.data[1::2], tensor.dtype)  # strided
    tensor.data.flags.writeable = False
    expected = torch.from_numpy(tensor.dequantize()).to(dtype)
    assert torch.equal(weights.dense(tensor, dtype, CPU), expected)


def test_dense_of_an_unaligned_map() -> None:
    raw = np.zeros(9, np.uint8)
    raw[1:] = np.arange(4, dtype="<f2").view(np.uint8)
    tensor = DenseTensor(raw[1:].view("<f2"), "f16")
    assert weights.dense(tensor, torch.float32, CPU).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("layout", BLOCKS.values(), ids=BLOCKS)
def test_every_format(
    rng: np.random.Generator, layout: BlockLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 3000)  # several chunks, the last one short
    tensor = file_tensor(rng, layout, 11, 3)
    expected = tensor.dequantize()
    assert np.array_equal(weights.dense(tensor, torch.float32, CPU).numpy(), expected)
    packed = weights.pack_grouped(tensor, CPU)
    assert packed.bits == (4 if layout.bits <= 4 else 8)
    assert packed.shape == tensor.shape
    difference = np.abs(weights.unpack_grouped(packed).numpy() - expected)
    exact = isinstance(tensor.scales, GroupScales)
    assert (difference <= (0 if exact else bound(tensor))).all()


@pytest.mark.parametrize("size", [2.0**-24, 1.0, 60000.0])
def test_scales_neither_overflow_nor_vanish(
    kit: Any, rng: np.random.Generator, size: float
) -> None:
    tensor = kit.grouped(rng, 4, 256, 4, 32, minimums=False, two_level=True)
    tensor.scales.d[:] = size
    tensor.scales.d[3] = 0
    packed = weights.pack_grouped(tensor, CPU)
    scales, _ = weights.unpack_scales(packed)
    assert scales.isfinite().all()
    expected = tensor.dequantize()
    difference = np.abs(weights.unpack_grouped(packed).numpy() - expected)
    assert (difference <= np.abs(expected) * 2.0**-11).all()


@pytest.mark.parametrize("minimums", [False, True])
def test_damage_stays_in_its_group(kit: Any, rng: np.random.Generator, minimums: bool) -> None:
    tensor = kit.grouped(rng, 3, 64, 4, 32, minimums=minimums)
    tensor.scales.halves[1, 1] = np.nan
    values = weights.unpack_grouped(weights.pack_grouped(tensor, CPU)).numpy()
    is_damaged = np.zeros((3, 64), bool)
    is_damaged[1, 32:] = True
    assert np.array_equal(np.isnan(values), is_damaged)
    assert np.array_equal(values[~is_damaged], tensor.dequantize()[~is_damaged])


@pytest.mark.parametrize(
    ("bits", "group"), [(4, 16), (4, 32), (3, 64), (4, 128), (8, 16), (8, 128)]
)
@pytest.mark.parametrize("minimums", [False, True])
def test_concat_grouped(
    kit: Any, rng: np.random.Generator, bits: int, group: int, minimums: bool
) -> None:
    tensors = [kit.grouped(rng, rows, 384, bits, group, minimums=minimums) for rows in (3, 5)]
    packed = [weights.pack_grouped(tensor, CPU) for tensor in tensors]
    assert weights.can_concat(packed)
    both = weights.concat(packed)
    assert both.shape == (8, 384)
    expected = np.concatenate([tensor.dequantize() for tensor in tensors])
    assert np.array_equal(weights.unpack_grouped(both).numpy(), expected)
    other = weights.pack_grouped(kit.grouped(rng, 3, 384, bits, group, minimums=not minimums), CPU)
    assert not weights.can_concat([packed[0], other])
    assert not weights.can_concat([packed[0], torch.zeros(3, 384)])


@pytest.mark.parametrize("block", [(1, 300), (270, 300), (128, 128), (64, 128), (1, 128)])
def test_fp8_as_stored(
    rng: np.random.Generator, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 100 * 300)
    grid = -(-270 // block[0]), -(-300 // block[1])
    codes = rng.integers(0, 256, (270, 300), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    tensor = BlockFloatTensor(codes, rng.random(grid, np.float32), block)
    expected = torch.from_numpy(tensor.dequantize())
    assert torch.equal(weights.dense(tensor, torch.float32, CPU), expected)
    assert torch.equal(weights.dense(tensor, torch.bfloat16, CPU), expected.bfloat16())
    assert weights.can_pack_fp8(tensor) == (block in ((1, 300), (270, 300), (128, 128)))
    if weights.can_pack_fp8(tensor):
        packed = weights.pack_fp8(tensor, CPU)
        assert torch.equal(weights.dequantize(packed), expected)


@pytest.mark.parametrize("mode", ["int8 row", "fp8 row", "fp8 block"])
def test_quantize_dense(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 300 * 128)
    weight = torch.randn(270, 300) * torch.logspace(-3, 3, 270)[:, None]
    weight[7] = 0
    quantized = weights.quantize_dense(weight, mode)
    assert quantized.scales.shape == ((3, 3) if mode == "fp8 block" else (270, 1))
    back = weights.dequantize(quantized)
    if mode == "int8 row":
        assert ((back - weight).abs() <= weight.abs().amax(1, keepdim=True) * 0.504 / 127).all()
    else:  # three bits of mantissa, and subnormals
        peak = weight.abs().amax() if mode == "fp8 block" else weight.abs().amax(1, keepdim=True)
        assert ((back - weight).abs() <= weight.abs() / 15.9 + peak * 2.0**-18).all()
    assert (back[7] == 0).all()


@pytest.mark.parametrize("mode", ["int8 row", "fp8 row", "fp8 block"])
def test_quantize_dense_keeps_damage(mode: str) -> None:
    weight = torch.ones(130, 140)
    weight[129, 3] = torch.inf
    back = weights.dequantize(weights.quantize_dense(weight, mode))
    bad = back.isnan()
    assert bad[129, :128].all()
    assert not bad[:128].any()


@pytest.mark.parametrize("mode", ["int8 row", "fp8 row", "fp8 block", "fp8 whole"])
def test_concat_quantized(mode: str) -> None:
    parts = [torch.randn(rows, 200) for rows in (128, 130)]
    if mode == "fp8 whole":
        quantized = [
            QuantizedWeight(p.to(torch.float8_e4m3fn), torch.tensor([[s]]))
            for p, s in zip(parts, (0.5, 2.0), strict=True)
        ]
    else:
        quantized = [weights.quantize_dense(part, mode) for part in parts]
    assert weights.can_concat(quantized)
    both = weights.concat(quantized)
    expected = torch.cat([weights.dequantize(q) for q in quantized])
    assert torch.equal(weights.dequantize(both), expected)
    # Blocks of rows that are not whole cannot be followed by others.
    assert weights.can_concat(quantized[::-1]) == (mode != "fp8 block")

"""Stored weights on the device: dense, packed in groups, or as int8 and fp8 codes.

The bytes of the file go to the device as they are and are unpacked there, some rows at a time.

Grouped weights are packed for products (Triton's kernels and `unpack_grouped` read this layout): a
block is 16 words of 32 bits of a row: 4 units of 4 words. A unit has consecutive columns, 32 with 4
bits and 16 with 8; word w of it has its columns w, w + 4, w + 8 and so on, the first in the lowest
bits. So a thread that loads a unit, 16 bytes, needs one scale (two if groups have 16 columns and
codes 4 bits), and x by fours. Blocks stand as [blocks, out_features, 16], so that what the
rows of a tile need of a block is one piece of memory. Scales and minimums are float16, two in 32
bits, the least that a kernel copies ahead: the scale and the minimum of a group, or the scales of
two groups in a row; such pairs stand as [pairs, out_features]. Each row has a power of two that its
scales and minimums are multiplied with, so that none overflows and those of float16 (one level)
stay as they are; those of two levels (the K-quants) are rounded to 11 bits.

Bytes a weight with 4 bits: 0.5625 with groups of 32, 0.625 with minimums too; with 8 bits 1.0625,
and 1.125 with groups of 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from octavo.backends.torch.kernels import GroupedWeight, QuantizedWeight
from octavo.backends.torch.uploads import Uploads
from octavo.errors import KernelError
from octavo.graph.tensors import (
    BlockFloatTensor,
    Codes,
    DenseTensor,
    GroupedTensor,
    GroupScales,
    Scales,
    StoredTensor,
)

WeightMode = Literal["int8 row", "fp8 row", "fp8 block"]
"""One scale a row, or one a block of 128 rows by 128 columns."""

WORDS, UNITS = 16, 4
"""Words and units of a block."""
BLOCK = 128
"""Rows and columns that share a scale in "fp8 block"."""

_CHUNK = 1 << 25
"""Numbers that are unpacked at a time."""
_INT8_MAX, _FP8_MAX = 127.0, 448.0
_SMALLEST_PEAK = 2.0**-120
_TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Weight: TypeAlias = Tensor | GroupedWeight | QuantizedWeight


def block_columns(bits: int) -> int:
    """Columns of a block of words."""
    return WORDS * 32 // bits


def dense(tensor: StoredTensor, dtype: torch.dtype, uploads: Uploads) -> Tensor:
    """A weight in floating point, of any stored form, rounded once."""
    if isinstance(tensor, DenseTensor):
        stored = uploads.put(tensor.data)
        if tensor.dtype == "bf16":
            stored = stored.view(torch.bfloat16)
        return stored.to(dtype)
    if isinstance(tensor, BlockFloatTensor):
        return _dense_of_fp8(tensor, dtype, uploads)
    out = torch.empty(tensor.shape, dtype=dtype, device=uploads.device)
    for rows in _chunks(tensor.shape):
        values = _codes(tensor.codes, rows, uploads).to(torch.float32) - tensor.codes.zero
        groups = values.unflatten(1, (-1, tensor.group))
        groups = groups * _scales(tensor.scales, rows, uploads)[:, :, None]
        if tensor.minimums is not None:
            groups = groups + _scales(tensor.minimums, rows, uploads)[:, :, None]
        out[rows] = groups.flatten(1).to(dtype)
    return out


def pack_grouped(tensor: GroupedTensor, uploads: Uploads) -> GroupedWeight:
    """Pack a grouped weight for products.

    Raises:
        KernelError: its groups are not whole units.
    """
    num_rows, columns = tensor.shape
    if tensor.group != 16 and tensor.group % 32:
        raise KernelError(
            f"groups of {tensor.group} columns are not supported; take a file with groups of 16 "
            "or a multiple of 32"
        )
    bits = 4 if tensor.bits <= 4 else 8
    device = uploads.device
    num_blocks = -(-columns // block_columns(bits))
    num_groups = -(-num_blocks * block_columns(bits) // tensor.group)
    words = torch.empty((num_blocks, num_rows, WORDS), dtype=torch.int32, device=device)
    shape = (num_groups, num_rows)
    scales = torch.zeros(shape, dtype=torch.float16, device=device)
    minimums = None if tensor.minimums is None else torch.zeros_like(scales)
    factors = torch.empty(num_rows, dtype=torch.float32, device=device)
    for rows in _chunks(tensor.shape):
        words[:, rows] = pack_words(_codes(tensor.codes, rows, uploads), bits)
        scale = _scales(tensor.scales, rows, uploads)
        peak = scale.abs() * 2.0**bits
        if tensor.minimums is not None and minimums is not None:
            minimum = _scales(tensor.minimums, rows, uploads)
            peak = peak + minimum.abs()
            factors[rows], up = _row_factors(peak)
            minimums[: minimum.shape[1], rows] = (minimum * up).to(torch.float16).T
        else:
            factors[rows], up = _row_factors(peak)
        scales[: scale.shape[1], rows] = (scale * up).to(torch.float16).T
    return GroupedWeight(
        codes=words,
        scales=pack_scales(scales, minimums),
        has_minimums=minimums is not None,
        factors=factors,
        bits=bits,
        zero=tensor.codes.zero,
        group=tensor.group,
        shape=(num_rows, columns),
    )


def pack_scales(scales: Tensor, minimums: Tensor | None) -> Tensor:
    """Scales and minimums, float16 [groups, out_features], as a GroupedWeight has them."""
    if minimums is None:
        even = torch.nn.functional.pad(scales, (0, 0, 0, len(scales) % 2))
        scales, minimums = even[0::2], even[1::2]
    return torch.stack((scales, minimums), 2).view(torch.int32).squeeze(2)


def unpack_scales(weight: GroupedWeight) -> tuple[Tensor, Tensor | None]:
    """The scales and minimums of `pack_scales`; perhaps one group more."""
    halves = weight.scales.view(torch.float16).unflatten(1, (-1, 2))
    if weight.has_minimums:
        return halves[:, :, 0], halves[:, :, 1]
    return halves.transpose(1, 2).flatten(0, 1), None


def unpack_grouped(weight: GroupedWeight) -> Tensor:
    """The weight in float32, [out_features, in_features]: what products with it mean."""
    num_rows, columns = weight.shape
    shifts = torch.arange(0, 32, weight.bits, dtype=torch.int32, device=weight.codes.device)
    units = weight.codes.unflatten(2, (UNITS, 1, -1)) >> shifts[:, None]
    codes = (units & (2**weight.bits - 1)).transpose(0, 1).reshape(num_rows, -1)[:, :columns]
    values = (codes - weight.zero).to(torch.float32)
    groups = values.unflatten(1, (-1, weight.group))
    num_groups = columns // weight.group
    scales, minimums = unpack_scales(weight)
    groups = groups * scales[:num_groups].T[:, :, None].to(torch.float32)
    if minimums is not None:
        groups = groups + minimums[:num_groups].T[:, :, None].to(torch.float32)
    return groups.flatten(1) * weight.factors[:, None]


def has_row_scales(tensor: BlockFloatTensor) -> bool:
    """Whether a scale is of a row or of the whole."""
    rows, columns = tensor.shape
    return tensor.scales.shape in ((1, 1), (rows, 1)) and tensor.block[1] >= columns


def can_pack_fp8(tensor: BlockFloatTensor) -> bool:
    """Whether its blocks are rows, the whole, or 128 by 128: what products with codes know."""
    return has_row_scales(tensor) or tensor.block == (BLOCK, BLOCK)


def pack_fp8(tensor: BlockFloatTensor, uploads: Uploads) -> QuantizedWeight:
    """A weight that is stored in fp8, its codes as they are; see `can_pack_fp8`."""
    assert can_pack_fp8(tensor)
    return QuantizedWeight(
        uploads.put(tensor.codes).view(torch.float8_e4m3fn),
        uploads.put(tensor.scales),
    )


def quantize_dense(weight: Tensor, mode: WeightMode) -> QuantizedWeight:
    """Round a matrix to int8 or fp8 codes, on its device.

    A row or block that holds NaN or infinity becomes NaN as a whole: damage stays visible.
    """
    dtype = torch.int8 if mode == "int8 row" else torch.float8_e4m3fn
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = []
    for rows in _chunks((weight.shape[0], weight.shape[1]), BLOCK):
        part = weight[rows].to(torch.float32)
        peak = _block_peaks(part) if mode == "fp8 block" else part.abs().amax(1, keepdim=True)
        peak = torch.where(peak < _SMALLEST_PEAK, 0.0, peak)
        top = _INT8_MAX if mode == "int8 row" else _FP8_MAX
        factor = torch.where(peak == 0, 0.0, top / peak)
        if mode == "fp8 block":
            factor = _spread(factor, part.shape)
        scaled = torch.nan_to_num(part * factor, nan=0.0, posinf=0.0, neginf=0.0)
        codes[rows] = (scaled.round() if mode == "int8 row" else scaled).to(dtype)
        scales.append(torch.where(peak.isfinite(), peak / top, torch.nan))
    return QuantizedWeight(codes, torch.cat(scales))


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The weight in float32: what products with it mean."""
    values = weight.codes.to(torch.float32)
    is_blocked = has_block_scales(weight)
    return values * (_spread(weight.scales, values.shape) if is_blocked else weight.scales)


def has_block_scales(weight: QuantizedWeight) -> bool:
    """Whether its scales are of blocks, not of rows or of the whole."""
    rows, columns = weight.scales.shape
    return columns > 1 or rows not in (1, weight.codes.shape[0])


def can_concat(weights: Sequence[Weight]) -> bool:
    """Whether `concat` takes them: weights of one form, in blocks of rows that are whole."""
    first = weights[0]
    if isinstance(first, Tensor):
        return all(isinstance(w, Tensor) and w.dtype == first.dtype for w in weights)
    if isinstance(first, GroupedWeight):
        return all(isinstance(w, GroupedWeight) and _form(w) == _form(first) for w in weights)
    parts = [w for w in weights if isinstance(w, QuantizedWeight)]
    if len(parts) < len(weights) or any(w.codes.dtype != first.codes.dtype for w in parts):
        return False
    if not any(has_block_scales(w) for w in parts):
        return True
    return all(has_block_scales(w) for w in parts) and all(
        w.codes.shape[0] % BLOCK == 0 for w in parts[:-1]
    )


def concat(weights: Sequence[Weight]) -> Weight:
    """One weight of all their out_features, one after another; see `can_concat`."""
    assert can_concat(weights)
    first = weights[0]
    if isinstance(first, Tensor):
        joined: Tensor = torch.cat(list(weights))
        return joined
    if isinstance(first, GroupedWeight):
        return _concat_grouped(cast("Sequence[GroupedWeight]", weights))
    parts = cast("Sequence[QuantizedWeight]", weights)
    scales = [
        w.scales if has_block_scales(w) else w.scales.expand(w.codes.shape[0], 1) for w in parts
    ]
    return QuantizedWeight(
        torch.cat([w.codes.view(torch.uint8) for w in parts]).view(first.codes.dtype),
        torch.cat(scales),
    )


def _concat_grouped(weights: Sequence[GroupedWeight]) -> GroupedWeight:
    first = weights[0]
    return GroupedWeight(
        codes=torch.cat([w.codes for w in weights], 1),
        scales=torch.cat([w.scales for w in weights], 1),
        has_minimums=first.has_minimums,
        factors=torch.cat([w.factors for w in weights]),
        bits=first.bits,
        zero=first.zero,
        group=first.group,
        shape=(sum(w.shape[0] for w in weights), first.shape[1]),
    )


def _form(weight: GroupedWeight) -> tuple[object, ...]:
    return weight.bits, weight.zero, weight.group, weight.shape[1], weight.has_minimums


def _chunks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Slices of rows of about _CHUNK numbers."""
    step = max(1, _CHUNK // max(1, shape[1]) // multiple) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _dense_of_fp8(tensor: BlockFloatTensor, dtype: torch.dtype, uploads: Uploads) -> Tensor:
    out = torch.empty(tensor.shape, dtype=dtype, device=uploads.device)
    column_block = torch.arange(tensor.shape[1], device=uploads.device) // tensor.block[1]
    for rows in _chunks(tensor.shape):
        values = uploads.put(tensor.codes[rows]).view(torch.float8_e4m3fn)
        row_block = np.arange(rows.start, rows.stop) // tensor.block[0]
        scales = uploads.put(tensor.scales[row_block])
        out[rows] = (values.to(torch.float32) * scales.index_select(1, column_block)).to(dtype)
    return out


def _codes(codes: Codes, rows: slice, uploads: Uploads) -> Tensor:
    """Codes of some rows, uint8 [rows, columns]."""
    total: Tensor | None = None
    for plane in codes.planes:
        data = uploads.put(plane.data[rows])
        byte_of = uploads.put(plane.byte_of.astype(np.int64))
        shift_of = uploads.put(plane.shift_of)
        part = (data.index_select(2, byte_of) ^ plane.flip) >> shift_of
        part = (part & ((1 << plane.bits) - 1)) << plane.lift
        total = part if total is None else total + part
    assert total is not None
    return total.flatten(1)


def _scales(scales: Scales, rows: slice, uploads: Uploads) -> Tensor:
    """Scales of some rows, float32 [rows, groups], exact."""
    if isinstance(scales, GroupScales):
        return uploads.put(scales.halves[rows]).to(torch.float32)
    factors = _codes(scales.factors, rows, uploads).to(torch.float32) - scales.factors.zero
    d = uploads.put(scales.d[rows]).to(torch.float32) * scales.sign
    return (d[:, :, None] * factors.unflatten(1, (d.shape[1], -1))).flatten(1)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] as words, int32 [blocks, rows, 16]."""
    columns = codes.shape[1]
    block = block_columns(bits)
    padded = torch.nn.functional.pad(codes, (0, -columns % block))
    fours = padded.unflatten(1, (-1, UNITS, 32 // bits, WORDS // UNITS))
    if bits == 4:
        fours = fours[:, :, :, 0::2] | fours[:, :, :, 1::2] << 4
    return fours.permute(1, 0, 2, 4, 3).contiguous().view(torch.int32).flatten(2)


def _row_factors(peak: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two for each row, and what makes its greatest number 2**14 to 2**15.

    So no weight in these units overflows float16, and few small scales fall below its least.
    """
    greatest = torch.where(peak.isfinite(), peak, 0.0).amax(1, keepdim=True)
    exponent = torch.frexp(greatest).exponent - 15
    exponent = torch.where(greatest == 0, 0, exponent)
    one = torch.ones_like(greatest)
    return torch.ldexp(one, exponent)[:, 0], torch.ldexp(one, -exponent)


def _block_peaks(part: Tensor) -> Tensor:
    """The greatest magnitude of each block of 128 by 128; a NaN stays one."""
    rows, columns = part.shape
    padded = torch.nn.functional.pad(part, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))


def _spread(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """A number of each block, for each weight."""
    wide = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[: shape[0], : shape[1]]

"""The stored forms of a weight, whatever its file: dense, integers in groups, or FP8 in blocks.

`weights/formats` makes these from a file's bytes, without copying where it can; backends repack
from them. Nobody above or below knows GGUF's types or the tensors of GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

DenseDtype = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A weight in floating point.

    Attributes:
        data: [out_features, in_features] or [features]; float32, float16, or uint16 that holds
            bfloat16 bits. May be a read-only view of a mapped file and unaligned.
        dtype: which of the three.
    """

    data: NDArray[np.generic]
    dtype: DenseDtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(self.data.nbytes)

    def take_rows(self, rows: NDArray[np.int64]) -> DenseTensor:
        """The same weight with its rows reordered (copies)."""
        return replace(self, data=self.data[rows])

    def dequantize(self) -> NDArray[np.float32]:
        """The weight in float32 (copies)."""
        if self.dtype == "bf16":
            return (self.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.data.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of every code of a tensor, as they lie in a file's blocks.

    Of element e of a block (0 <= e < len(byte_of)) this plane holds `bits` bits:
    ((data[row, block, byte_of[e]] ^ flip) >> shift_of[e]) & (2**bits - 1), which count 2**lift in
    the code.

    Attributes:
        data: uint8 [rows, blocks, bytes], a strided view of the mapped file.
        byte_of, shift_of: uint8 or uint16 / uint8 [elements a block].
    """

    data: NDArray[np.uint8]
    byte_of: NDArray[np.uint16]
    shift_of: NDArray[np.uint8]
    bits: int
    lift: int = 0
    flip: int = 0


@dataclass(frozen=True, slots=True)
class Codes:
    """Small unsigned integers, their bits spread over planes.

    Attributes:
        planes: the bits; a code is the sum of its planes' bits, each shifted left by its lift.
        zero: the code that stands for 0.
    """

    planes: tuple[Plane, ...]
    zero: int

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(p.data.size for p in self.planes)

    def take_rows(self, rows: NDArray[np.int64]) -> Codes:
        """The same codes with their rows reordered (copies)."""
        return replace(self, planes=tuple(replace(p, data=p.data[rows]) for p in self.planes))

    def values(self) -> NDArray[np.uint8]:
        """All codes, [rows, columns] uint8: slow and obvious."""
        rows, blocks = self.planes[0].data.shape[:2]
        total = np.zeros((rows, blocks * len(self.planes[0].byte_of)), np.uint8)
        for plane in self.planes:
            value = (plane.data[:, :, plane.byte_of] ^ np.uint8(plane.flip)) >> plane.shift_of
            part = (value & np.uint8((1 << plane.bits) - 1)) << np.uint8(plane.lift)
            total += part.reshape(total.shape)
        return total


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Scales or minimums of two levels, exact: sign * d * (factor - zero).

    The K-quants have them so, and zero points are minimums of this form: -scale * (zero point - 8).

    Attributes:
        d: float16 [rows, blocks]; may be an unaligned strided view.
        factors: one a group: [rows, in_features / group].
        sign: 1 or -1.
    """

    d: NDArray[np.float16]
    factors: Codes
    sign: int

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, groups]."""
        plane = self.factors.planes[0]
        return self.d.shape[0], self.d.shape[1] * len(plane.byte_of)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(self.d.nbytes) + self.factors.nbytes

    def take_rows(self, rows: NDArray[np.int64]) -> BlockScales:
        """The same scales with their rows reordered (copies)."""
        return replace(self, d=self.d[rows], factors=self.factors.take_rows(rows))

    def repeat(self, times: int) -> BlockScales:
        """Each of them so many times, for groups that are smaller by as much."""
        planes = tuple(
            replace(p, byte_of=p.byte_of.repeat(times), shift_of=p.shift_of.repeat(times))
            for p in self.factors.planes
        )
        return replace(self, factors=replace(self.factors, planes=planes))

    def values(self) -> NDArray[np.float32]:
        """All of them, [rows, groups] float32."""
        factors = self.factors.values().astype(np.float32) - np.float32(self.factors.zero)
        d = np.float32(self.sign) * self.d.astype(np.float32)
        with np.errstate(invalid="ignore"):  # a file may hold infinities; they are its own affair
            product = d[:, :, None] * factors.reshape(*self.d.shape, -1)
        return product.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class GroupScales:
    """Scales or minimums of one level: a float16 a group.

    Attributes:
        halves: float16 [rows, in_features / group]; may be an unaligned strided view.
    """

    halves: NDArray[np.float16]

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, groups]."""
        return self.halves.shape[0], self.halves.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(self.halves.nbytes)

    def take_rows(self, rows: NDArray[np.int64]) -> GroupScales:
        """The same scales with their rows reordered (copies)."""
        return GroupScales(self.halves[rows])

    def repeat(self, times: int) -> GroupScales:
        """Each of them so many times (copies), for groups that are smaller by as much."""
        return GroupScales(self.halves.repeat(times, axis=1))

    def values(self) -> NDArray[np.float32]:
        """All of them, [rows, groups] float32."""
        return self.halves.astype(np.float32)


Scales = GroupScales | BlockScales

SMALL_GROUP = 32
"""Columns of the largest group that every backend's kernels for rounded activations know."""


@dataclass(frozen=True, slots=True)
class GroupedTensor:
    """A weight as unsigned integer codes with a scale, and perhaps a minimum, a group of columns.

    w[n, k] = scales[n, k // group] * (codes[n, k] - zero) + minimums[n, k // group], in float32,
    each product and sum rounded once (minimums absent: nothing is added).

    Attributes:
        codes: [out_features, in_features].
        bits: bits of a code (2 to 8).
        group: columns a group: 16 or a multiple of 32, up to the whole row.
        scales: a group each.
        minimums: a group each, or None.
        format: the name of the file's format, for people: "Q4_1", "GPTQ".
    """

    codes: Codes
    bits: int
    group: int
    scales: Scales
    minimums: Scales | None
    format: str

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.scales.shape[0], self.scales.shape[1] * self.group

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as they lie here."""
        minimums = 0 if self.minimums is None else self.minimums.nbytes
        return self.codes.nbytes + self.scales.nbytes + minimums

    def take_rows(self, rows: NDArray[np.int64]) -> GroupedTensor:
        """The same weight with its rows reordered (copies)."""
        return replace(
            self,
            codes=self.codes.take_rows(rows),
            scales=self.scales.take_rows(rows),
            minimums=None if self.minimums is None else self.minimums.take_rows(rows),
        )

    def in_small_groups(self) -> GroupedTensor:
        """The same weight as kernels for rounded activations take it (copies what changes).

        Groups have at most SMALL_GROUP columns. Minimums of two levels beside scales of one become
        of one too, which rounds them to float16.
        """
        scales, minimums = self.scales, self.minimums
        if isinstance(scales, GroupScales) and isinstance(minimums, BlockScales):
            minimums = GroupScales(minimums.values().astype(np.float16))
        group = min(self.group, SMALL_GROUP)
        times = self.group // group
        if times > 1:
            scales = scales.repeat(times)
            minimums = None if minimums is None else minimums.repeat(times)
        return replace(self, group=group, scales=scales, minimums=minimums)

    def dequantize(self) -> NDArray[np.float32]:
        """The weight in float32 (copies)."""
        rows, columns = self.shape
        codes = self.codes.values().astype(np.float32) - np.float32(self.codes.zero)
        grouped = codes.reshape(rows, columns // self.group, self.group)
        value = self.scales.values()[:, :, None] * grouped
        if self.minimums is not None:
            value = value + self.minimums.values()[:, :, None]
        return value.reshape(rows, columns)


_E4M3_MAX = 448
_HALF_RANGE = (2.0**-8, 65504)
"""Between these, a weight's greatest number leaves float16 the precision that FP8 has."""

_TILE_ELEMENTS = 1 << 20


def _e4m3_values() -> NDArray[np.float32]:
    """What the 256 codes mean: sign, exponent + 7, mantissa in eighths; 0x7f, 0xff: NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    subnormal = np.ldexp(mantissa / 8, np.full(128, -6))
    values = np.where(exponent == 0, subnormal, normal)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = _e4m3_values()


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of bfloat16, rounded half to even; a NaN stays one."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class BlockFloatTensor:
    """A weight in FP8 (e4m3: four exponent bits, three of the mantissa, no infinities).

    w[n, k] = e4m3(codes[n, k]) * scales[n // block[0], k // block[1]], in float32. One scale for
    all is a block of the whole shape, one a row a block of (1, in_features).

    Attributes:
        codes: uint8 [out_features, in_features], the bits of the numbers. May be a read-only view
            of a mapped file.
        scales: float32, a block each; blocks at the lower and the right edge may be cut.
        block: rows and columns of a block.
        input_scale: what the model's inputs of this weight are divided by before they are rounded
            to FP8, if its makers measured it, 2**-126 to 2**126; backends that keep inputs
            unrounded have no use for it.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    block: tuple[int, int]
    input_scale: float | None = None

    format = "FP8"

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(self.codes.nbytes + self.scales.nbytes)

    def take_rows(self, rows: NDArray[np.int64]) -> BlockFloatTensor:
        """The same weight with its rows reordered (copies); blocks become rows of blocks."""
        scales, block = self.scales[rows // self.block[0]], (1, self.block[1])
        return replace(self, codes=self.codes[rows], scales=scales, block=block)

    def dequantize(self) -> NDArray[np.float32]:
        """The weight in float32 (copies)."""
        return self._float32(0, len(self.codes))

    def to_half(self) -> DenseTensor:
        """The weight in 16 bits (copies): float16, or bfloat16 if float16's range is too narrow.

        Rounding to float16 adds a hundredth of FP8's own error, to bfloat16 a sixteenth.
        """
        rows, columns = self.shape
        greatest = np.float32(_E4M3_MAX) * np.abs(self.scales).max(initial=0)
        fits = _HALF_RANGE[0] <= greatest <= _HALF_RANGE[1]
        data = np.empty((rows, columns), np.float16 if fits else np.uint16)
        step = max(1, _TILE_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            values = self._float32(start, min(start + step, rows))
            data[start : start + step] = values if fits else _to_bf16(values)
        return DenseTensor(data, "f16" if fits else "bf16")

    def _float32(self, start: int, stop: int) -> NDArray[np.float32]:
        row_blocks = np.arange(start, stop) // self.block[0]
        column_blocks = np.arange(self.shape[1]) // self.block[1]
        scales = self.scales[row_blocks]
        if self.scales.shape[1] > 1:
            scales = scales[:, column_blocks]
        with np.errstate(invalid="ignore", over="ignore"):  # a file's infinities are its own affair
            product: NDArray[np.float32] = _E4M3[self.codes[start:stop]] * scales
        return product


StoredTensor = DenseTensor | GroupedTensor | BlockFloatTensor

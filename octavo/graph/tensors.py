"""The stored forms of a weight, whatever its file: dense, or integers in groups with scales.

`weights/formats` makes these from a file's bytes without copying; backends repack from them.
Nobody above or below knows GGUF's types.
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
    """Scales or minimums of two levels, as in the K-quants: sign * d * (factor - zero), exact.

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

    def values(self) -> NDArray[np.float32]:
        """All of them, [rows, groups] float32."""
        return self.halves.astype(np.float32)


Scales = GroupScales | BlockScales


@dataclass(frozen=True, slots=True)
class GroupedTensor:
    """A weight as unsigned integer codes with a scale, and perhaps a minimum, a group of columns.

    w[n, k] = scales[n, k // group] * (codes[n, k] - zero) + minimums[n, k // group], in float32,
    each product and sum rounded once (minimums absent: nothing is added).

    Attributes:
        codes: [out_features, in_features].
        bits: bits of a code (2 to 8).
        group: columns a group, 16 or 32.
        scales: a group each.
        minimums: of the same form, or None.
        format: the name of the file's format, for people: "Q4_1".
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
        """Bytes as stored in the file."""
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

    def dequantize(self) -> NDArray[np.float32]:
        """The weight in float32 (copies)."""
        rows, columns = self.shape
        codes = self.codes.values().astype(np.float32) - np.float32(self.codes.zero)
        grouped = codes.reshape(rows, columns // self.group, self.group)
        value = self.scales.values()[:, :, None] * grouped
        if self.minimums is not None:
            value = value + self.minimums.values()[:, :, None]
        return value.reshape(rows, columns)


StoredTensor = DenseTensor | GroupedTensor

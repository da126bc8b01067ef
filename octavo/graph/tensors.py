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
class GroupedTensor:
    """A weight as unsigned integer codes with a scale, and perhaps a minimum, a group of columns.

    w[n, k] = scales[n, k // group] * (codes[n, k] - zero) + minimums[n, k // group], in float32,
    each product and sum rounded once (minimums absent: nothing is added).

    Attributes:
        planes: the bits of the codes; the codes are the sum of the planes, each shifted left by
            its lift.
        bits: bits of a code (2 to 8).
        group: columns a group, 16 or 32.
        zero: the code that stands for 0.
        scales: float16 or float32 [rows, in_features / group]; may be an unaligned strided view.
        minimums: like scales, or None. float16 and float32 both mean exactly what the file says.
    """

    planes: tuple[Plane, ...]
    bits: int
    group: int
    zero: int
    scales: NDArray[np.floating]
    minimums: NDArray[np.floating] | None
    format: str
    """The name of the file's format, for people: "Q4_1"."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.scales.shape[0], self.scales.shape[1] * self.group

    @property
    def nbytes(self) -> int:
        """Bytes as stored in the file (planes, scales and minimums)."""
        scales = self.scales.size * self.scales.itemsize * (1 if self.minimums is None else 2)
        return sum(p.data.size for p in self.planes) + scales

    def take_rows(self, rows: NDArray[np.int64]) -> GroupedTensor:
        """The same weight with its rows reordered (copies)."""
        return replace(
            self,
            planes=tuple(replace(p, data=p.data[rows]) for p in self.planes),
            scales=self.scales[rows],
            minimums=None if self.minimums is None else self.minimums[rows],
        )

    def codes(self) -> NDArray[np.uint8]:
        """All codes, [out_features, in_features] uint8: slow and obvious."""
        total = np.zeros(self.shape, np.uint8)
        for plane in self.planes:
            value = (plane.data[:, :, plane.byte_of] ^ np.uint8(plane.flip)) >> plane.shift_of
            total += ((value & np.uint8((1 << plane.bits) - 1)) << np.uint8(plane.lift)).reshape(
                self.shape
            )
        return total

    def dequantize(self) -> NDArray[np.float32]:
        """The weight in float32 (copies)."""
        rows, columns = self.shape
        codes = self.codes().astype(np.float32).reshape(rows, columns // self.group, self.group)
        value = self.scales.astype(np.float32)[:, :, None] * (codes - np.float32(self.zero))
        if self.minimums is not None:
            value = value + self.minimums.astype(np.float32)[:, :, None]
        return value.reshape(rows, columns)


StoredTensor = DenseTensor | GroupedTensor

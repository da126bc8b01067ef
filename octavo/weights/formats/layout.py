"""A format of blocks described as data, from which one function makes a GroupedTensor of views.

A file's tensor is [rows, blocks, block_bytes] of bytes; a format says which bytes and bits of a
block make the codes, and how scales and minimums come out of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.graph.tensors import BlockScales, Codes, GroupedTensor, GroupScales, Plane, Scales

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """Where some bits of every code lie: bytes start to stop of a block; the rest as in Plane."""

    start: int
    stop: int
    byte_of: NDArray[np.uint16]
    shift_of: NDArray[np.uint8]
    bits: int
    lift: int = 0
    flip: int = 0


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """Where scales or minimums lie: a float16 at byte `start`, perhaps times small factors.

    The rest as in BlockScales.
    """

    start: int
    factors: tuple[PlaneLayout, ...] = ()
    zero: int = 0
    sign: int = 1

    def read(self, blocks: Bytes) -> Scales:
        """The scales of blocks [rows, blocks, block_bytes], as views."""
        halves = half(blocks, self.start)
        if not self.factors:
            return GroupScales(halves)
        return BlockScales(halves, Codes(_planes(blocks, self.factors), self.zero), self.sign)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A format of blocks.

    Attributes:
        name: "Q4_1".
        block_len: elements of a block.
        block_bytes: bytes of a block.
        group: elements that share a scale.
        bits, zero: as in GroupedTensor.
        planes: where the codes lie.
        scales: where the scales lie.
        minimums: where the minimums lie, if the format has any.
    """

    name: str
    block_len: int
    block_bytes: int
    group: int
    bits: int
    zero: int
    planes: tuple[PlaneLayout, ...]
    scales: ScaleLayout
    minimums: ScaleLayout | None = None

    def read(self, data: Bytes, shape: tuple[int, int]) -> GroupedTensor:
        """See the bytes of a whole tensor as its stored form.

        Args:
            data: [nbytes], the tensor in the file; kept as views.
            shape: (rows, columns), columns a multiple of block_len.
        """
        rows, columns = shape
        blocks = data.reshape(rows, columns // self.block_len, self.block_bytes)
        return GroupedTensor(
            codes=Codes(_planes(blocks, self.planes), self.zero),
            bits=self.bits,
            group=self.group,
            scales=self.scales.read(blocks),
            minimums=None if self.minimums is None else self.minimums.read(blocks),
            format=self.name,
        )


def _planes(blocks: Bytes, layouts: tuple[PlaneLayout, ...]) -> tuple[Plane, ...]:
    return tuple(
        Plane(blocks[:, :, p.start : p.stop], p.byte_of, p.shift_of, p.bits, p.lift, p.flip)
        for p in layouts
    )


def plane(
    start: int,
    byte_of: NDArray[np.int64],
    shift_of: NDArray[np.int64],
    bits: int,
    *,
    lift: int = 0,
    flip: int = 0,
) -> PlaneLayout:
    """A plane that begins at byte `start` of the block and is as long as its table says."""
    stop = start + int(byte_of.max()) + 1
    return PlaneLayout(
        start, stop, byte_of.astype(np.uint16), shift_of.astype(np.uint8), bits, lift, flip
    )


def half(blocks: Bytes, start: int) -> NDArray[np.float16]:
    """The float16 at byte `start` of every block, [rows, blocks], a view."""
    return blocks[:, :, start : start + 2].view(np.dtype("<f2"))[:, :, 0]

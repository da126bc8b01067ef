"""The "K" formats: super-blocks of 256 elements, groups with small integer scales.

Each super-block has one float16 d (and dmin). A group's scale is d * sc and its minimum -(dmin *
m), both exact products rounded once to float32, so that scale * (code - zero) + minimum has the
bits that the format's own definition gives. These two are computed; the codes stay views of the
file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.weights.formats.layout import BlockLayout, Bytes, PlaneLayout, Scales, half, plane

_ELEMENT: NDArray[np.int64] = np.arange(256)
_HALF = _ELEMENT // 128  # of the super-block
_QUARTER = _ELEMENT % 128 // 32  # of the half
_LANE = _ELEMENT % 32


def _pairs(start: int, lift: int = 0) -> PlaneLayout:
    """Two bits an element: a byte holds one lane of the four quarters of a half."""
    return plane(start, _HALF * 32 + _LANE, _QUARTER * 2, 2, lift=lift)


def _single_bits(start: int, lift: int) -> PlaneLayout:
    """One bit an element: a byte holds one lane of all eight runs of 32."""
    return plane(start, _LANE, _ELEMENT // 32, 1, lift=lift)


def _nibbles(start: int) -> PlaneLayout:
    """Q4_K, Q5_K: of each 64 elements the first 32 in low nibbles, the others in high ones."""
    return plane(start, _ELEMENT // 64 * 32 + _LANE, _ELEMENT % 64 // 32 * 4, 4)


def _q6_nibbles(start: int) -> PlaneLayout:
    """Q6_K: quarters 0 and 1 of a half in low nibbles, 2 and 3 in high ones."""
    return plane(start, _HALF * 64 + _QUARTER % 2 * 32 + _LANE, _QUARTER // 2 * 4, 4)


def _scaled(d: NDArray[np.float16], factors: NDArray[np.generic]) -> NDArray[np.float32]:
    """Product of d [rows, blocks] and factors [rows, blocks, groups] → [rows, blocks * groups]."""
    with np.errstate(invalid="ignore"):  # a file may hold infinities; they are its own affair
        product = d.astype(np.float32)[:, :, None] * factors.astype(np.float32)
    return product.reshape(d.shape[0], -1)


def _q2_scales(blocks: Bytes) -> tuple[Scales, Scales | None]:
    """16 bytes: scales in low nibbles, minimums in high ones; d and dmin at the end."""
    packed = blocks[:, :, :16]
    return _scaled(half(blocks, 80), packed & 15), -_scaled(half(blocks, 82), packed >> 4)


def _q3_scales(blocks: Bytes) -> tuple[Scales, Scales | None]:
    """16 scales of 6 bits, counted from 32: 8 bytes of low nibbles, then 4 bytes of high pairs."""
    low, high = blocks[:, :, 96:104], blocks[:, :, 104:108]
    fours = np.concatenate([low & 15, low >> 4], axis=2)
    twos = np.concatenate([(high >> np.uint8(shift)) & 3 for shift in (0, 2, 4, 6)], axis=2)
    scales = (fours | (twos << 4)).astype(np.int8) - np.int8(32)
    return _scaled(half(blocks, 108), scales), None


def _q45_scales(blocks: Bytes) -> tuple[Scales, Scales | None]:
    """8 scales and 8 minimums of 6 bits in 12 bytes: four whole, four in nibbles and top pairs."""
    first, second, third = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 2 & 48)], axis=2)
    minimums = np.concatenate([second & 63, (third >> 4) | (second >> 2 & 48)], axis=2)
    return _scaled(half(blocks, 0), scales), -_scaled(half(blocks, 2), minimums)


def _q6_scales(blocks: Bytes) -> tuple[Scales, Scales | None]:
    """16 signed bytes and d."""
    return _scaled(half(blocks, 208), blocks[:, :, 192:208].view(np.int8)), None


K_QUANTS = (
    BlockLayout("Q2_K", 256, 84, 16, 2, 0, (_pairs(16),), _q2_scales),
    BlockLayout("Q3_K", 256, 110, 16, 3, 4, (_pairs(32), _single_bits(0, lift=2)), _q3_scales),
    BlockLayout("Q4_K", 256, 144, 32, 4, 0, (_nibbles(16),), _q45_scales),
    BlockLayout("Q5_K", 256, 176, 32, 5, 0, (_nibbles(48), _single_bits(16, lift=4)), _q45_scales),
    BlockLayout("Q6_K", 256, 210, 16, 6, 32, (_q6_nibbles(0), _pairs(128, lift=4)), _q6_scales),
)

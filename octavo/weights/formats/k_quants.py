"""The "K" formats: super-blocks of 256 elements, groups with small integer scales.

Each super-block has one float16 d (and dmin). A group's scale is d * sc and its minimum -(dmin *
m), both exact in float32, so that scale * (code - zero) + minimum has the bits that the format's
own definition gives. Codes and factors stay views of the file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.weights.formats.layout import BlockLayout, PlaneLayout, ScaleLayout, plane

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


_GROUP: NDArray[np.int64] = np.arange(16)
_EIGHT: NDArray[np.int64] = np.arange(8)

# Q2_K: 16 bytes, scales in low nibbles, minimums in high ones.
_Q2_SCALES = (plane(0, _GROUP, 0 * _GROUP, 4),)
_Q2_MINIMUMS = (plane(0, _GROUP, 0 * _GROUP + 4, 4),)

# Q3_K: 16 scales of 6 bits: 8 bytes of low nibbles, then 4 bytes of high pairs.
_Q3_SCALES = (
    plane(96, _GROUP % 8, _GROUP // 8 * 4, 4),
    plane(104, _GROUP % 4, _GROUP // 4 * 2, 2, lift=4),
)


def _six_bits(first: int, high_shift: int) -> tuple[PlaneLayout, ...]:
    """Q4_K, Q5_K: of 8 factors in 12 bytes four are whole, four in nibbles and others' top pairs.

    Args:
        first: the byte of factor 0; factor 4's top pair is there too.
        high_shift: of the nibble of factors 4 to 7.
    """
    is_late, lane = _EIGHT // 4, _EIGHT % 4
    return (
        plane(first, lane + is_late * (12 - first), is_late * high_shift, 4),
        plane(first, lane, 4 + 2 * is_late, 2, lift=4),
    )


_Q45_SCALES = ScaleLayout(0, _six_bits(4, 0))
_Q45_MINIMUMS = ScaleLayout(2, _six_bits(8, 4), sign=-1)

# Q6_K: 16 signed bytes.
_Q6_SCALES = (plane(192, _GROUP, 0 * _GROUP, 8, flip=0x80),)

K_QUANTS = (
    BlockLayout(
        "Q2_K", 256, 84, 16, 2, 0, (_pairs(16),),
        ScaleLayout(80, _Q2_SCALES), ScaleLayout(82, _Q2_MINIMUMS, sign=-1),
    ),
    BlockLayout(
        "Q3_K", 256, 110, 16, 3, 4, (_pairs(32), _single_bits(0, lift=2)),
        ScaleLayout(108, _Q3_SCALES, zero=32),
    ),
    BlockLayout("Q4_K", 256, 144, 32, 4, 0, (_nibbles(16),), _Q45_SCALES, _Q45_MINIMUMS),
    BlockLayout(
        "Q5_K", 256, 176, 32, 5, 0, (_nibbles(48), _single_bits(16, lift=4)),
        _Q45_SCALES, _Q45_MINIMUMS,
    ),
    BlockLayout(
        "Q6_K", 256, 210, 16, 6, 32, (_q6_nibbles(0), _pairs(128, lift=4)),
        ScaleLayout(208, _Q6_SCALES, zero=128),
    ),
)  # fmt: skip

"""Blocks of 32 elements with one float16 scale and, in the "_1" formats, one float16 minimum.

The codes of elements i and i + 16 share a byte, low and high nibble; the fifth bits of Q5 stand in
32 bits of their own. Q8_0 stores signed bytes: code = byte ^ 0x80, which counts from 128.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.weights.formats.layout import BlockLayout, PlaneLayout, ScaleLayout, plane

_ELEMENT: NDArray[np.int64] = np.arange(32)


def _nibbles(start: int) -> PlaneLayout:
    return plane(start, _ELEMENT % 16, _ELEMENT // 16 * 4, 4)


def _fifth_bits(start: int) -> PlaneLayout:
    return plane(start, _ELEMENT // 8, _ELEMENT % 8, 1, lift=4)


_FIRST, _SECOND = ScaleLayout(0), ScaleLayout(2)

_BYTES = plane(2, _ELEMENT, 0 * _ELEMENT, 8, flip=0x80)

SIMPLE = (
    BlockLayout("Q4_0", 32, 18, 32, 4, 8, (_nibbles(2),), _FIRST),
    BlockLayout("Q4_1", 32, 20, 32, 4, 0, (_nibbles(4),), _FIRST, _SECOND),
    BlockLayout("Q5_0", 32, 22, 32, 5, 16, (_nibbles(6), _fifth_bits(2)), _FIRST),
    BlockLayout("Q5_1", 32, 24, 32, 5, 0, (_nibbles(8), _fifth_bits(4)), _FIRST, _SECOND),
    BlockLayout("Q8_0", 32, 34, 32, 8, 128, (_BYTES,), _FIRST),
)

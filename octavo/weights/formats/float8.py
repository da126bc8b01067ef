"""FP8 weights and the scales that lie beside them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.graph.tensors import BlockFloatTensor
from octavo.weights.formats.dense import DENSE, read_dense

SCALE_TYPES = (*DENSE, "F8_E8M0")


def read_scales(name: str, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The bytes of a tensor of one of the SCALE_TYPES as float32 (copies)."""
    if name != "F8_E8M0":
        return read_dense(name, data, shape).dequantize()
    # A power of two: its exponent plus 127, no sign and no mantissa; 255 is NaN.
    powers = np.ldexp(np.float32(1), data.astype(np.int32) - 127).astype(np.float32)
    powers[data == 255] = np.nan
    return powers.reshape(shape)


def read_float8(
    data: NDArray[np.uint8],
    shape: tuple[int, int],
    scales: NDArray[np.float32],
    block: tuple[int, int],
    input_scale: float | None,
) -> BlockFloatTensor:
    """See the bytes of a weight as its stored form; scales of any shape, in the blocks' order."""
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    return BlockFloatTensor(data.reshape(shape), scales.reshape(grid), block, input_scale)

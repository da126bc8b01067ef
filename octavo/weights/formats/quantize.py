"""From a dense matrix to a grouped one while loading: int8 in the form of Q8_0, int4 in Q4_1's.

The codes are written as the blocks of those formats and read back as a file's would be, so that
nothing below knows where they come from. A group of 32 columns that holds a number which is not
finite, or too large for a float16 scale, becomes NaN as a whole: damage stays visible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from octavo.graph.tensors import DenseTensor, GroupedTensor
from octavo.weights.formats.layout import BlockLayout
from octavo.weights.formats.simple import SIMPLE

GROUP = 32

_CHUNK = 131072
"""Numbers at a time: a few float32 arrays of so many stay in the caches."""

_SHRUNK_STEPS = np.float32(15.25)
"""The search for a 4-bit group's scale also begins with codes that leave an eighth of a step of the
range out at either end; of 14.5 to 17 it gave the least error."""

_Float32 = NDArray[np.float32]
_Blocks = NDArray[np.uint8]


def can_quantize(tensor: DenseTensor) -> bool:
    """Whether it is a matrix whose rows are whole groups."""
    return len(tensor.shape) == 2 and tensor.shape[1] % GROUP == 0


def quantized_nbytes(shape: tuple[int, ...], format_name: str) -> int:
    """Bytes of a matrix once it is quantized."""
    rows, columns = shape
    return rows * columns // GROUP * LAYOUTS[format_name].block_bytes


def quantize(tensor: DenseTensor, format_name: str, num_threads: int = 1) -> GroupedTensor:
    """Quantize a matrix that `can_quantize`; the same bytes with any number of threads.

    Args:
        tensor: what to quantize.
        format_name: "Q8_0" or "Q4_1".
        num_threads: threads that share the rows.
    """
    rows, columns = tensor.shape
    layout, encode = LAYOUTS[format_name], _ENCODERS[format_name]
    blocks = np.empty((rows, columns // GROUP, layout.block_bytes), np.uint8)
    step = max(1, _CHUNK // max(1, columns))

    starts = iter(range(0, rows, step))  # shared: `next` of a range iterator is atomic

    def work(_: int) -> None:
        buffers = np.empty((2, GROUP * step * (columns // GROUP)), np.float32)
        for start in starts:
            part = replace(tensor, data=tensor.data[start : start + step])
            out = blocks[start : start + step].reshape(-1, layout.block_bytes)
            lanes = buffers[:, : GROUP * len(out)].reshape(2, GROUP, len(out))
            # Groups in lanes: sums over a group become sums of whole rows.
            lanes[0] = part.dequantize().reshape(-1, GROUP).T
            with np.errstate(all="ignore"):
                encode(lanes, out)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    return layout.read(blocks.reshape(-1), (rows, columns))


def _encode_8_bits(lanes: _Float32, out: _Blocks) -> None:
    """Symmetric: the scale is the greatest magnitude / 127. Overwrites the lanes."""
    values = lanes[0]
    greatest = np.maximum(values.max(axis=0), -values.min(axis=0))
    scale = _covering(greatest, 127)
    is_bad = ~np.isfinite(scale)
    codes = np.rint(np.multiply(values, _inverse(scale), out=values), out=values)
    codes[:, is_bad] = 0
    out[:, 2:] = codes.astype(np.int8).T.view(np.uint8)
    _put_half(out, 0, scale, is_bad)


def _encode_4_bits(lanes: _Float32, out: _Blocks) -> None:
    """Scale and minimum by a search; not worse than those of the range. Overwrites the lanes."""
    values, codes = lanes
    low, high = values.min(axis=0), values.max(axis=0)
    extent = high - low
    is_bad = ~np.isfinite(extent)
    if is_bad.any():
        values[:, is_bad] = low[is_bad] = extent[is_bad] = 0
    search = _Search(np.subtract(values, low, out=values), low, codes)
    search.set_codes(_covering(extent, 15), _rounded(low))
    search.keep(search.scale, search.minimum)
    search.keep(*search.fit())
    search.set_codes(
        extent / _SHRUNK_STEPS, low + (_SHRUNK_STEPS - 15) / (2 * _SHRUNK_STEPS) * extent
    )
    search.keep(*search.fit())
    search.set_codes(search.best_scale, search.best_minimum)
    search.keep(*search.fit())
    search.set_codes(search.best_scale, search.best_minimum)
    is_bad |= ~np.isfinite(search.scale) | ~np.isfinite(search.minimum)
    codes[:, is_bad] = 0
    small = codes.astype(np.uint8)
    out[:, 4:] = (small[:16] | small[16:] << np.uint8(4)).T
    _put_half(out, 0, search.scale, is_bad)
    _put_half(out, 2, search.minimum, is_bad)


class _Search:
    """The search for many groups at once, over values counted from each group's least one."""

    def __init__(self, values: _Float32, low: _Float32, codes: _Float32) -> None:
        """`values` [32, groups] less `low` [groups]; `codes` is room of the same shape."""
        self._values, self._low, self._codes = values, low, codes
        self._sums = values.sum(axis=0)
        self._squares = np.einsum("kg,kg->g", values, values)
        self.best_scale = self.best_minimum = np.full_like(low, np.nan)
        self.scale, self.minimum = self.best_scale, self.best_minimum
        self._best_error = np.full_like(low, np.inf)
        self._moments: tuple[_Float32, _Float32, _Float32] | None = None

    def set_codes(self, scale: _Float32, minimum: _Float32) -> None:
        """Take the nearest codes, 0 to 15."""
        self.scale, self.minimum = scale, minimum
        codes = self._codes
        np.subtract(self._values, minimum - self._low, out=codes)
        np.multiply(codes, _inverse(scale), out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, 0, 15, out=codes)
        self._moments = None

    def fit(self) -> tuple[_Float32, _Float32]:
        """The scale and minimum, as float16 rounds them, that fit the codes best."""
        ones, squares, products = self._code_sums()
        size = np.float32(GROUP)
        determinant = size * squares - ones * ones  # exact: whole numbers below 2**24
        slope = (size * products - ones * self._sums) / np.maximum(determinant, 1)
        scale = _rounded(slope)
        return scale, _rounded(self._low + (self._sums - scale * ones) / size)

    def keep(self, scale: _Float32, minimum: _Float32) -> None:
        """Keep these where they are the best so far for the codes at hand."""
        ones, squares, products = self._code_sums()
        shift = minimum - self._low
        # The sum of (values - shift - scale * codes) ** 2, multiplied out.
        error = self._squares + np.float32(GROUP) * shift * shift + scale * scale * squares
        error += 2 * (scale * (shift * ones - products) - shift * self._sums)
        is_better = error < self._best_error
        self._best_error = np.where(is_better, error, self._best_error)
        self.best_scale = np.where(is_better, scale, self.best_scale)
        self.best_minimum = np.where(is_better, minimum, self.best_minimum)

    def _code_sums(self) -> tuple[_Float32, _Float32, _Float32]:
        """The sums of the codes, of their squares, and of their products with the values."""
        if self._moments is None:
            codes = self._codes
            self._moments = (
                codes.sum(axis=0),
                np.einsum("kg,kg->g", codes, codes),
                np.einsum("kg,kg->g", codes, self._values),
            )
        return self._moments


def _covering(extent: _Float32, steps: float) -> _Float32:
    """The float16 scale, in float32, with which so many steps reach an extent to half a step.

    Rounding to nearest suffices but for subnormal scales, which would cut off the greatest values.
    """
    scale = (extent / np.float32(steps)).astype(np.float16)
    too_small = extent > np.float32(steps + 0.5) * scale.astype(np.float32)
    up = np.nextafter(scale, np.float16(np.inf))
    result: _Float32 = np.where(too_small, up, scale).astype(np.float32)
    return result


def _rounded(numbers: _Float32) -> _Float32:
    """To float16 and back."""
    return numbers.astype(np.float16).astype(np.float32)


def _inverse(scale: _Float32) -> _Float32:
    """1 / scale, and 0 for a scale of 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _put_half(out: _Blocks, start: int, numbers: _Float32, is_bad: NDArray[np.bool_]) -> None:
    halves = numbers.astype("<f2")
    halves[is_bad] = np.nan
    out[:, start : start + 2] = halves[:, None].view(np.uint8)


LAYOUTS: Mapping[str, BlockLayout] = {
    layout.name: layout for layout in SIMPLE if layout.name in ("Q8_0", "Q4_1")
}

_ENCODERS: Mapping[str, Callable[[_Float32, _Blocks], None]] = {
    "Q8_0": _encode_8_bits,
    "Q4_1": _encode_4_bits,
}

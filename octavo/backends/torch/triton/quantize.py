"""Rounding of activations to int8 or fp8 codes.

A row is cut into tiles of whole groups, a program each; one group of a whole row is one tile. With
a static scale there is nothing to find out before, so tiles are as of rows that are not rounded.
Memory is the limit: 3 bytes a 16-bit feature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import QUANTIZE_GROUP, Quantized, QuantizeMode, StaticScale
from octavo.backends.torch.triton.launch import FP_FUSION

_TILE = 2048
"""Features of a tile, unless a group is larger: 16 for each thread of four warps."""


class Tile(NamedTuple):
    """The part of a row that is one program's: groups of `width` features, powers of two."""

    groups: int
    width: int

    @classmethod
    def of(cls, features: int, mode: QuantizeMode | None) -> Tile:
        """The tile of rows of so many features."""
        if mode == "fp8 group":
            most = triton.next_power_of_2(triton.cdiv(features, QUANTIZE_GROUP))
            return cls(min(most, _TILE // QUANTIZE_GROUP), QUANTIZE_GROUP)
        whole = triton.next_power_of_2(features)
        is_cut = mode is None or isinstance(mode, StaticScale)
        return cls(1, min(whole, _TILE) if is_cut else whole)

    def count(self, features: int) -> int:
        """Tiles a row."""
        tiles: int = triton.cdiv(features, self.groups * self.width)
        return tiles

    @property
    def num_warps(self) -> int:
        """16 features a thread of NVIDIA's warps, more in the longest rows."""
        return warps_of(self.groups * self.width)


def warps_of(elements: int) -> int:
    """Warps for a tile of a power of two of elements."""
    return min(max(elements // 512, 1), 16)


def given_scale(mode: QuantizeMode | None) -> float | None:
    """What kernels take as `given`."""
    return mode.scale if isinstance(mode, StaticScale) else None


def empty_codes(x: Tensor, mode: QuantizeMode) -> Quantized:
    """Memory for the codes of x."""
    rows, features = x.shape
    dtype = torch.int8 if mode == "int8 token" else torch.float8_e4m3fn
    groups = triton.cdiv(features, QUANTIZE_GROUP) if mode == "fp8 group" else 1
    return Quantized(
        torch.empty((rows, features), dtype=dtype, device=x.device),
        torch.empty((rows, groups), dtype=torch.float32, device=x.device),
    )


@triton.jit
def scale_of(peaks, INT8: tl.constexpr):
    """Scale of a group, and what its values are multiplied by, from the bits of max|x|."""
    most: tl.constexpr = 127.0 if INT8 else 448.0
    least: tl.constexpr = 2.0**-120 if INT8 else 2.0**-119
    peak = peaks.to(tl.float32, bitcast=True)
    finite = peak < float("inf")
    usual = finite & (peak >= least)
    # Division here is correctly rounded: codes must not depend on the device.
    divisor = tl.where(usual, peak, 1.0)
    factor = tl.where(usual, tl.div_rn(tl.full(peak.shape, most, tl.float32), divisor), 0.0)
    scale = tl.div_rn(tl.where(usual, peak, 0.0), tl.full(peak.shape, most, tl.float32))
    return tl.where(finite, scale, float("nan")), factor


@triton.jit
def bits_of_size(values):
    """|x| as an integer: these compare as the numbers do, NaN above infinity."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(scaled, INT8: tl.constexpr):
    """Codes of values that were multiplied by their factor; any code where that was NaN."""
    if INT8:
        # 1.5 * 2**23 leaves no bits for fractions: the sum rounds half to even, its low byte is
        # the code. The minimum, which changes no code, keeps product and sum two roundings.
        shifted = tl.minimum(scaled, 127.0) + 12582912.0
        codes = shifted.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        codes = scaled.to(tl.float8e4nv)
    return codes


@triton.jit
def store_codes(values, codes, scales, given, column, mask, group, num_groups: tl.constexpr):
    """Round float32 [groups, width] and write codes and scales of one row.

    By the scale `given` for all, unless it is None; num_groups is then 1.
    """
    int8: tl.constexpr = codes.dtype.element_ty.is_int8()
    if given is not None:
        scale = tl.full(group.shape, given, tl.float32)
        scaled = values * tl.div_rn(1.0, given)
        # Conversions of what is beyond 448 differ: NaN on some devices, 448 on others.
        scaled = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        scale, factor = scale_of(tl.max(bits_of_size(values), axis=1), int8)
        scaled = values * factor[:, None]
    tl.store(codes + column, encode(scaled, int8), mask=mask)
    tl.store(scales + group, scale, mask=group < num_groups)


@triton.jit
def quantize_kernel(
    x,
    codes,
    scales,
    given,
    stride,
    FEATURES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of a row."""
    # Not tl.cdiv, whose result is no constant that a function takes before Triton 3.7.
    tiles: tl.constexpr = (FEATURES + GROUPS * WIDTH - 1) // (GROUPS * WIDTH)
    num_groups: tl.constexpr = 1 if given is not None else (FEATURES + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // tiles).to(tl.int64)
    group = (tl.program_id(0) % tiles) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = column < FEATURES
    values = tl.load(x + row * stride + column, mask=mask, other=0).to(tl.float32)
    codes += row * FEATURES
    scales += row * num_groups
    store_codes(values, codes, scales, given, column, mask, group, num_groups)


def quantize(x: Tensor, mode: QuantizeMode) -> Quantized:
    """See Kernels.quantize."""
    rows, features = x.shape
    out = empty_codes(x, mode)
    tile = Tile.of(features, mode)
    if rows:
        quantize_kernel[(rows * tile.count(features),)](
            x,
            out.codes,
            out.scales,
            given_scale(mode),
            x.stride(0),
            FEATURES=features,
            GROUPS=tile.groups,
            WIDTH=tile.width,
            num_warps=tile.num_warps,
            **FP_FUSION,
        )
    return out

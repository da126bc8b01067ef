"""RMS norm of rows or of heads, after adding the residual and before rounding to codes.

A program has one row, or several short ones (the heads of queries and keys). Memory is the limit:
with a residual and without codes 8 bytes a 16-bit feature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import QUANTIZE_GROUP, Normed, QuantizeMode
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.quantize import empty_codes, given_scale, store_codes, warps_of

_TILE = 1024
"""Features of a program that has several heads."""


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    total,
    out,
    scales,
    given,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row as LINES of WIDTH features, groups of codes if there are scales, or LINES heads.

    `given` as of store_codes.
    """
    line = tl.arange(0, LINES)
    column = tl.arange(0, WIDTH)[None, :]
    row = tl.program_id(0).to(tl.int64)
    if HEADS > 1:
        row = row * LINES + line[:, None]
    else:
        column = line[:, None] * WIDTH + column
    mask = column < FEATURES
    inside = mask & (row < num_rows)
    place = row // HEADS * x_stride + row % HEADS * FEATURES + column
    values = tl.load(x + place, mask=inside, other=0)
    gain = tl.load(weight + column, mask=mask, other=0)
    if residual is not None:
        other = tl.load(residual + row * residual_stride + column, mask=inside, other=0)
        values = (values.to(tl.float32) + other.to(tl.float32)).to(values.dtype)
        tl.store(total + row * FEATURES + column, values, mask=inside)
    values = values.to(tl.float32)
    square = values * values
    total_square = tl.sum(square, axis=1, keep_dims=True) if HEADS > 1 else tl.sum(square)
    values = values * tl.rsqrt(total_square / FEATURES + eps) * gain
    start = row * FEATURES
    if scales is not None:
        num_groups: tl.constexpr = (FEATURES + WIDTH - 1) // WIDTH
        scales += row * num_groups
        store_codes(values, out + start, scales, given, column, mask, line, num_groups)
    else:
        tl.store(out + start + column, values.to(out.dtype.element_ty), mask=inside)


class Shape(NamedTuple):
    """What a program has: lines of `width` features, both powers of two."""

    lines: int
    width: int

    @classmethod
    def of(cls, features: int, heads: int, mode: QuantizeMode | None) -> Shape:
        """For rows of so many heads of so many features."""
        whole = triton.next_power_of_2(features)
        if heads > 1:
            return cls(max(_TILE // whole, 1), whole)
        if mode == "fp8 group":
            return cls(max(whole // QUANTIZE_GROUP, 1), QUANTIZE_GROUP)
        return cls(1, whole)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, mode: QuantizeMode | None
) -> Normed:
    """See Kernels.rms_norm."""
    tokens, width = x.shape
    features = len(weight)
    heads = width // features
    shape = Shape.of(features, heads, mode)
    total = x if residual is None else torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    values = torch.empty_like(total) if mode is None else empty_codes(x, mode)
    out, scales = (values, None) if isinstance(values, Tensor) else values
    if tokens:
        rms_norm_kernel[(triton.cdiv(tokens * heads, shape.lines if heads > 1 else 1),)](
            x,
            residual,
            weight,
            total,
            out,
            scales,
            given_scale(mode),
            tokens * heads,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            HEADS=heads,
            FEATURES=features,
            LINES=shape.lines,
            WIDTH=shape.width,
            num_warps=warps_of(shape.lines * shape.width),
            **FP_FUSION,
        )
    return Normed(total, values)

"""The columns of a product in parts, whose sums are added in order: the same bits both ways.

A step of few tokens has too few tiles for a device, so programs share a tile: each sums one part of
the columns, and `sum_parts` adds the parts. With many tokens one program sums all parts of its
tile, one after another, and adds them in the same order. How many parts there are depends on the
weight's shape alone: never on the number of tokens, nor on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.triton.launch import FP_FUSION

PROGRAMS = 256
"""As many as keep two programs on each of an H200's 132 processors, or nearly."""
MAX_PARTS = 8
_BLOCK = 512


class Parts(NamedTuple):
    """How columns are cut: `num` parts of `steps` steps each, the last one perhaps shorter."""

    num: int
    steps: int


def cut(n_tiles: int, num_steps: int, least_steps: int, programs: int = PROGRAMS) -> Parts:
    """Cut `num_steps` steps of columns for a weight of `n_tiles` tiles of rows."""
    count = max(1, min(MAX_PARTS, programs // n_tiles, num_steps // least_steps))
    steps = triton.cdiv(num_steps, count)
    return Parts(triton.cdiv(num_steps, steps), steps)


def are_shared(parts: Parts, num_tiles: int, programs: int = PROGRAMS) -> bool:
    """Whether programs share a tile: when tiles alone would leave half a device idle."""
    return parts.num > 1 and num_tiles < programs // 2


@triton.jit
def finish(total, row_scale, scale, bias):
    """Total * row_scale * scale + bias in this order of roundings, wherever it is compiled."""
    return tl.fma(total * row_scale, scale, bias)


@triton.jit(do_not_specialize=["tokens", "num_parts"])
def sum_parts_kernel(
    sums, row_scales, scales, bias, out, tokens, num_parts, n, row_scale_stride, scale_stride,
    HAS_ROW_SCALES: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """See sum_parts; one program a token and BLOCK outputs, which loads all parts at once.

    Parts that there are not add 0.0, which changes nothing: a sum that began with 0.0 is not -0.0.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(MAX_PARTS):
        place = sums + (part * tokens + row) * n + at
        total += tl.load(place, mask=inside & (part < num_parts), other=0.0)
    row_scale = 1.0
    if HAS_ROW_SCALES:
        row_scale = tl.load(row_scales + row * row_scale_stride)
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_SCALES:
        scale = tl.load(scales + at * scale_stride, mask=inside, other=0.0)
    addend = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        addend = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    value = finish(total, row_scale, scale, addend)
    tl.store(out + row * n + at, value.to(out.dtype.element_ty), mask=inside)


def sum_parts(
    sums: Tensor,
    out: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> None:
    """Make out = (the sum over parts, in order) * row_scales * scales + bias.

    Args:
        sums: float32 [parts, T, N].
        out: [T, N], contiguous.
        bias: [N].
        scales: float32 [N], or one number.
        row_scales: float32 [T], or one number.
    """
    num_parts, tokens, n = sums.shape
    sum_parts_kernel[(tokens, triton.cdiv(n, _BLOCK))](
        sums, row_scales, scales, bias, out, tokens, num_parts, n,
        0 if row_scales is None or row_scales.numel() == 1 else 1,
        0 if scales is None or scales.numel() == 1 else 1,
        HAS_ROW_SCALES=row_scales is not None, HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None, BLOCK=_BLOCK, MAX_PARTS=MAX_PARTS, num_warps=4, **FP_FUSION,
    )  # fmt: skip


def new_sums(parts: Parts, tokens: int, n: int, device: torch.device) -> Tensor:
    """Room for what sum_parts adds."""
    return torch.empty((parts.num, tokens, n), dtype=torch.float32, device=device)

"""Products of one row, x @ weight.T + bias, where its bits may differ from those beside others.

A step of one token is a matter of bandwidth: each weight is read once and its bytes are the floor.
A program has ROWS outputs and walks over the columns in steps of WIDTH. A thread loads 16 bytes of
each row at a time, straight into registers, and adds products in float32; x is converted once for
all of the rows. Sums of threads meet once, after the last step, and scales and bias follow in the
same kernel: no parts, no second launch.

Compiled for sm_90: 70 registers and 4.0 instructions a weight in bfloat16, a third of what an H200
issues at its whole bandwidth; 115 and 3.6 in FP8, 58 % of it. Either way about 30 KiB or more are
on their way to each processor, which bandwidth times latency asks for.

Dense weights of many outputs are left to the library, which is near the floor there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import Quantized, QuantizedWeight
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.parts import finish

ROWS, WIDTH = 4, 1024
_MANY_OUTPUTS = 12288
_LANES = 64 if torch.version.hip else 32


@triton.jit
def row_linear_kernel(
    x, weight, x_scales, w_scales, bias, out, n, k, weight_stride, w_scale_stride,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the head of the file; one program ROWS outputs."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    row = tl.minimum(at, n - 1).to(tl.int64)
    place = weight + row[:, None] * weight_stride + column[None, :]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, k, WIDTH):
        inside = column < k - start
        values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        numbers = tl.load(
            place + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first"
        )
        sums = tl.fma(numbers.to(tl.float32), values[None, :], sums)
    total = tl.sum(sums, 1)
    inside = at < n
    x_scale = 1.0
    w_scale = tl.full([ROWS], 1.0, tl.float32)
    if HAS_SCALES:
        x_scale = tl.load(x_scales)
        w_scale = tl.load(w_scales + at * w_scale_stride, mask=inside, other=0.0)
    addend = tl.zeros([ROWS], tl.float32)
    if HAS_BIAS:
        addend = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    value = finish(total, x_scale, w_scale, addend)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product x @ weight.T + bias; see Kernels."""
    n = weight.shape[0]
    if len(x) != 1 or n >= _MANY_OUTPUTS:
        return torch.nn.functional.linear(x, weight, bias)
    out = torch.empty((1, n), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, None, None)
    return out


def quantized_row(
    x: Quantized, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of one row; scales are of rows or of the whole, codes fp8."""
    out = torch.empty((1, weight.codes.shape[0]), dtype=dtype, device=x.codes.device)
    _launch(x.codes, weight.codes, bias, out, x.scales, weight.scales)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    x_scales: Tensor | None,
    w_scales: Tensor | None,
) -> None:
    n, k = weight.shape
    row_linear_kernel[(triton.cdiv(n, ROWS),)](
        x, weight, x_scales, w_scales, bias, out, n, k, weight.stride(0),
        int(w_scales is not None and w_scales.numel() > 1), HAS_SCALES=w_scales is not None,
        HAS_BIAS=bias is not None, ROWS=ROWS, WIDTH=WIDTH,
        num_warps=WIDTH * weight.element_size() // (16 * _LANES), **FP_FUSION,
    )  # fmt: skip

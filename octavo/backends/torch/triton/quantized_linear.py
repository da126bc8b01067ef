"""Products of int8 or fp8 codes with scales of tokens and rows, of the whole, or of blocks.

The tiles are those of matmul.py, with steps of 128 columns (as many bytes): pieces of 64 rows by
128 outputs, in parts. A step is summed by itself, int8 in int32 (exact for a whole part), fp8 in
the tensor cores, which keep fewer bits than float32 has; it is then scaled by its blocks' scales,
if there are such, and added in float32. At one token a piece uses a quarter of the cores' rate at
an H200's whole bandwidth. Rows are the same bits whatever T.

Where rows may change with T, one row of fp8 with scales of rows goes to row_linear.py and long
steps go to torch's _scaled_mm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import Quantized, QuantizedWeight
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.matmul import PIECE, TILE_N, load_columns, load_rows, place
from octavo.backends.torch.triton.parts import are_shared, cut, finish, new_sums, sum_parts
from octavo.backends.torch.triton.row_linear import quantized_row
from octavo.backends.torch.weights import BLOCK, has_block_scales

_LEAST_STEPS = 4
_BAND = 16
_SCALED_MM_CAPABILITIES = (8, 9), (11, 0)
"""From the first on, below the second: torch's product may fail with scales of rows on 12.x."""


@triton.jit
def add_step(
    sums, values, w, x_scales, w_scales, step, steps, rows, tokens, IS_BLOCKED: tl.constexpr
):  # fmt: skip
    """Sums and those of one step of 128 columns."""
    if values.dtype == tl.int8:
        return tl.dot(values, w, sums, out_dtype=tl.int32)
    if IS_BLOCKED:
        x_scale = tl.load(x_scales + rows * steps + step, mask=rows < tokens, other=0.0)
        scale = x_scale * tl.load(w_scales + step)
        return tl.fma(tl.dot(values, w), scale[:, None], sums)
    return sums + tl.dot(values, w)


@triton.jit
def put(
    out, total, x_scales, w_scales, bias, rows, at, tokens, n, x_scale_stride, w_scale_stride,
    IS_RAW: tl.constexpr, IS_BLOCKED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store a piece [rows, outputs], scaled and with the bias, or as it is (IS_RAW)."""
    to = out + rows.to(tl.int64)[:, None] * n + at[None, :]
    inside = (rows < tokens)[:, None] & (at < n)[None, :]
    if IS_RAW:
        tl.store(to, total, mask=inside)
    else:
        x_scale = tl.full([rows.shape[0]], 1.0, tl.float32)
        w_scale = tl.full([at.shape[0]], 1.0, tl.float32)
        if not IS_BLOCKED:
            x_scale = tl.load(x_scales + rows * x_scale_stride, mask=rows < tokens, other=0.0)
            w_scale = tl.load(w_scales + at * w_scale_stride, mask=at < n, other=0.0)
        addend = tl.zeros([at.shape[0]], tl.float32)
        if HAS_BIAS:
            addend = tl.load(bias + at, mask=at < n, other=0.0).to(tl.float32)
        value = finish(total, x_scale[:, None], w_scale[None, :], addend[None, :])
        tl.store(to, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "num_parts", "part_steps"])
def quantized_kernel(
    x, x_scales, weight, w_scales, bias, out, tokens, n, k, num_parts, part_steps,
    x_stride, weight_stride, x_scale_stride, w_scale_stride,
    IS_BLOCKED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_SHARED: tl.constexpr,
    PIECES: tl.constexpr, WHOLE_K: tl.constexpr, PIECE: tl.constexpr, TILE_N: tl.constexpr,
    STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """See quantized_linear; one program a tile, or a part of one (IS_SHARED)."""
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    steps = tl.cdiv(k, STEP)
    first_row, first_out = place(tokens, n, PIECE * PIECES, TILE_N, BAND)
    rows = first_row + tl.arange(0, PIECE)
    at = first_out + tl.arange(0, TILE_N)
    column = tl.arange(0, STEP)
    near_at = x + rows.to(tl.int64)[:, None] * x_stride + column[None, :]
    far_at = near_at + PIECE * x_stride
    w_row = tl.minimum(at, n - 1).to(tl.int64)
    w_at = weight + w_row[None, :] * weight_stride + column[:, None]
    w_scale_at = w_scales + first_out // TILE_N * steps
    total = tl.zeros([PIECE, TILE_N], tl.float32)
    far_total = tl.zeros([PIECE, TILE_N], tl.float32)
    first_part = 0
    if IS_SHARED:
        first_part = tl.program_id(1)
        out += first_part.to(tl.int64) * tokens * n
        num_parts = first_part + 1
    for part in range(first_part, num_parts):
        sums = tl.zeros([PIECE, TILE_N], kind)
        far_sums = tl.zeros([PIECE, TILE_N], kind)
        for step in range(part * part_steps, tl.minimum((part + 1) * part_steps, steps)):
            start = step * STEP
            w = load_columns(w_at + start, column[:, None], k - start, WHOLE_K)
            values = load_rows(near_at + start, rows < tokens, column, k - start, WHOLE_K)
            sums = add_step(
                sums, values, w, x_scales, w_scale_at, step, steps, rows, tokens, IS_BLOCKED
            )
            if PIECES == 2:
                far = rows + PIECE
                values = load_rows(far_at + start, far < tokens, column, k - start, WHOLE_K)
                far_sums = add_step(
                    far_sums, values, w, x_scales, w_scale_at, step, steps, far, tokens, IS_BLOCKED
                )
        total += sums.to(tl.float32)
        if PIECES == 2:
            far_total += far_sums.to(tl.float32)
    put(
        out, total, x_scales, w_scales, bias, rows, at, tokens, n, x_scale_stride, w_scale_stride,
        IS_SHARED, IS_BLOCKED, HAS_BIAS,
    )  # fmt: skip
    if PIECES == 2:
        put(
            out, far_total, x_scales, w_scales, bias, rows + PIECE, at, tokens, n,
            x_scale_stride, w_scale_stride, IS_SHARED, IS_BLOCKED, HAS_BIAS,
        )  # fmt: skip


def quantized_linear(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    deterministic: bool,
) -> Tensor:
    """The product of two that are quantized; see Kernels."""
    (tokens, k), n = x.codes.shape, weight.codes.shape[0]
    is_blocked = has_block_scales(weight)
    if not deterministic and not is_blocked:
        if tokens == 1 and x.codes.dtype == torch.float8_e4m3fn:
            return quantized_row(x, weight, bias, dtype)
        if _takes_scaled_mm(x, weight, dtype):
            return _scaled_mm(x, weight, bias, dtype)
    assert is_blocked or x.scales.shape[1] == 1  # scales of groups go with scales of blocks
    n_tiles, steps = triton.cdiv(n, TILE_N), triton.cdiv(k, BLOCK)
    parts = cut(n_tiles, steps, _LEAST_STEPS)
    pieces = 1 if tokens <= PIECE else 2
    num_tiles = n_tiles * triton.cdiv(tokens, PIECE * pieces)
    is_shared = are_shared(parts, num_tiles)
    out = torch.empty((tokens, n), dtype=dtype, device=x.codes.device)
    sums = new_sums(parts, tokens, n, x.codes.device) if is_shared else out
    quantized_kernel[(num_tiles, parts.num if is_shared else 1)](
        x.codes, x.scales, weight.codes, weight.scales, bias, sums, tokens, n, k, parts.num,
        parts.steps, x.codes.stride(0), weight.codes.stride(0),
        int(x.scales.numel() > 1), int(weight.scales.numel() > 1),
        IS_BLOCKED=is_blocked, HAS_BIAS=bias is not None, IS_SHARED=is_shared, PIECES=pieces,
        WHOLE_K=k % BLOCK == 0, PIECE=PIECE, TILE_N=TILE_N, STEP=BLOCK, BAND=_BAND,
        num_warps=8, num_stages=2 if torch.version.hip else 4, **FP_FUSION,
    )  # fmt: skip
    if is_shared and is_blocked:
        sum_parts(sums, out, bias)
    elif is_shared:
        sum_parts(sums, out, bias, weight.scales, x.scales)
    return out


def _takes_scaled_mm(x: Quantized, weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether torch's product takes these, and there are enough rows for it to be the faster."""
    first, end = _SCALED_MM_CAPABILITIES
    (tokens, k), n = x.codes.shape, weight.codes.shape[0]
    return (
        tokens > PIECE
        and x.codes.is_cuda
        and torch.version.hip is None
        and x.codes.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and k % 16 == 0
        and n % 16 == 0
        and first <= torch.cuda.get_device_capability(x.codes.device) < end
    )


def _scaled_mm(
    x: Quantized, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    tokens, n = x.codes.shape[0], weight.codes.shape[0]
    out: Tensor = torch._scaled_mm(
        x.codes,
        weight.codes.T,
        scale_a=x.scales.expand(tokens, 1).contiguous(),
        scale_b=weight.scales.T.expand(1, n).contiguous(),
        bias=bias,
        out_dtype=dtype,
    )
    return out

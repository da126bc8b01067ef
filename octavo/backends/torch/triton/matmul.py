"""Dense products whose rows do not change with the batch: x @ weight.T + bias.

A library chooses its tiles by the number of rows, and so its order of sums. Here every row is
multiplied in a piece of 64 rows by 128 outputs by 64 columns, whatever T: a program has one piece,
or two that share what they read of the weight (128 rows, for long steps). Columns are summed in
parts (see parts.py). A step of one token wastes 63 rows of a piece: 275 TFLOP/s of tensor cores at
an H200's whole bandwidth, a third of what they can do, so bandwidth remains the limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.triton.dot import dot
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.parts import are_shared, cut, new_sums, sum_parts

PIECE, TILE_N = 64, 128
_LEAST_STEPS = 8
_BAND = 16
"""Tiles of rows that run together, for the sake of the L2 cache."""


@triton.jit
def place(tokens, n, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """The first row and output of this program's tile: rows first, in bands."""
    m_tiles = tl.cdiv(tokens, TILE_M)
    n_tiles = tl.cdiv(n, TILE_N)
    tile = tl.program_id(0)
    first = tile // (BAND * n_tiles) * BAND
    rows = tl.minimum(m_tiles - first, BAND)
    inner = tile % (BAND * n_tiles)
    return (first + inner % rows) * TILE_M, inner // rows * TILE_N


@triton.jit
def load_columns(place, column, left, WHOLE_K: tl.constexpr):
    """What lies at `place`, of columns of which `left` are left; zeros after them."""
    if WHOLE_K:
        return tl.load(place)
    return tl.load(place, mask=column < left, other=0.0)


@triton.jit
def load_rows(place, inside, column, left, WHOLE_K: tl.constexpr):
    """The same of x, [rows, columns]; a row that is not `inside` is zeros and is not read."""
    mask = inside[:, None]
    if not WHOLE_K:
        mask = mask & (column < left)[None, :]
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def put(out, total, bias, rows, at, tokens, n, HAS_BIAS: tl.constexpr):
    """Store a piece [rows, outputs], with the bias."""
    inside = (rows < tokens)[:, None] & (at < n)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + at, mask=at < n, other=0.0).to(tl.float32)[None, :]
    to = out + rows.to(tl.int64)[:, None] * n + at[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "num_parts", "part_steps"])
def matmul_kernel(
    x, weight, bias, out, tokens, n, k, num_parts, part_steps, x_stride, weight_stride,
    HAS_BIAS: tl.constexpr, IS_SHARED: tl.constexpr, PIECES: tl.constexpr, WHOLE_K: tl.constexpr,
    PIECE: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """See matmul; one program a tile, or a part of a tile (IS_SHARED: float32 [parts, T, N])."""
    first_row, first_out = place(tokens, n, PIECE * PIECES, TILE_N, BAND)
    rows = first_row + tl.arange(0, PIECE)
    at = first_out + tl.arange(0, TILE_N)
    column = tl.arange(0, STEP)
    near_at = x + rows.to(tl.int64)[:, None] * x_stride + column[None, :]
    far_at = near_at + PIECE * x_stride
    w_row = tl.minimum(at, n - 1).to(tl.int64)
    w_at = weight + w_row[None, :] * weight_stride + column[:, None]
    total = tl.zeros([PIECE, TILE_N], tl.float32)
    far_total = tl.zeros([PIECE, TILE_N], tl.float32)
    first_part = 0
    if IS_SHARED:
        first_part = tl.program_id(1)
        out += first_part.to(tl.int64) * tokens * n
        num_parts = first_part + 1
    for part in range(first_part, num_parts):
        sums = tl.zeros([PIECE, TILE_N], tl.float32)
        far_sums = tl.zeros([PIECE, TILE_N], tl.float32)
        stop = tl.minimum((part + 1) * part_steps, tl.cdiv(k, STEP))
        for step in range(part * part_steps, stop):
            start = step * STEP
            w = load_columns(w_at + start, column[:, None], k - start, WHOLE_K)
            values = load_rows(near_at + start, rows < tokens, column, k - start, WHOLE_K)
            sums = dot(values, w, sums)
            if PIECES == 2:
                far = rows + PIECE < tokens
                others = load_rows(far_at + start, far, column, k - start, WHOLE_K)
                far_sums = dot(others, w, far_sums)
        total += sums
        if PIECES == 2:
            far_total += far_sums
    put(out, total, bias, rows, at, tokens, n, HAS_BIAS)
    if PIECES == 2:
        put(out, far_total, bias, rows + PIECE, at, tokens, n, HAS_BIAS)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product x @ weight.T + bias; see Kernels."""
    (tokens, k), n = x.shape, weight.shape[0]
    step = 64 if x.element_size() == 2 else 32
    n_tiles = triton.cdiv(n, TILE_N)
    parts = cut(n_tiles, triton.cdiv(k, step), _LEAST_STEPS)
    pieces = 1 if tokens <= PIECE else 2
    num_tiles = n_tiles * triton.cdiv(tokens, PIECE * pieces)
    is_shared = are_shared(parts, num_tiles)
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    sums = new_sums(parts, tokens, n, x.device) if is_shared else out
    matmul_kernel[(num_tiles, parts.num if is_shared else 1)](
        x, weight, bias, sums, tokens, n, k, parts.num, parts.steps, x.stride(0),
        weight.stride(0), HAS_BIAS=bias is not None and not is_shared, IS_SHARED=is_shared,
        PIECES=pieces, WHOLE_K=k % step == 0, PIECE=PIECE, TILE_N=TILE_N, STEP=step, BAND=_BAND,
        num_warps=8, num_stages=2 if torch.version.hip else 4, **FP_FUSION,
    )  # fmt: skip
    if is_shared:
        sum_parts(sums, out, bias)
    return out

"""Products of rows with their experts' weights, in one launch and without asking for their counts.

Rows stand sorted by expert. An expert's rows begin a tile of their own, so there are at most T /
TILE_M + E tiles: that many are launched, and each finds its expert from the offsets on the device.
Tiles that are too many do nothing. 16 rows a tile if experts have few rows on average, else 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.triton.dot import dot
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.matmul import load_columns, load_rows

TILE_N, STEP = 128, 64


@triton.jit(do_not_specialize=["tokens"])
def grouped_matmul_kernel(
    x, weight, offsets, out, tokens, n, k, num_experts, x_stride,
    WHOLE_K: tl.constexpr, EXPERTS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """See grouped_matmul; EXPERTS is num_experts or more, a power of two."""
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < num_experts
    begins = tl.load(offsets + experts, mask=is_expert, other=0)
    ends = tl.load(offsets + experts + 1, mask=is_expert, other=0)
    tiles = (ends - begins + TILE_M - 1) // TILE_M
    tiles_to = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    if tile < tl.sum(tiles, 0):
        is_it = (tiles_to - tiles <= tile) & (tile < tiles_to)
        expert = tl.sum(tl.where(is_it, experts, 0), 0)
        begin = tl.sum(tl.where(is_it, begins + (tile - tiles_to + tiles) * TILE_M, 0), 0)
        end = tl.sum(tl.where(is_it, ends, 0), 0)
        rows = begin + tl.arange(0, TILE_M)
        at = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        column = tl.arange(0, STEP)
        w_row = expert.to(tl.int64) * n + tl.minimum(at, n - 1)
        x_at = x + rows.to(tl.int64)[:, None] * x_stride + column[None, :]
        w_at = weight + w_row[None, :] * k + column[:, None]
        sums = tl.zeros([TILE_M, TILE_N], tl.float32)
        for start in range(0, k, STEP):
            values = load_rows(x_at + start, rows < end, column, k - start, WHOLE_K)
            w = load_columns(w_at + start, column[:, None], k - start, WHOLE_K)
            sums = dot(values, w, sums)
        to = out + rows.to(tl.int64)[:, None] * n + at[None, :]
        inside = (rows < end)[:, None] & (at < n)[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=inside)


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Each row's product with the weight of its expert.

    Args:
        x: [T, K], sorted by expert.
        weight: [E, N, K] of x's dtype, contiguous.
        offsets: int32 [E + 1] on the device: expert e has the rows offsets[e] to offsets[e + 1].

    Returns:
        [T, N]; rows that no expert has are not written.
    """
    (tokens, k), (num_experts, n, _) = x.shape, weight.shape
    tile_m = 16 if tokens <= 16 * num_experts else 64
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    num_tiles = tokens // tile_m + min(tokens, num_experts)
    grouped_matmul_kernel[(num_tiles, triton.cdiv(n, TILE_N))](
        x, weight, offsets, out, tokens, n, k, num_experts, x.stride(0), WHOLE_K=k % STEP == 0,
        EXPERTS=triton.next_power_of_2(num_experts), TILE_M=tile_m, TILE_N=TILE_N, STEP=STEP,
        num_warps=4, num_stages=2 if torch.version.hip else 4, **FP_FUSION,
    )  # fmt: skip
    return out

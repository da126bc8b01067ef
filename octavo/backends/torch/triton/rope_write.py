"""Rotation of queries and keys, and the writes of K and V to the paged cache, in one launch.

A program has some heads of one token, of q, of k or of v, as two halves of each: the pairs that
rotate stand in the same place of both. Memory is the limit: each number is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import LayerCache, StepArrays, query_dtype
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.quantize import bits_of_size, encode, scale_of

_FEWEST, _MOST = 256, 512
"""Pairs of a program: one warp or two, each thread with 16 bytes of both halves."""


@triton.jit
def read(place, inside, D: tl.constexpr):
    """Halves [heads, D / 2] in float32."""
    first = tl.load(place, mask=inside, other=0).to(tl.float32)
    return first, tl.load(place + D // 2, mask=inside, other=0).to(tl.float32)


@triton.jit
def rotate(first, second, table, positions, token, angle, D: tl.constexpr):
    """Rotate halves [heads, D / 2] of a token."""
    row = table + tl.load(positions + token).to(tl.int64) * D + angle
    inside = angle < D // 2
    cos = tl.load(row, mask=inside, other=0)[None, :]
    sin = tl.load(row + D // 2, mask=inside, other=0)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def factor_of(place, inside, is_query):
    """What queries are multiplied by, for keys its reciprocal."""
    factor = tl.load(place, mask=inside, other=1)
    return tl.where(is_query, factor, 1.0 / factor)


@triton.jit
def write_codes(first, second, place, inside, D: tl.constexpr):
    """Round halves [heads, D / 2], each head a group, and write the codes; returns the scales."""
    peaks = tl.max(tl.maximum(bits_of_size(first), bits_of_size(second)), axis=1)
    int8: tl.constexpr = place.dtype.scalar.element_ty.is_int8()
    scale, factor = scale_of(peaks, int8)
    tl.store(place, encode(first * factor[:, None], int8), mask=inside)
    tl.store(place + D // 2, encode(second * factor[:, None], int8), mask=inside)
    return scale


@triton.jit
def write(first, second, place, inside, D: tl.constexpr):
    """Write halves [heads, D / 2], rounded to what is there."""
    tl.store(place, first, mask=inside)
    tl.store(place + D // 2, second, mask=inside)


@triton.jit
def rope_write_kernel(
    q,
    k,
    v,
    out,
    table,
    positions,
    slots,
    cache,
    scales,
    factors,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    scale_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
):
    """TILE heads of a token; HALF is D / 2 or the next power of two."""
    q_tiles: tl.constexpr = (HEADS + TILE - 1) // TILE
    kv_tiles: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    token = (tl.program_id(0) // (q_tiles + 2 * kv_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (q_tiles + 2 * kv_tiles)
    is_query = tile < q_tiles
    kv_tile = tl.maximum(tile - q_tiles, 0)
    kind = kv_tile // kv_tiles  # of K and of queries 0, of V 1
    head = tl.where(is_query, tile, kv_tile % kv_tiles) * TILE + tl.arange(0, TILE)
    angle = tl.arange(0, HALF)
    there = head < tl.where(is_query, HEADS, KV_HEADS)
    inside = there[:, None] & (angle < D // 2)[None, :]
    pair = head[:, None] * D + angle[None, :]
    row = (k + token * k_stride if kind == 0 else v + token * v_stride) + pair
    row = q + token * q_stride + pair if is_query else row
    first, second = read(row, inside, D)
    if kind == 0:
        if table is not None:
            first, second = rotate(first, second, table, positions, token, angle, D)
        if factors is not None:
            kv_head = tl.where(is_query, head // (HEADS // KV_HEADS), head)
            place = factors + kv_head[:, None] * D + angle[None, :]
            first *= factor_of(place, inside, is_query)
            second *= factor_of(place + D // 2, inside, is_query)
    if is_query:
        write(first, second, out + token * (HEADS * D) + pair, inside, D)
    else:
        slot = tl.load(slots + token)
        inside = inside & (slot >= 0)
        block = (slot // BLOCK_SIZE).to(tl.int64)
        line = (kind * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
        place = cache + block * block_stride + line[:, None] * D + angle[None, :]
        if scales is not None:
            scale = write_codes(first, second, place, inside, D)
            tl.store(scales + block * scale_stride + line, scale, mask=there & (slot >= 0))
        else:
            write(first, second, place, inside, D)


def tile_of(kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Heads of a program and half of a head, both powers of two."""
    half = triton.next_power_of_2(max(head_dim // 2, 1))
    heads = max(triton.next_power_of_2(kv_heads), _FEWEST // half)
    return max(min(heads, _MOST // half), 1), half


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    arrays: StepArrays,
    cache: LayerCache,
    factors: Tensor | None,
) -> Tensor:
    """See Kernels.rope_write."""
    tokens, width = q.shape
    _, _, kv_heads, block_size, head_dim = cache.values.shape
    heads = width // head_dim
    dtype = query_dtype(q.dtype, cache.values.dtype)
    out = torch.empty((tokens, width), dtype=dtype, device=q.device)
    tile, half = tile_of(kv_heads, head_dim)
    programs = triton.cdiv(heads, tile) + 2 * triton.cdiv(kv_heads, tile)
    if tokens:
        rope_write_kernel[(tokens * programs,)](
            q,
            k,
            v,
            out,
            table,
            arrays.positions,
            arrays.slots,
            cache.values,
            cache.scales,
            factors,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            cache.values.stride(0),
            0 if cache.scales is None else cache.scales.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=head_dim,
            BLOCK_SIZE=block_size,
            TILE=tile,
            HALF=half,
            num_warps=max(tile * half // 256, 1),
            **FP_FUSION,
        )
    return out

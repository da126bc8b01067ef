"""Copies of whole blocks of the cache over all layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.triton.launch import FP_FUSION

_PIECE = 8192
"""Bytes of a program: four times 16 of each thread of four warps."""


@triton.jit
def copy_blocks_kernel(
    pool, pairs, layer_stride, block_stride, SIZE: tl.constexpr, PIECE: tl.constexpr
):
    """One piece of a block of SIZE elements of a layer."""
    pair = pairs + tl.program_id(0) * 2
    layer = pool + tl.program_id(1).to(tl.int64) * layer_stride
    source = layer + tl.load(pair).to(tl.int64) * block_stride
    destination = layer + tl.load(pair + 1).to(tl.int64) * block_stride
    at = tl.program_id(2) * PIECE + tl.arange(0, PIECE)
    tl.store(destination + at, tl.load(source + at, mask=at < SIZE), mask=at < SIZE)


def copy_blocks(pool: Tensor, pairs: Tensor) -> None:
    """See Kernels.copy_blocks."""
    size = torch.int32.itemsize
    places = (pool.storage_offset(), pool.stride(0), pool.stride(1), pool.shape[2])
    if all(place % size == 0 for place in places):  # as of any real cache
        pool = pool.view(torch.int32)
    layers, _, length = pool.shape
    piece = _PIECE // pool.itemsize
    if len(pairs):
        copy_blocks_kernel[(len(pairs), layers, triton.cdiv(length, piece))](
            pool,
            pairs,
            pool.stride(0),
            pool.stride(1),
            SIZE=length,
            PIECE=piece,
            num_warps=4,
            **FP_FUSION,
        )

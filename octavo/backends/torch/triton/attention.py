"""Paged attention: one ragged kernel for prefill and mixed steps, and split caches for decode.

Rows of a tile are the heads of one kv head for some tokens of one sequence; tiles of keys stand at
absolute positions, multiples of BLOCK_N, gathered block by block. Steps whose tokens fit into one
tile a sequence take attention_split.py (if the results of parts fit into 256 MiB, or each sequence
has one token), all others the ragged kernel here, whose tiles find their sequence by counting, so
that sequences of any lengths share a launch and the host need not wait. Where such a step has
single tokens with long contexts, these take attention_split.py, and the ragged kernel the rest.

Deterministic: both kernels have the same tiles, and both cut what a row sees at the multiples of
SEGMENT, start the softmax anew in each segment and merge the segments in ascending order. So a row
goes through the same operations on the same numbers whether it comes alone, in a chunk or in a
whole prefill: its bytes do not depend on what stands beside it. It costs the larger tile in decode,
the smaller one in prefill, and there a second accumulator. Otherwise each kernel has the tiles that
suit it best, one softmax over all of a row, and as many parts in decode as keep the device busy.

Tiles on Hopper are chosen by generated code (Triton 3.6): 128 rows (64 if deterministic) with five
stages, which keep a tile of keys on its way, wgmma that is never waited for one by one, and queries
in the dtype of products, which stay in shared memory. `benchmarks/gpu/parts/attention_tiles.py` has
a device compare the alternatives; until one has run, all of it is a prediction.

Limits on an H200: decode reads K and V once, 4.3 TB/s; prefill is 4 * head_dim operations a pair
of query and key, at 780 TFLOP/s.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import LayerCache, StepArrays
from octavo.backends.torch.triton.attention_shapes import (
    MOST_SPLIT_ROWS,
    Shape,
    cache_strides,
    cache_tensors,
    choose_shape,
    device_of,
    score_factors,
)
from octavo.backends.torch.triton.attention_split import fits_split, launch_split
from octavo.backends.torch.triton.attention_tiles import (
    LANES,
    UNSEEN,
    attend,
    finish,
    merge,
    rows_of_tile,
)
from octavo.graph import ops as op

LEAST_SPLIT_LEN = 2048
"""Of what a single token sees: more than that is split beside prompts too, for walking it in one
program would take longer than two more launches."""


@triton.jit
def sequence_of_tile(starts, num_sequences, tile, TOKENS: tl.constexpr):
    """The sequence of a tile: that of index b begins with tile starts[b] // TOKENS + b."""
    found = 0
    for first in range(1, num_sequences, LANES):
        b = first + tl.arange(0, LANES)
        start = tl.load(starts + b, mask=b < num_sequences, other=0)
        begun = (start // TOKENS + b <= tile) & (b < num_sequences)
        found += tl.sum(begun.to(tl.int32))
    return found


@triton.jit(do_not_specialize=["table_stride", "num_sequences", "least_query_len"])
def ragged_kernel(
    query,
    values,
    scales,
    tables,
    starts,
    seq_lens,
    out,
    query_stride,
    block_stride,
    scale_stride,
    table_stride,
    num_sequences,
    least_query_len,
    scale,
    cap_scale,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CODES: tl.constexpr,
    FP8_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of the rows of one tile; grid (tiles of all sequences * tiles of heads).

    Sequences with fewer tokens than least_query_len are left out.
    """
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    HEAD_TILES: tl.constexpr = KV_HEADS * tl.cdiv(NUM_HEADS // KV_HEADS, HEADS)
    # The last tiles, which see most, go first, of all heads: what is left to the end is short.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEAD_TILES
    b = sequence_of_tile(starts, num_sequences, tile, TOKENS)
    token = tl.load(starts + b)
    end_token = tl.load(starts + b + 1)
    query_len = end_token - token
    skipped = (tile - (token // TOKENS + b)) * TOKENS
    first = tl.load(seq_lens + b) - query_len + skipped
    token += skipped
    tokens = tl.minimum(end_token - token, TOKENS)
    if (tokens <= 0) | (query_len < least_query_len):
        return
    kv_head, offset, head, exists = rows_of_tile(
        tl.program_id(0) % HEAD_TILES, NUM_HEADS, KV_HEADS, HEADS, BLOCK_M
    )
    dim = tl.arange(0, DIM)
    rows = (token + offset).to(tl.int64)
    mask = (exists & (offset < tokens))[:, None] & (dim[None, :] < HEAD_DIM)
    spots = rows * query_stride + head * HEAD_DIM
    q = tl.load(query + spots[:, None] + dim[None, :], mask=mask, other=0).to(DTYPE)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    peak = tl.full((BLOCK_M,), UNSEEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    table = tables + b.to(tl.int64) * table_stride
    k_at = kv_head * BLOCK_SIZE
    last = first + tokens - 1
    # fmt: off
    if SEGMENT:
        begin = tl.maximum(first - WINDOW + 1, 0) // SEGMENT if WINDOW else 0
        for segment in range(begin, tl.cdiv(last + 1, SEGMENT)):
            part_acc, part_peak, part_total = attend(
                tl.zeros((BLOCK_M, DIM), tl.float32), tl.full((BLOCK_M,), UNSEEN, tl.float32),
                tl.zeros((BLOCK_M,), tl.float32),
                q, first + offset, first, last, segment * SEGMENT, (segment + 1) * SEGMENT,
                table, values + k_at * HEAD_DIM, scales + k_at,
                block_stride, scale_stride, scale, cap_scale,
                KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, CODES, FP8_BITS,
                P_DTYPE, PRECISION, True,
            )
            acc, peak, total = merge(acc, peak, total, part_acc, part_peak, part_total)
    else:
        acc, peak, total = attend(
            acc, peak, total, q, first + offset, first, last, 0, last + 1,
            table, values + k_at * HEAD_DIM, scales + k_at,
            block_stride, scale_stride, scale, cap_scale,
            KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, CODES, FP8_BITS,
            P_DTYPE, PRECISION, True,
        )
    # fmt: on
    result = finish(acc, total).to(out.dtype.element_ty)
    spots = (rows * NUM_HEADS + head) * HEAD_DIM
    tl.store(out + spots[:, None] + dim[None, :], result, mask=mask)


def attention(
    q: Tensor,
    cache: LayerCache,
    arrays: StepArrays,
    operator: op.PagedAttention,
    dtype: torch.dtype,
    deterministic: bool,
) -> Tensor:
    """Causal attention of each row over its sequence's cache; see `Kernels.attention`."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _, _, _, block_size, _ = cache.values.shape
    device = device_of(q.device)

    def shape_of(tokens: int) -> Shape:
        return choose_shape(
            operator, q.dtype, cache.values.dtype, block_size, tokens, deterministic, device
        )

    shape = shape_of(min(arrays.max_query_len, MOST_SPLIT_ROWS + 1))
    if fits_split(arrays, shape):
        launch_split(q, cache, arrays, operator, shape, out)
        return out
    least_query_len = 1
    longest = arrays.max_decode_len
    if min(longest, operator.window or longest) > LEAST_SPLIT_LEN:
        decodes = replace(arrays, max_query_len=1, max_seq_len=longest)
        launch_split(q, cache, decodes, operator, shape_of(1), out)
        least_query_len = 2
    shape = shape_of(MOST_SPLIT_ROWS + 1)
    num_sequences = len(arrays.seq_lens)
    tile = shape.constants["BLOCK_M"] // shape.constants["HEADS"]
    ragged_kernel[((len(q) // tile + num_sequences) * shape.head_tiles,)](
        q,
        *cache_tensors(cache, shape),
        arrays.block_tables,
        arrays.starts,
        arrays.seq_lens,
        out,
        q.stride(0),
        *cache_strides(cache),
        arrays.block_tables.stride(0),
        num_sequences,
        least_query_len,
        *score_factors(operator),
        **shape.constants,
        **shape.options,
    )
    return out

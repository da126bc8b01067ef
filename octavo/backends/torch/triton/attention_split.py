"""Attention of sequences with few tokens: the cache is split among programs, then merged.

The parts of all sequences are one list, so that a batch of unequal sequences fills the device as
evenly as one of equals; a program finds its part by counting, for the host knows no lengths. With
SEGMENT a part is what lies between two multiples of it. Else (0) the device divides what is to be
read among `slots` parts, about as many as it can work at at once.

Tiles have 16 rows, or 64 where a sequence has more, and where Hopper reads codes. What all rows see
whole is not masked: a branch for each tile, so that the loop needs no second pipeline.

A part is kept as (acc, peak, total) in float32 at [part, token, head], and a second kernel merges
them in ascending order. A sequence of one part has no need of it: its result is written at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import LayerCache, StepArrays
from octavo.backends.torch.triton.attention_shapes import (
    MERGE_OPTIONS,
    Shape,
    cache_strides,
    cache_tensors,
    score_factors,
)
from octavo.backends.torch.triton.attention_tiles import (
    LANES,
    UNSEEN,
    attend,
    finish,
    merge,
    rows_of_tile,
)
from octavo.graph import ops as op

MERGED_AT_ONCE = tl.constexpr(8)
"""Parts whose loads do not wait for each other."""
MERGED_HEADS = tl.constexpr(8)
"""Of a program that merges: they share its plan."""
LEAST_TILES = tl.constexpr(2)
"""Of keys in a part, where there is a choice."""
MOST_PARTIAL_BYTES = 256 << 20
"""Of the results of parts, for sequences of several tokens."""


@triton.jit
def extent(
    starts, seq_lens, sequence, inside, max_query_len, ALIGN: tl.constexpr, WINDOW: tl.constexpr
):
    """What the rows of sequences see: begin, a multiple of ALIGN, end, and whether it is read.

    It is not if a sequence is none, or has more than max_query_len tokens: then begin is end.
    """
    count = tl.load(starts + sequence + 1, mask=inside, other=0)
    count -= tl.load(starts + sequence, mask=inside, other=0)
    end = tl.load(seq_lens + sequence, mask=inside, other=0)
    inside = inside & (count <= max_query_len)
    end = tl.where(inside, end, 0)
    begin = tl.zeros_like(end)
    if WINDOW:
        begin = tl.where(inside, tl.maximum(end - count - WINDOW + 1, 0) // ALIGN * ALIGN, 0)
    return begin, end, inside


@triton.jit
def count_parts(
    starts,
    seq_lens,
    sequence,
    num_sequences,
    max_query_len,
    length,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """How many parts sequences have: at least one, which writes the rows that pad a step."""
    begin, end, inside = extent(
        starts, seq_lens, sequence, sequence < num_sequences, max_query_len, ALIGN, WINDOW
    )
    return tl.where(inside, tl.maximum(tl.cdiv(end - begin, length), 1), 0)


@triton.jit
def plan(
    starts,
    seq_lens,
    num_sequences,
    max_query_len,
    slots,
    SEGMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The greatest length of a part, and how many parts there are (a bound if not SEGMENT)."""
    summed = 0
    for first in range(0, num_sequences, LANES):
        sequence = first + tl.arange(0, LANES)
        if SEGMENT:
            parts = count_parts(
                starts, seq_lens, sequence, num_sequences, max_query_len, SEGMENT, ALIGN, WINDOW
            )
            summed += tl.sum(parts)
        else:
            begin, end, _ = extent(
                starts, seq_lens, sequence, sequence < num_sequences, max_query_len, ALIGN, WINDOW
            )
            summed += tl.sum(end - begin)
    if SEGMENT:
        length = SEGMENT
        count = summed
    else:
        length = tl.maximum(tl.cdiv(tl.cdiv(summed, slots), ALIGN) * ALIGN, LEAST_TILES * ALIGN)
        count = num_sequences + slots
    return length, count


@triton.jit
def locate(
    starts,
    seq_lens,
    num_sequences,
    max_query_len,
    part,
    length,
    ALIGN: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The sequence of a part (num_sequences: of none) and the first part of that sequence."""
    found = 0
    first_part = 0
    before = 0
    for first in range(0, num_sequences, LANES):
        sequence = first + tl.arange(0, LANES)
        parts = count_parts(
            starts, seq_lens, sequence, num_sequences, max_query_len, length, ALIGN, WINDOW
        )
        ends = before + tl.cumsum(parts)
        passed = (ends <= part) & (sequence < num_sequences)
        found += tl.sum(passed.to(tl.int32))
        first_part = tl.maximum(first_part, tl.max(tl.where(passed, ends, 0)))
        before += tl.sum(parts)
    return found, first_part


@triton.jit(
    do_not_specialize=["table_stride", "num_sequences", "max_query_len", "stats_size", "slots"]
)
def split_kernel(
    query,
    values,
    scales,
    tables,
    starts,
    seq_lens,
    out,
    partial,
    stats,
    query_stride,
    block_stride,
    scale_stride,
    table_stride,
    num_sequences,
    max_query_len,
    stats_size,
    slots,
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
    """Attention to one part of one sequence, of the heads of one kv head; grid (parts, tiles)."""
    ALIGN: tl.constexpr = SEGMENT if SEGMENT else BLOCK_N
    kv_head, offset, head, exists = rows_of_tile(
        tl.program_id(1), NUM_HEADS, KV_HEADS, HEADS, BLOCK_M
    )
    dim = tl.arange(0, DIM)
    k_at = kv_head * BLOCK_SIZE
    # fmt: off
    length, count = plan(
        starts, seq_lens, num_sequences, max_query_len, slots, SEGMENT, ALIGN, WINDOW
    )
    for part in range(tl.program_id(0), count, tl.num_programs(0)):
        b, first_part = locate(
            starts, seq_lens, num_sequences, max_query_len, part, length, ALIGN, WINDOW
        )
        if b < num_sequences:
            token = tl.load(starts + b)
            tokens = tl.load(starts + b + 1) - token
            begin, end, _ = extent(starts, seq_lens, b, True, max_query_len, ALIGN, WINDOW)
            parts = tl.maximum(tl.cdiv(end - begin, length), 1)
            if not SEGMENT:  # as even as whole tiles can be
                even = tl.cdiv(tl.cdiv(end - begin, parts), BLOCK_N) * BLOCK_N
            else:
                even = SEGMENT
            begin += (part - first_part) * even
            live = exists & (offset < tokens)
            rows = (token + offset).to(tl.int64)
            mask = live[:, None] & (dim[None, :] < HEAD_DIM)
            q = tl.load(
                query + rows[:, None] * query_stride + (head * HEAD_DIM)[:, None] + dim[None, :],
                mask=mask, other=0,
            ).to(DTYPE)
            acc, peak, total = attend(
                tl.zeros((BLOCK_M, DIM), tl.float32),
                tl.full((BLOCK_M,), UNSEEN, tl.float32),
                tl.zeros((BLOCK_M,), tl.float32),
                q, end - tokens + offset, end - tokens, end - 1, begin, begin + even,
                tables + b.to(tl.int64) * table_stride,
                values + k_at * HEAD_DIM, scales + k_at,
                block_stride, scale_stride, scale, cap_scale,
                KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, CODES, FP8_BITS,
                P_DTYPE, PRECISION, False,
            )
            if parts == 1:
                result = finish(acc, total).to(out.dtype.element_ty)
                spots = (rows * NUM_HEADS + head) * HEAD_DIM
                tl.store(out + spots[:, None] + dim[None, :], result, mask=mask)
            else:
                spots = (offset.to(tl.int64) + part * max_query_len) * NUM_HEADS + head
                tl.store(partial + (spots * HEAD_DIM)[:, None] + dim[None, :], acc, mask=mask)
                tl.store(stats + spots, peak, mask=live)
                tl.store(stats + stats_size + spots, total, mask=live)
    # fmt: on


@triton.jit(do_not_specialize=["num_sequences", "max_query_len", "stats_size", "slots"])
def merge_kernel(
    starts,
    seq_lens,
    out,
    partial,
    stats,
    num_sequences,
    max_query_len,
    stats_size,
    slots,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Merge the parts of some heads of one token; grid (tiles of heads, tokens, sequences)."""
    ALIGN: tl.constexpr = SEGMENT if SEGMENT else BLOCK_N
    head = tl.program_id(0) * MERGED_HEADS + tl.arange(0, MERGED_HEADS)
    exists = head < NUM_HEADS
    offset = tl.program_id(1)
    b = tl.program_id(2)
    token = tl.load(starts + b)
    tokens = tl.load(starts + b + 1) - token
    length, _ = plan(starts, seq_lens, num_sequences, max_query_len, slots, SEGMENT, ALIGN, WINDOW)
    parts = count_parts(starts, seq_lens, b, num_sequences, max_query_len, length, ALIGN, WINDOW)
    if (offset < tokens) & (parts > 1):
        first_part = 0
        for first in range(0, b, LANES):
            sequence = first + tl.arange(0, LANES)
            before = count_parts(
                starts, seq_lens, sequence, b, max_query_len, length, ALIGN, WINDOW
            )
            first_part += tl.sum(before)
        dim = tl.arange(0, DIM)[None, :]
        acc = tl.zeros((MERGED_HEADS, DIM), tl.float32)
        peak = tl.full((MERGED_HEADS,), UNSEEN, tl.float32)
        total = tl.zeros((MERGED_HEADS,), tl.float32)
        for base in range(0, parts, MERGED_AT_ONCE):
            for i in tl.static_range(MERGED_AT_ONCE):
                part = base + i
                live = exists & (part < parts)
                spots = ((first_part + part).to(tl.int64) * max_query_len + offset) * NUM_HEADS
                spots += head
                acc, peak, total = merge(
                    acc,
                    peak,
                    total,
                    tl.load(
                        partial + (spots * HEAD_DIM)[:, None] + dim,
                        mask=live[:, None] & (dim < HEAD_DIM),
                        other=0,
                    ),
                    tl.load(stats + spots, mask=live, other=UNSEEN),
                    tl.load(stats + stats_size + spots, mask=live, other=0),
                )
        result = finish(acc, total).to(out.dtype.element_ty)
        place = ((token + offset).to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
        mask = exists[:, None] & (dim < HEAD_DIM)
        tl.store(out + place[:, None] + dim, result, mask=mask)


def launch_split(
    q: Tensor,
    cache: LayerCache,
    arrays: StepArrays,
    operator: op.PagedAttention,
    shape: Shape,
    out: Tensor,
) -> None:
    """Write the attention of the sequences with at most max_query_len tokens to `out`.

    So many of them fit into a tile; the rows of other sequences stay as they are.
    """
    num_sequences = len(arrays.seq_lens)
    slots = slots_of(shape, num_sequences)
    parts = most_parts(arrays, shape)
    size = partial_rows(arrays, shape)
    partial = torch.empty((size, operator.head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((2, size), dtype=torch.float32, device=q.device)
    lists = (arrays.starts, arrays.seq_lens)
    plan = (num_sequences, arrays.max_query_len, size, slots)
    split_kernel[min(parts, num_sequences + slots), shape.head_tiles](
        q,
        *cache_tensors(cache, shape),
        arrays.block_tables,
        *lists,
        out,
        partial,
        stats,
        q.stride(0),
        *cache_strides(cache),
        arrays.block_tables.stride(0),
        *plan,
        *score_factors(operator),
        **shape.constants,
        **shape.options,
    )
    if size:
        head_tiles = triton.cdiv(operator.num_heads, MERGED_HEADS.value)
        merge_kernel[head_tiles, arrays.max_query_len, num_sequences](
            *lists, out, partial, stats, *plan, **shape.merge_constants, **MERGE_OPTIONS
        )


def fits_split(arrays: StepArrays, shape: Shape) -> bool:
    """Whether a step may be split as the shape says: by tile, and by the memory of its parts.

    That of one token a sequence is never too much: a Program measures its largest such step.
    """
    if not shape.split or arrays.max_query_len == 1:
        return shape.split
    head_dim: int = shape.constants["HEAD_DIM"]
    return 4 * head_dim * partial_rows(arrays, shape) <= MOST_PARTIAL_BYTES


def slots_of(shape: Shape, num_sequences: int) -> int:
    """The parts that what is read is divided into where there is a choice."""
    # Shorter parts, in two rounds: a last one that is not full matters less.
    return shape.slots * (2 if 2 * num_sequences > shape.slots else 1)


def partial_rows(arrays: StepArrays, shape: Shape) -> int:
    """The rows of the results of parts; 0 if every sequence is sure to have but one."""
    parts = most_parts(arrays, shape)
    if parts == len(arrays.seq_lens):
        return 0
    return parts * arrays.max_query_len * int(shape.constants["NUM_HEADS"])


def most_parts(arrays: StepArrays, shape: Shape) -> int:
    """A bound of the parts of all sequences; as many as these if each is sure to have but one."""
    num_sequences = len(arrays.seq_lens)
    segment: int = shape.constants["SEGMENT"]
    window: int = shape.constants["WINDOW"]
    if not segment:
        least = LEAST_TILES.value * shape.constants["BLOCK_N"]
        is_cut = arrays.max_seq_len > least
        return num_sequences + (slots_of(shape, num_sequences) if is_cut else 0)
    segments = -(-arrays.max_seq_len // segment)
    if window:
        segments = min(segments, (window + arrays.max_query_len - 3) // segment + 2)
    return num_sequences * max(1, segments)

"""What the kernels of attention share: an online softmax over tiles of the cache, and its merging.

Every product, sum and exponential that a row goes through is written once, here, and with explicit
`fma`, so that no compiler decides by the code around it what is rounded. A tile that hides a
position from a row adds an exact zero for it, and merging with a part in which the row sees nothing
changes nothing: which tiles are walked beyond those that a row sees does not touch its bits.

Scores stand in units of log2: exp2 is what a GPU has an instruction for.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNSEEN = tl.constexpr(float("-inf"))
"""The peak of a row that has seen no score."""
LANES = tl.constexpr(32)
"""Sequences that are counted at a time: each warp has them all, and need not wait for others."""


@triton.jit
def rows_of_tile(
    head_tile,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The kv head of a tile; of its rows the token (counted from 0), the head and whether it is.

    A tile has HEADS heads of one kv head for each token, all of them if they fit: what is read of
    the cache serves them all, and decode fills the rows of a matrix instruction.
    """
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row = tl.arange(0, BLOCK_M)
    kv_head = head_tile // TILES
    in_group = head_tile % TILES * HEADS + row % HEADS
    exists = (in_group < GROUP) & (row < BLOCK_M // HEADS * HEADS)
    return kv_head, row // HEADS, kv_head * GROUP + in_group, exists


@triton.jit
def load_rows(spots, dim, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Rows of the cache, [BLOCK_N, DIM]: what lies past HEAD_DIM is zero."""
    pointers = spots[:, None] + dim[None, :]
    if HEAD_DIM == DIM:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=dim[None, :] < HEAD_DIM, other=0.0)
    return rows


@triton.jit
def decode(codes, DTYPE: tl.constexpr, FP8_BITS: tl.constexpr):
    """Cached numbers as tl.dot takes them; each code of int8 and fp8 is a number of DTYPE.

    With FP8_BITS codes are the bytes of float8_e4m3fn, for devices that have no instruction to read
    it: moved into a float16, they are 2**-8 of the value. (NaN, which no code is, would be 480.)
    """
    if FP8_BITS:
        bits = codes.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        numbers = (half.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)
    elif codes.dtype.is_fp8e4nv():
        # Exact. The conversion of Triton 3.6 to bfloat16 takes an instruction of a slow pipe.
        numbers = codes.to(tl.float16).to(DTYPE)
    else:
        numbers = codes.to(DTYPE)
    return numbers


@triton.jit
def higher(peak, other):
    """The greater of two peaks; and the same as a number to subtract, inf - inf being NaN."""
    new = tl.maximum(peak, other)
    return new, tl.where(new == UNSEEN, 0.0, new)


@triton.jit
def merge(acc, peak, total, part_acc, part_peak, part_total):
    """Add a later part to what stands. acc: [R, DIM]; peak and total: [R]."""
    peak_of_both, base = higher(peak, part_peak)
    keep = tl.exp2(peak - base)
    add = tl.exp2(part_peak - base)
    acc = tl.fma(acc, keep[:, None], part_acc * add[:, None])
    total = tl.fma(total, keep, part_total * add)
    return acc, peak_of_both, total


@triton.jit
def finish(acc, total):
    """The mean; 0 of a row that saw nothing, which pads the step."""
    return acc * (1.0 / tl.where(total == 0, 1.0, total))[:, None]


@triton.jit
def hide(scores, at, seen, WINDOW: tl.constexpr):
    """Scores [R, BLOCK_N] of the positions `at` without those that rows do not see."""
    visible = at[None, :] <= seen[:, None]
    if WINDOW:
        visible &= at[None, :] > seen[:, None] - WINDOW
    return tl.where(visible, scores, UNSEEN)


@triton.jit
def walk(
    acc,
    peak,
    total,
    query,
    seen,
    clear,
    begin,
    end,
    low,
    high,
    table,
    values,
    scales,
    block_stride,
    scale_stride,
    scale,
    cap_scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CODES: tl.constexpr,
    FP8_BITS: tl.constexpr,
    P_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to the tiles of the positions `begin` to `end`; all else is that of `attend`.

    `seen` is the last position that a row sees; all rows see those before `clear`, but for the
    window. The sequence may be read from `low` to `high`: for other positions the nearest of these
    is, as NaN may lie in their place, and 0 * NaN is no 0. MASKED: some row may not see all of a
    tile; with PHASES this is so in every tile.
    """
    DIM: tl.constexpr = query.shape[1]
    DTYPE: tl.constexpr = query.dtype
    V_AT: tl.constexpr = KV_HEADS * BLOCK_SIZE  # rows from K to V
    dim = tl.arange(0, DIM)
    for start in tl.range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        here = at
        if MASKED:
            here = tl.minimum(tl.maximum(at, low), high - 1)
        block = tl.load(table + here // BLOCK_SIZE).to(tl.int64)
        spots = block * block_stride + (here % BLOCK_SIZE) * HEAD_DIM
        k = load_rows(values + spots, dim, HEAD_DIM, DIM)
        scores = tl.dot(query, tl.trans(decode(k, DTYPE, FP8_BITS)), input_precision=PRECISION)
        if CODES:
            # Those of K and V in one load, or Triton 3.6 has each thread bring all that it uses.
            scale_spots = block * scale_stride + here % BLOCK_SIZE
            pair = scale_spots[:, None] + tl.arange(0, 2)[None, :] * V_AT
            k_scale, v_scale = tl.split(tl.load(scales + pair))
            # 0, or NaN of a fault: it goes into the scores, where it can be hidden from a row.
            fault = v_scale - v_scale
            scores *= (k_scale + fault)[None, :]
        if SOFT_CAP:  # tanh
            scores = 1.0 - 2.0 / (tl.exp2(scores * cap_scale) + 1.0)
        if MASKED:
            if PHASES:
                scores = hide(scores, at, seen, WINDOW)
            else:
                is_hidden = start + BLOCK_N > clear
                if WINDOW:
                    is_hidden |= start < high - WINDOW
                if is_hidden:  # A branch that all warps take, or none.
                    scores = hide(scores, at, seen, WINDOW)
        new_peak, base = higher(peak, tl.max(scores, 1) * scale)
        keep = tl.exp2(peak - base)
        p = tl.exp2(tl.fma(scores, scale, -base[:, None]))
        total = tl.fma(total, keep, tl.sum(p, 1))
        peak = new_peak
        acc *= keep[:, None]
        if CODES:
            p *= tl.where(fault == 0, v_scale, 0.0)[None, :]
        v = load_rows(values + V_AT * HEAD_DIM + spots, dim, HEAD_DIM, DIM)
        v = decode(v, P_DTYPE, FP8_BITS)
        acc = tl.dot(p.to(P_DTYPE), v, acc, input_precision=PRECISION)
    return acc, peak, total


@triton.jit
def attend(
    acc,
    peak,
    total,
    query,
    seen,
    first,
    last,
    begin,
    end,
    table,
    values,
    scales,
    block_stride,
    scale_stride,
    scale,
    cap_scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CODES: tl.constexpr,
    FP8_BITS: tl.constexpr,
    P_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
):
    """Attend to what rows at the positions `first` to `last` see of `begin` to `end`.

    acc, float32 [BLOCK_M, DIM], with peak and total, [BLOCK_M], is the state of the softmax; query,
    [BLOCK_M, DIM], is in the dtype of products; values and scales begin at K of the kv head in
    block 0.

    `begin` and `end` are multiples of BLOCK_N. With PHASES the tiles that every row sees whole are
    walked in a loop of their own, without masks: better for long walks, where a short one rather
    starts but one pipeline.
    """
    low = tl.maximum(first - WINDOW + 1, 0) if WINDOW else 0
    high = last + 1
    begin = tl.maximum(begin, low // BLOCK_N * BLOCK_N)
    end = tl.minimum(end, high)
    clear_begin = begin
    clear_end = begin
    if PHASES:
        clear_end = tl.maximum(begin, tl.minimum(end, (first + 1) // BLOCK_N * BLOCK_N))
        if WINDOW:
            inside = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
            clear_begin = tl.minimum(tl.maximum(begin, inside), clear_end)
    # fmt: off
    for phase in tl.static_range(3):
        if (PHASES or phase == 2) and (phase != 0 or WINDOW):
            acc, peak, total = walk(
                acc, peak, total, query, seen, first + 1,
                begin if phase == 0 else clear_begin if phase == 1 else clear_end,
                clear_begin if phase == 0 else clear_end if phase == 1 else end,
                low, high, table, values, scales,
                block_stride, scale_stride, scale, cap_scale,
                KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, CODES, FP8_BITS,
                P_DTYPE, PRECISION, PHASES, phase != 1,
            )
    # fmt: on
    return acc, peak, total

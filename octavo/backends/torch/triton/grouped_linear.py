"""Products with grouped weights of 4 or 8 bits and 16-bit activations (W4A16, W8A16).

A code becomes a number without a conversion: its bits, moved to the upper mantissa of 1.0, make 1
plus a multiple of it, and one multiplication and addition with the group's scale (and minimum)
makes the weight. The words' layout (weights.py) gives a thread 16 bytes that share a scale, and two
float16 of scales in one load of 4 bytes, which Triton can copy ahead (cp.async; not so 2 bytes).

- One token: dot products in float32 without tensor cores, words straight into registers, 32 outputs
  a program, its warps sharing the columns. The floor is the packed bytes over bandwidth; 5.2
  instructions a weight (as compiled for sm_90) allow three quarters of it on an H200.
- Up to 256 tokens, and any number if deterministic: tensor cores, the weight unpacked in registers
  to the dtype of x. 16 tokens a tile when there are not more or when deterministic (one tile for
  all T, and so one order of sums), else 64.
- More: unpacking once (2.6 bytes a weight moved) costs less than a matrix rate below the library's,
  so the weight is written out in the dtype of x, at most 256 MiB at a time, and torch multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import GroupedWeight
from octavo.backends.torch.triton.dot import dot
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.matmul import load_rows, place
from octavo.backends.torch.triton.parts import are_shared, cut, finish, new_sums, sum_parts
from octavo.backends.torch.weights import block_columns

TILE_N = 64
FEW_TOKENS, MANY_TOKENS = 16, 64
_MAX_TOKENS = 256
_LEAST_BLOCKS = 4
_PROGRAMS = 512
"""Of tiles: four fit on a processor at a time with 16 tokens."""
_BAND = 64
FEW_OUTPUTS = 4096
"""Up to so many, no processor of an H200 has a second program, so each has twice the warps."""
_SCRATCH_NUMBERS = 1 << 27

ASCENDING = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Which of the dimensions along which nothing lies side by side in memory Triton gives threads
first: the first one (3.6) or the last. Kernels order theirs so that units come first, then rows,
for a warp to read 8 rows of 64 bytes."""


@triton.jit
def half_of(pair):
    """The float16 in the lower bits."""
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_of(
    scales, unit, row, n, zero, inside, SLOT: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr,
):  # fmt: skip
    """Scale and offset that make weights of the numbers in `unpack`; one more dimension, of 1.

    Units are counted through a row.
    """
    columns: tl.constexpr = 128 // BITS
    span: tl.constexpr = 128 if BITS == 4 else 256
    group = unit * columns // GROUP + SLOT * 4 // GROUP
    if HAS_MINIMUMS:
        pair = tl.load(scales + group * n + row, mask=inside, other=0)
        scale = half_of(pair)
        offset = scale * (-span - zero) + half_of(pair >> 16)
    else:
        # Not group // 2, of which Triton would not see that slots of a unit have it in common.
        both = unit * columns // (2 * GROUP)
        pair = tl.load(scales + both * n + row, mask=inside, other=0)
        scale = half_of(pair >> (group % 2 * 16))
        offset = scale * (-span - zero)
    return tl.expand_dims(scale * span, -1), tl.expand_dims(offset, -1)


@triton.jit
def unpack(word, scale, offset, mask, one, SLOT: tl.constexpr, BITS: tl.constexpr):
    """Slot SLOT of words, [..., units, 4], as weights in float32.

    NOTE: mask and one are arguments of the kernel, though always the same: two constants do not fit
    into one instruction, two registers do.
    """
    top: tl.constexpr = 16 if BITS == 4 else 15  # codes of slot 4 are there already
    move: tl.constexpr = top - SLOT * BITS
    bits = word << move if move >= 0 else word >> -move
    number = ((bits & mask) | one).to(tl.float32, bitcast=True)
    return tl.fma(number, scale, offset)


@triton.jit
def unpack_slot(
    word, scales, block, row, n, zero, mask, one, unit, SLOT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr,
):  # fmt: skip
    """One slot of a block, like `word` (scales that slots have in common are loaded once)."""
    scale, offset = scale_of(
        scales, block * 4 + unit, row, n, zero, True, SLOT, BITS, GROUP, HAS_MINIMUMS
    )
    return unpack(word, scale, offset, mask, one, SLOT, BITS)


@triton.jit
def unpack_block(
    words, scales, block, row, n, zero, mask, one, ROWS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr, ASCENDING: tl.constexpr,
):  # fmt: skip
    """Weights of a block in float32, [rows, columns].

    All slots of a word stand in one thread's registers, so joining them moves nothing: the last
    dimension is the lowest bit of a slot's number.

    NOTE: round after this, not inside: Triton 3.6 fails at a reshape that a product reads directly.
    """
    ROW: tl.constexpr = 1 if ASCENDING else 0
    four = tl.arange(0, 4)
    if ASCENDING:
        unit, row = four[:, None], row[None, :]
    else:
        unit, row = four[None, :], row[:, None]
    at = ((block * n + row) * 16 + unit * 4)[:, :, None] + four[None, None, :]
    a = tl.load(words + at), scales, block, row, n, zero, mask, one, unit
    if BITS == 4:
        s0 = unpack_slot(*a, 0, BITS, GROUP, HAS_MINIMUMS)
        s1 = unpack_slot(*a, 1, BITS, GROUP, HAS_MINIMUMS)
        s2 = unpack_slot(*a, 2, BITS, GROUP, HAS_MINIMUMS)
        s3 = unpack_slot(*a, 3, BITS, GROUP, HAS_MINIMUMS)
        s4 = unpack_slot(*a, 4, BITS, GROUP, HAS_MINIMUMS)
        s5 = unpack_slot(*a, 5, BITS, GROUP, HAS_MINIMUMS)
        s6 = unpack_slot(*a, 6, BITS, GROUP, HAS_MINIMUMS)
        s7 = unpack_slot(*a, 7, BITS, GROUP, HAS_MINIMUMS)
        even = tl.join(tl.join(s0, s4), tl.join(s2, s6))
        odd = tl.join(tl.join(s1, s5), tl.join(s3, s7))
        slots = tl.permute(tl.join(even, odd), (ROW, 1 - ROW, 3, 4, 5, 2))
    else:
        s0 = unpack_slot(*a, 0, BITS, GROUP, HAS_MINIMUMS)
        s1 = unpack_slot(*a, 1, BITS, GROUP, HAS_MINIMUMS)
        s2 = unpack_slot(*a, 2, BITS, GROUP, HAS_MINIMUMS)
        s3 = unpack_slot(*a, 3, BITS, GROUP, HAS_MINIMUMS)
        joined = tl.join(tl.join(s0, s2), tl.join(s1, s3))
        slots = tl.permute(joined, (ROW, 1 - ROW, 3, 4, 2))
    return tl.reshape(slots, (ROWS, 512 // BITS))


@triton.jit(do_not_specialize=["zero", "mask", "one"])
def grouped_row_kernel(
    x, words, scales, factors, bias, out, n, k, num_blocks, zero, mask, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCKS: tl.constexpr, ASCENDING: tl.constexpr,
):  # fmt: skip
    """One token; a program has 32 outputs, and each of its BLOCKS warps a block of columns.

    Dimensions are [4, BLOCKS, 8, units, words] (ASCENDING: units, 8, BLOCKS, 4, words): threads
    take units and 8 rows, warps the blocks, and a thread's 4 rows share its x.
    """
    columns: tl.constexpr = 512 // BITS
    four, eight = tl.arange(0, 4), tl.arange(0, 8)
    if ASCENDING:
        unit, low, high = four[:, None, None, None], eight[None, :, None, None], four
        sums = tl.zeros([4, 8, BLOCKS, 4, 4], tl.float32)
    else:
        unit, low, high = four, eight[None, None, :, None], four[:, None, None, None]
        sums = tl.zeros([4, BLOCKS, 8, 4, 4], tl.float32)
    row = tl.minimum(tl.program_id(0) * 32 + high * 8 + low, n - 1)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        if ASCENDING:
            column = block[None, :] * columns + four[:, None] * (columns // 4)
            block = block[None, None, :, None]
        else:
            column = block[:, None] * columns + four[None, :] * (columns // 4)
            block = block[None, :, None, None]
        inside = block < num_blocks
        place = (block * n + row) * 16 + unit * 4
        word_at = words + place[:, :, :, :, None] + four[None, None, None, None, :]
        word = tl.load(word_at, mask=inside[:, :, :, :, None], other=0)
        for slot in tl.static_range(32 // BITS):
            scale, offset = scale_of(
                scales, block * 4 + unit, row, n, zero, inside, slot, BITS, GROUP, HAS_MINIMUMS
            )
            x_column = column[:, :, None] + (slot * 4 + four)[None, None, :]
            values = tl.load(x + x_column, mask=x_column < k, other=0.0).to(tl.float32)
            weight = unpack(word, scale, offset, mask, one, slot, BITS)
            if ASCENDING:
                sums = tl.fma(weight, values[:, None, :, None, :], sums)
            else:
                sums = tl.fma(weight, values[None, :, None, :, :], sums)
    if ASCENDING:
        total = tl.trans(tl.sum(tl.sum(tl.sum(sums, 4), 2), 0))
    else:
        total = tl.sum(tl.sum(tl.sum(sums, 4), 3), 1)
    at = tl.program_id(0) * 32 + four[:, None] * 8 + eight[None, :]
    inside = at < n
    addend = tl.zeros([4, 8], tl.float32)
    if HAS_BIAS:
        addend = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    value = finish(total, 1.0, tl.load(factors + at, mask=inside, other=0.0), addend)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "num_parts", "part_blocks", "zero", "mask", "one"])
def grouped_tile_kernel(
    x, words, scales, factors, bias, out, tokens, n, k, num_blocks, num_parts,
    part_blocks, zero, mask, one, x_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_SHARED: tl.constexpr, WHOLE_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BAND: tl.constexpr, ASCENDING: tl.constexpr,
):  # fmt: skip
    """Several tokens; a program has a tile, or a part of its columns (IS_SHARED)."""
    columns: tl.constexpr = 512 // BITS
    first_row, first_out = place(tokens, n, TILE_M, TILE_N, BAND)
    rows = first_row + tl.arange(0, TILE_M)
    at = first_out + tl.arange(0, TILE_N)
    row = tl.minimum(at, n - 1)
    lane = tl.arange(0, columns)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + lane[None, :]
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    first_part = 0
    if IS_SHARED:
        first_part = tl.program_id(1)
        out += first_part.to(tl.int64) * tokens * n
        num_parts = first_part + 1
    for part in range(first_part, num_parts):
        sums = tl.zeros([TILE_M, TILE_N], tl.float32)
        last = tl.minimum((part + 1) * part_blocks, num_blocks)
        for block in range(part * part_blocks, last):
            start = block * columns
            values = load_rows(x_at + start, rows < tokens, lane, k - start, WHOLE_K)
            weight = unpack_block(
                words, scales, block, row, n, zero, mask, one,
                TILE_N, BITS, GROUP, HAS_MINIMUMS, ASCENDING,
            )  # fmt: skip
            sums = dot(values, tl.trans(weight.to(values.dtype)), sums)
        total += sums
    inside = (rows < tokens)[:, None] & (at < n)[None, :]
    to = out + rows.to(tl.int64)[:, None] * n + at[None, :]
    if IS_SHARED:
        tl.store(to, total, mask=inside)
    else:
        addend = tl.zeros([TILE_N], tl.float32)
        if HAS_BIAS:
            addend = tl.load(bias + row).to(tl.float32)
        value = finish(total, 1.0, tl.load(factors + row)[None, :], addend[None, :])
        tl.store(to, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "zero", "mask", "one"])
def unpack_kernel(
    words, scales, factors, out, first, num_rows, n, k, zero, mask, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr, TILE_N: tl.constexpr,
    ASCENDING: tl.constexpr,
):  # fmt: skip
    """Rows `first` and on, written out [num_rows, k]; a program has a block of TILE_N rows."""
    columns: tl.constexpr = 512 // BITS
    at = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row = tl.minimum(first + at, n - 1)
    block = tl.program_id(1)
    weight = unpack_block(
        words, scales, block, row, n, zero, mask, one,
        TILE_N, BITS, GROUP, HAS_MINIMUMS, ASCENDING,
    ) * tl.load(factors + row)[:, None]  # fmt: skip
    column = block * columns + tl.arange(0, columns)
    to = out + at.to(tl.int64)[:, None] * k + column[None, :]
    inside = (at < num_rows)[:, None] & (column < k)[None, :]
    tl.store(to, weight.to(out.dtype.element_ty), mask=inside)


def grouped_linear(
    x: Tensor, weight: GroupedWeight, bias: Tensor | None, deterministic: bool
) -> Tensor:
    """The product x @ weight.T + bias, the weight rounded to the dtype of x; see Kernels."""
    (tokens, k), n = x.shape, weight.shape[0]
    if tokens > _MAX_TOKENS and not deterministic:
        return _unpacked(x, weight, bias)
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    num_blocks = weight.codes.shape[0]
    packed = weight.codes, weight.scales, weight.factors
    numbers = weight.zero, *_masks(weight.bits)
    form = {
        "BITS": weight.bits, "GROUP": weight.group, "HAS_MINIMUMS": weight.has_minimums,
        "HAS_BIAS": bias is not None,
    }  # fmt: skip
    if tokens == 1 and not deterministic:
        num_warps = 16 if n <= FEW_OUTPUTS else 8
        grouped_row_kernel[(triton.cdiv(n, 32),)](
            x, *packed, bias, out, n, k, num_blocks, *numbers, **form, BLOCKS=num_warps,
            ASCENDING=ASCENDING, num_warps=num_warps, **FP_FUSION,
        )  # fmt: skip
        return out
    tile_m = FEW_TOKENS if deterministic or tokens <= FEW_TOKENS else MANY_TOKENS
    n_tiles = triton.cdiv(n, TILE_N)
    parts = cut(n_tiles, num_blocks, _LEAST_BLOCKS, _PROGRAMS)
    num_tiles = n_tiles * triton.cdiv(tokens, tile_m)
    is_shared = are_shared(parts, num_tiles, _PROGRAMS)
    sums = new_sums(parts, tokens, n, x.device) if is_shared else out
    grouped_tile_kernel[(num_tiles, parts.num if is_shared else 1)](
        x, *packed, bias, sums, tokens, n, k, num_blocks, parts.num, parts.steps, *numbers,
        x.stride(0), **form, WHOLE_K=k % block_columns(weight.bits) == 0, TILE_M=tile_m,
        TILE_N=TILE_N, IS_SHARED=is_shared, BAND=_BAND, ASCENDING=ASCENDING, num_warps=4,
        num_stages=2 if torch.version.hip else 4, **FP_FUSION,
    )  # fmt: skip
    if is_shared:
        sum_parts(sums, out, bias, weight.factors)
    return out


def _masks(bits: int) -> tuple[int, int]:
    """The `mask` and `one` of `unpack`."""
    return (0xF << 16 if bits == 4 else 0xFF << 15), 0x3F800000


def _unpacked(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    """The same by way of the weight in the dtype of x, some rows at a time."""
    n, k = weight.shape
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    step = max(TILE_N, _SCRATCH_NUMBERS // k // TILE_N * TILE_N)
    for first in range(0, n, step):
        num_rows = min(step, n - first)
        rows = torch.empty((num_rows, k), dtype=x.dtype, device=x.device)
        unpack_kernel[(triton.cdiv(num_rows, TILE_N), weight.codes.shape[0])](
            weight.codes, weight.scales, weight.factors, rows, first, num_rows,
            n, k, weight.zero, *_masks(weight.bits), BITS=weight.bits, GROUP=weight.group,
            HAS_MINIMUMS=weight.has_minimums, TILE_N=TILE_N, ASCENDING=ASCENDING,
            num_warps=4, **FP_FUSION,
        )  # fmt: skip
        part = out[:, first : first + num_rows]
        if bias is None:
            torch.mm(x, rows.T, out=part)
        else:
            torch.addmm(bias[first : first + num_rows], x, rows.T, out=part)
    return out

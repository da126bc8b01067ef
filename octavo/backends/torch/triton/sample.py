"""Sampling as graph/batch (SamplingRows) says it.

Without filters it is one pass over the logits, in tiles of the vocabulary, and a merge of the
tiles: 4 bytes of traffic a logit. Noise makes it bound by arithmetic: some 165 instructions
a logit (as compiled for sm_90), five to six times the time of the traffic on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import SampleArrays, Sampled
from octavo.backends.torch.triton import sample_filters as filters
from octavo.backends.torch.triton.sample_parts import (
    INFINITE,
    NO_PAIR,
    UNALIGNED,
    fast_noise,
    id_of_pair,
    is_filtered,
    key_of_row,
    noise,
    order_of,
    order_of_pair,
    pairs_of,
    value_of,
)

TILE = 2048
EDITS = 1024
EDIT_PROGRAMS = 4
MOST_TOP = 20
"""Log probabilities a token that most ask for at most: what is compiled depends on no lesser K."""
EXACT = {"enable_fp_fusion": False}
"""A product and a sum are rounded each, as in the reference: a token is the same everywhere."""


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def bias_kernel(logits, stride, start, ids, values, SIZE: tl.constexpr):
    """Add a row's biases to its logits; the ids of a row are distinct."""
    row = tl.program_id(0)
    end = tl.load(start + row + 1)
    places = tl.load(start + row) + tl.program_id(1) * SIZE
    logits += row.to(tl.int64) * stride
    for first in range(places, end, SIZE * tl.num_programs(1)):
        entries = first + tl.arange(0, SIZE)
        mask = entries < end
        targets = logits + tl.load(ids + entries, mask, 0)
        added = tl.load(targets, mask, 0.0) + tl.load(values + entries, mask, 0.0)
        tl.store(targets, added, mask)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def penalty_kernel(
    logits, stride, repetition, presence, frequency, start, ids, counts, SIZE: tl.constexpr
):
    """Penalize the tokens that a row has seen; the ids of a row are distinct."""
    row = tl.program_id(0)
    end = tl.load(start + row + 1)
    places = tl.load(start + row) + tl.program_id(1) * SIZE
    logits += row.to(tl.int64) * stride
    factor = tl.load(repetition + row)
    once = tl.load(presence + row)
    each = tl.load(frequency + row)
    for first in range(places, end, SIZE * tl.num_programs(1)):
        entries = first + tl.arange(0, SIZE)
        mask = entries < end
        targets = logits + tl.load(ids + entries, mask, 0)
        count = tl.load(counts + entries, mask, 0)
        value = tl.load(targets, mask, 0.0)
        value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
        value -= tl.where(count > 0, once, 0.0)
        value -= each * count.to(tl.float32)
        tl.store(targets, value, mask)


@triton.jit
def best_with_noise(logits, values, ids, key, temperature):
    """The pair of the greatest logit / temperature + noise; `values` are the tile of the logits.

    A rough score says which tokens could win, one or two of a tile; of these it is computed anew.
    """
    rough = pairs_of(values * tl.div_rn(1.0, temperature) + fast_noise(key, ids), ids)
    top = tl.max(rough, 0)
    best = pairs_of(tl.full((), float("-inf"), tl.float32), id_of_pair(top))
    size = tl.minimum(tl.abs(value_of(order_of_pair(top))), 1e38)
    margin = 2e-5 + size * 4.8e-7
    # At the end `top` is NO_PAIR, whose value is NaN and no more than anything.
    while value_of(order_of_pair(top)) + margin > value_of(order_of_pair(best)):
        token = id_of_pair(top)
        score = tl.div_rn(tl.load(logits + token), temperature) + noise(key, token)
        best = tl.maximum(best, pairs_of(score, token))
        rough = tl.where(rough == top, NO_PAIR, rough)
        top = tl.max(rough, 0)
    return best


@triton.jit
def store_best(pairs, out, count):
    """Store the best pairs, in order."""
    for k in range(count):
        best = tl.max(pairs, 0)
        tl.store(out + k, best)
        pairs = tl.where(pairs == best, NO_PAIR, pairs)


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=UNALIGNED)
def tile_kernel(
    logits,
    stride,
    raw,
    raw_stride,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    index,
    position,
    num_logprobs,
    best_out,
    finite_out,
    max_out,
    sum_out,
    top_out,
    vocab,
    num_top,
    SIZE: tl.constexpr,
    NOISE: tl.constexpr,
    FILTERS: tl.constexpr,
):
    """Of one tile of a row: the best token, and for log probabilities maximum, sum and best ones.

    The best token of a filtered row is the best before noise.
    """
    tile, row = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * stride
    ids = tile * SIZE + tl.arange(0, SIZE)
    values = tl.load(logits + ids, ids < vocab, float("-inf"))
    is_finite = tl.max((tl.abs(values) < float("inf")).to(tl.int32), 0)
    if NOISE:
        heat = tl.load(temperature + row)
        is_noisy = (heat > 0) & (tl.max(order_of(values), 0) < INFINITE)
        if FILTERS:
            k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
            is_noisy = is_noisy & (is_filtered(heat, k, p, least, vocab) == 0)
        if is_noisy:
            key = key_of_row(tl.load(seed + row), tl.load(index + row), tl.load(position + row))
            best = best_with_noise(logits, values, ids, key, heat)
        else:
            scaled = tl.div_rn(values, tl.where(heat > 0, heat, 1.0))
            best = tl.max(pairs_of(scaled, ids), 0)
    else:
        best = tl.max(pairs_of(values, ids), 0)
    out = row * tl.num_programs(0) + tile
    tl.store(best_out + out, best)
    tl.store(finite_out + out, is_finite)

    wanted = tl.load(num_logprobs + row)
    if wanted >= 0:
        values = tl.load(raw + row.to(tl.int64) * raw_stride + ids, ids < vocab, float("-inf"))
        top = tl.max(values, 0)
        tl.store(max_out + out, top)
        shift = tl.where(top == float("-inf"), 0.0, top)
        tl.store(sum_out + out, tl.sum(tl.exp(values - shift), 0))
        pairs = tl.where(ids < vocab, pairs_of(values, ids), NO_PAIR)
        store_best(pairs, top_out + out.to(tl.int64) * num_top, wanted)


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=UNALIGNED)
def merge_kernel(
    raw,
    stride,
    num_logprobs,
    best_in,
    finite_in,
    max_in,
    sum_in,
    top_in,
    tokens,
    logprobs,
    top_ids,
    top_logprobs,
    num_tiles,
    num_top,
    TILES: tl.constexpr,
    TOPS: tl.constexpr,
    FILTERS: tl.constexpr,
):
    """A row's token and log probabilities of what its tiles found; a token of filters is kept."""
    row = tl.program_id(0)
    tiles = tl.arange(0, TILES)
    there = tiles < num_tiles
    tiles += row * num_tiles
    best = tl.max(tl.load(best_in + tiles, there, NO_PAIR), 0)
    is_sound = tl.max(tl.load(finite_in + tiles, there, 0), 0) > 0
    token = tl.where(is_sound & (order_of_pair(best) <= INFINITE), id_of_pair(best), -1)
    if FILTERS:
        chosen = tl.load(tokens + row)
        token = tl.where((token >= 0) & (chosen >= 0), chosen, token)
    tl.store(tokens + row, token)

    wanted = tl.load(num_logprobs + row)
    if (wanted >= 0) & (token >= 0):
        maxima = tl.load(max_in + tiles, there, float("-inf"))
        top = tl.max(maxima, 0)
        sums = tl.load(sum_in + tiles, there, 0.0).to(tl.float64)
        log_sum = tl.log(tl.sum(sums * tl.exp((maxima - top).to(tl.float64)), 0))
        own = (tl.load(raw + row.to(tl.int64) * stride + token) - top).to(tl.float64)
        tl.store(logprobs + row, (own - log_sum).to(tl.float32))
        places = tl.arange(0, TOPS)
        top_in += row.to(tl.int64) * num_tiles * num_top
        # A tile has left unwritten what this row did not ask for.
        is_wanted = (places < num_tiles * num_top) & (places % tl.maximum(num_top, 1) < wanted)
        pairs = tl.load(top_in + places, is_wanted, NO_PAIR)
        for k in range(wanted):
            best = tl.max(pairs, 0)
            place = row * num_top + k
            is_token = best != NO_PAIR
            tl.store(top_ids + place, tl.where(is_token, id_of_pair(best), 0))
            value = (value_of(order_of_pair(best)) - top).to(tl.float64) - log_sum
            tl.store(top_logprobs + place, tl.where(is_token, value.to(tl.float32), float("-inf")))
            pairs = tl.where(pairs == best, NO_PAIR, pairs)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """What tile_kernel finds, one of each a row and tile; `top` has num_top of them."""

    best: Tensor
    finite: Tensor
    max: Tensor
    sum: Tensor
    top: Tensor


def sample(logits: Tensor, rows: SampleArrays) -> Sampled:
    """Choose a token for every row of logits [S, vocab], with its log probabilities."""
    count, vocab = logits.shape
    sampled = Sampled(
        tokens=logits.new_full((count,), -1, dtype=torch.int32),
        logprobs=logits.new_empty(count),
        top_ids=logits.new_empty((count, rows.num_top), dtype=torch.int32),
        top_logprobs=logits.new_empty((count, rows.num_top)),
    )
    if count == 0:
        return sampled
    edited = _edited(logits, rows) if rows.has_edits else logits
    tiles = _find(edited, logits, rows)
    has_filters = rows.has_filters and rows.has_noise
    if has_filters:
        filters.choose(edited, rows, tiles.best, sampled.tokens)
    num_tiles = triton.cdiv(vocab, TILE)
    merge_kernel[(count,)](
        logits,
        logits.stride(0),
        rows.num_logprobs,
        tiles.best,
        tiles.finite,
        tiles.max,
        tiles.sum,
        tiles.top,
        *sampled,
        num_tiles,
        rows.num_top,
        TILES=triton.next_power_of_2(num_tiles),
        TOPS=triton.next_power_of_2(num_tiles * max(MOST_TOP, rows.num_top)) if rows.num_top else 1,
        FILTERS=has_filters,
        num_warps=4,
        **EXACT,
    )
    return sampled


def _edited(logits: Tensor, rows: SampleArrays) -> Tensor:
    """A copy with biases and penalties: log probabilities are of the raw logits."""
    edited = logits.clone()
    stride, grid = edited.stride(0), (len(logits), EDIT_PROGRAMS)
    bias_kernel[grid](
        edited, stride, rows.bias_start, rows.bias_ids, rows.bias_values, SIZE=EDITS, **EXACT
    )
    penalty_kernel[grid](
        edited,
        stride,
        rows.repetition,
        rows.presence,
        rows.frequency,
        rows.penalty_start,
        rows.penalty_ids,
        rows.penalty_counts,
        SIZE=EDITS,
        **EXACT,
    )
    return edited


def _find(edited: Tensor, raw: Tensor, rows: SampleArrays) -> _Tiles:
    count, vocab = edited.shape
    num_tiles = triton.cdiv(vocab, TILE)
    shape = (count, num_tiles)
    tiles = _Tiles(
        best=edited.new_empty(shape, dtype=torch.int64),
        finite=edited.new_empty(shape, dtype=torch.int32),
        max=edited.new_empty(shape),
        sum=edited.new_empty(shape),
        top=edited.new_empty((*shape, rows.num_top), dtype=torch.int64),
    )
    tile_kernel[(num_tiles, count)](
        edited,
        edited.stride(0),
        raw,
        raw.stride(0),
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seed,
        rows.index,
        rows.position,
        rows.num_logprobs,
        tiles.best,
        tiles.finite,
        tiles.max,
        tiles.sum,
        tiles.top,
        vocab,
        rows.num_top,
        SIZE=TILE,
        NOISE=rows.has_noise,
        FILTERS=rows.has_filters,
        num_warps=4,
        **EXACT,
    )
    return tiles

"""The choice of rows with top_k, top_p or min_p.

The tokens that a row keeps are a prefix of the vocabulary in the order of probability, so they are
those above a threshold and some of its equals. No sort: a histogram of how far logits lie below the
greatest says which tokens can be kept at all; these are listed, and the threshold is searched among
them by halving. A row that could keep more than LISTED tokens is searched as a whole. Sums are
float64 in an order that depends on the row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import SampleArrays
from octavo.backends.torch.triton.sample_parts import (
    INFINITE,
    NO_PAIR,
    UNALIGNED,
    id_of_pair,
    is_filtered,
    key_of_row,
    noise,
    order_of,
    order_of_pair,
    pairs_of,
    value_of,
)

TILE = 4096
BINS = tl.constexpr(256)
LISTED = 8192
CHUNK = 1024
EXACT = {"enable_fp_fusion": False}
_LARGE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def bin_of(distance):
    """The bin of a logit this far below the greatest; finer where more probable, up to 64."""
    return tl.minimum(tl.sqrt_rn(distance) * 32, 255.0).to(tl.int32)


@triton.jit
def greatest_of(best, row, num_tiles, TILES: tl.constexpr):
    """The order of the greatest scaled logit of a row, NaN's if one is NaN."""
    tiles = tl.arange(0, TILES)
    pairs = tl.load(best + row * num_tiles + tiles, tiles < num_tiles, NO_PAIR)
    return order_of_pair(tl.max(pairs, 0))


@triton.jit
def is_chosen_here(order, temperature, top_k, top_p, min_p, vocab):
    """Whether a row is filtered and its greatest logit, of this order, is finite."""
    is_finite = (order < INFINITE) & (order > -INFINITE - 1)
    return is_finite & is_filtered(temperature, top_k, top_p, min_p, vocab)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def count_kernel(
    logits,
    stride,
    temperature,
    top_k,
    top_p,
    min_p,
    best,
    counts_out,
    masses_out,
    vocab,
    num_best,
    BESTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Of a tile of a row: a histogram of the distances below the greatest, and the weights' sum."""
    tile, row = tl.program_id(0), tl.program_id(1)
    heat, p = tl.load(temperature + row), tl.load(top_p + row)
    k, least = tl.load(top_k + row), tl.load(min_p + row)
    greatest = greatest_of(best, row, num_best, BESTS)
    if is_chosen_here(greatest, heat, k, p, least, vocab):
        ids = tile * SIZE + tl.arange(0, SIZE)
        values = tl.load(logits + row.to(tl.int64) * stride + ids, ids < vocab, float("-inf"))
        distance = value_of(greatest) - tl.div_rn(values, heat)
        bins = tl.arange(0, BINS)
        count = tl.histogram(bin_of(distance), BINS)
        # What lies beyond the vocabulary was counted in the last bin.
        count -= tl.where(bins == BINS - 1, tl.maximum((tile + 1) * SIZE - vocab, 0), 0)
        out = row * tl.num_programs(0) + tile
        tl.store(counts_out + out.to(tl.int64) * BINS + bins, count)
        if p < 1:
            tl.store(masses_out + out, tl.sum(tl.exp(-distance.to(tl.float64)), 0))


@triton.jit
def last_bin(count, mass, top_k, top_p, min_p, vocab):
    """The last bin that has tokens which the filters may keep."""
    last = BINS - 1
    bins = tl.arange(0, BINS)
    has_k = (top_k > 0) & (top_k < vocab)
    if has_k:
        last = tl.sum((tl.cumsum(count, 0) < top_k).to(tl.int32), 0)
    elif top_p < 1:
        # No more than this is left after each bin; where it is less than what top_p leaves, stop.
        nearest = bins.to(tl.float64) * 0.031249
        bound = count.to(tl.float64) * tl.exp(-nearest * nearest)
        rest = tl.sum(bound, 0) - tl.cumsum(bound, 0)
        is_over = rest > (1 - top_p.to(tl.float64) - 1e-9) * mass
        last = tl.minimum(tl.sum(is_over.to(tl.int32), 0), last)
    # A share of what top_k keeps needs all of that.
    if (min_p > 0) & ((has_k == 0) | (top_p >= 1)):
        last = tl.minimum(last, bin_of(tl.maximum(-tl.log(min_p), 0.0) + 1e-5) + 1)
    return last


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def cut_kernel(
    temperature,
    top_k,
    top_p,
    min_p,
    best,
    counts_in,
    masses_in,
    row_out,
    first_out,
    greatest_out,
    mass_out,
    vocab,
    num_best,
    num_tiles,
    BESTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Where to cut a row.

    `row_out` gets its last bin and how many tokens lie up to there, none if it is not chosen here;
    `first_out` how many of them lie in tiles before each.
    """
    row = tl.program_id(0)
    heat, p = tl.load(temperature + row), tl.load(top_p + row)
    k, least = tl.load(top_k + row), tl.load(min_p + row)
    order = greatest_of(best, row, num_best, BESTS)
    tl.store(row_out + 2 * row + 1, 0)
    if is_chosen_here(order, heat, k, p, least, vocab):
        tiles = tl.arange(0, TILES)
        bins = tl.arange(0, BINS)
        places = row.to(tl.int64) * num_tiles * BINS + tiles[:, None] * BINS + bins[None, :]
        count = tl.load(counts_in + places, tiles[:, None] < num_tiles, 0)
        summed = tiles < tl.where(p < 1, num_tiles, 0)
        mass = tl.sum(tl.load(masses_in + row * num_tiles + tiles, summed, 0.0), 0)
        last = last_bin(tl.sum(count, 0), mass, k, p, least, vocab)
        of_tile = tl.sum(tl.where(bins[None, :] <= last, count, 0), 1)
        firsts = tl.cumsum(of_tile, 0) - of_tile
        tl.store(first_out + row * num_tiles + tiles, firsts, tiles < num_tiles)
        tl.store(row_out + 2 * row, last)
        tl.store(row_out + 2 * row + 1, tl.sum(of_tile, 0))
        tl.store(greatest_out + row, value_of(order))
        tl.store(mass_out + row, mass)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def list_kernel(
    logits,
    stride,
    temperature,
    row_in,
    first_in,
    greatest_in,
    values_out,
    ids_out,
    vocab,
    room,
    SIZE: tl.constexpr,
):
    """List the tokens of a tile that may be kept, unless its row has more than `room` of them."""
    tile, row = tl.program_id(0), tl.program_id(1)
    last, total = tl.load(row_in + 2 * row), tl.load(row_in + 2 * row + 1)
    if (total > 0) & (total <= room):
        ids = tile * SIZE + tl.arange(0, SIZE)
        values = tl.load(logits + row.to(tl.int64) * stride + ids, ids < vocab, float("-inf"))
        scaled = tl.div_rn(values, tl.load(temperature + row))
        listed = (bin_of(tl.load(greatest_in + row) - scaled) <= last) & (ids < vocab)
        first = row * room + tl.load(first_in + row * tl.num_programs(0) + tile)
        place = first + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(values_out + place, scaled, listed)
        tl.store(ids_out + place, ids, listed)


@triton.jit
def tokens_of(source, first, SIZE: tl.constexpr):
    """Order and id of the tokens `first` and on, of the list or of the whole row; and which are."""
    values, ids, is_list, temperature, size = source
    places = first + tl.arange(0, SIZE)
    there = places < size
    # `values` are scaled already if listed; ids of a whole row are places.
    scaled = tl.div_rn(tl.load(values + places, there, float("-inf")), temperature)
    return scaled, tl.load(ids + places, there & is_list, 0) + tl.where(is_list, 0, places), there


@triton.jit
def weights_of(scaled, greatest, there):
    """Exp of the distance to the greatest, 0 for what is not there."""
    return tl.where(there, tl.exp((scaled - greatest).to(tl.float64)), 0.0)


@triton.jit
def threshold_of(source, bound, greatest, low, WEIGHED: tl.constexpr, SIZE: tl.constexpr):
    """Where the tokens above, or their weights, come to less than `bound`.

    Returns:
        The order of the least token that is kept, and how many of its equals are. `low` is an
        order below it.
    """
    high = order_of(greatest).to(tl.int64)
    above = tl.full((), 0.0, tl.float64)  # over high; over low it is not less than bound
    step = 0
    while high - low > 1:
        # Halving values is quick; halving orders comes to an end near 0 and infinity too.
        middle = (low + high) >> 1
        if step % 4 != 3:
            least = tl.maximum(value_of(low.to(tl.int32)), greatest - 128)
            value = order_of(least * 0.5 + value_of(high.to(tl.int32)) * 0.5).to(tl.int64)
            middle = tl.minimum(tl.maximum(value, low + 1), high - 1)
        sums = tl.zeros((SIZE,), tl.float64)
        nearest_below = tl.full((SIZE,), -_LARGE, tl.int32)
        nearest_above = tl.full((SIZE,), _LARGE, tl.int32)
        for first in range(0, source[4], SIZE):
            scaled, _, there = tokens_of(source, first, SIZE)
            order = order_of(scaled)
            is_above = there & (order > middle)
            if WEIGHED:
                sums += weights_of(scaled, greatest, is_above)
            else:
                sums += tl.where(is_above, 1.0, 0.0)
            nearest_above = tl.minimum(nearest_above, tl.where(is_above, order, _LARGE))
            is_below = there & (order <= middle)
            nearest_below = tl.maximum(nearest_below, tl.where(is_below, order, -_LARGE))
        total = tl.sum(sums, 0)
        # On to the next token, as there is nothing between.
        if total < bound:
            high, above = tl.maximum(tl.max(nearest_below, 0).to(tl.int64), low + 1), total
        else:
            low = tl.min(nearest_above, 0).to(tl.int64) - 1
        step += 1
    one = tl.full((), 1.0, tl.float64)
    if WEIGHED:
        one = tl.exp((value_of(high.to(tl.int32)) - greatest).to(tl.float64))
    kept = tl.minimum(tl.ceil((bound - above) / tl.maximum(one, 1e-300)), 1e9)
    return high, tl.maximum(kept.to(tl.int32), 1)


@triton.jit
def kept_of(scaled, there, threshold, kept, seen):
    """Which tokens are kept, and the number of equals of the threshold up to here."""
    order = order_of(scaled).to(tl.int64)
    is_equal = there & (order == threshold)
    rank = seen + tl.cumsum(is_equal.to(tl.int32), 0)
    seen += tl.sum(is_equal.to(tl.int32), 0)
    return there & ((order > threshold) | (is_equal & (rank <= kept))), seen


@triton.jit
def limit_of(source, top_k, top_p, mass, greatest, vocab, SIZE: tl.constexpr):
    """Of top_k and top_p, as threshold_of says; `mass` is the row's, for a top_p alone."""
    lowest = tl.full((), -INFINITE - 1, tl.int64)  # minus infinity, which no noise lets win
    threshold, kept = lowest, vocab
    if (top_k > 0) & (top_k < vocab):
        bound = top_k.to(tl.float64)
        threshold, kept = threshold_of(source, bound, greatest, lowest, False, SIZE)
        if top_p < 1:
            seen = 0
            sums = tl.zeros((SIZE,), tl.float64)
            for first in range(0, source[4], SIZE):
                scaled, _, there = tokens_of(source, first, SIZE)
                keep, seen = kept_of(scaled, there, threshold, kept, seen)
                sums += weights_of(scaled, greatest, keep)
            mass = tl.sum(sums, 0)
    if top_p < 1:
        bound = tl.maximum(top_p.to(tl.float64) * mass, 1e-300)
        low = tl.maximum(threshold - 1, lowest)
        at, number = threshold_of(source, bound, greatest, low, True, SIZE)
        kept = tl.where(at > threshold, number, tl.minimum(number, kept))
        threshold = tl.maximum(at, threshold)
    return threshold, kept


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def choose_kernel(
    logits,
    stride,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    index,
    position,
    row_in,
    greatest_in,
    mass_in,
    listed_values,
    listed_ids,
    tokens,
    vocab,
    room,
    SIZE: tl.constexpr,
):
    """The token of a filtered row."""
    row = tl.program_id(0)
    size = tl.load(row_in + 2 * row + 1)
    if size > 0:
        greatest = tl.load(greatest_in + row)
        values, is_list, divisor = listed_values + row * room, size <= room, 1.0
        if size > room:
            values, divisor = logits + row.to(tl.int64) * stride, tl.load(temperature + row)
            size = vocab
        source = (values, listed_ids + row * room, is_list, divisor, size)
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        threshold, kept = limit_of(source, k, p, tl.load(mass_in + row), greatest, vocab, SIZE)
        least = tl.minimum(tl.load(min_p + row), 1.0).to(tl.float64)
        key = key_of_row(tl.load(seed + row), tl.load(index + row), tl.load(position + row))
        winner = tl.full((), NO_PAIR, tl.int64)
        seen = 0
        for first in range(0, size, SIZE):
            scaled, ids, there = tokens_of(source, first, SIZE)
            keep, seen = kept_of(scaled, there, threshold, kept, seen)
            keep = keep & (weights_of(scaled, greatest, there) >= least)
            pairs = pairs_of(scaled + noise(key, ids), ids)
            winner = tl.maximum(winner, tl.max(tl.where(keep, pairs, NO_PAIR), 0))
        tl.store(tokens + row, id_of_pair(winner))


def choose(logits: Tensor, rows: SampleArrays, best: Tensor, tokens: Tensor) -> None:
    """Write the tokens of the filtered rows; `best` are the tiles' best pairs before noise."""
    count, vocab = logits.shape
    num_best, num_tiles = best.shape[1], triton.cdiv(vocab, TILE)
    bests, tiles = triton.next_power_of_2(num_best), triton.next_power_of_2(num_tiles)
    grid = (num_tiles, count)
    source = (logits, logits.stride(0), rows.temperature)
    filters = (rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    counts = logits.new_empty((count, num_tiles, BINS.value), dtype=torch.int32)
    masses = logits.new_empty((count, num_tiles), dtype=torch.float64)
    count_kernel[grid](
        *source[:2],
        *filters,
        best,
        counts,
        masses,
        vocab,
        num_best,
        BESTS=bests,
        SIZE=TILE,
        num_warps=8,
        **EXACT,
    )
    cuts = logits.new_empty((count, 2), dtype=torch.int32)
    firsts = logits.new_empty((count, num_tiles), dtype=torch.int32)
    greatest = logits.new_empty(count)
    mass = masses.new_empty(count)
    found = (best, counts, masses, cuts, firsts, greatest, mass)
    sizes = (vocab, num_best, num_tiles)
    cut_kernel[(count,)](*filters, *found, *sizes, BESTS=bests, TILES=tiles, num_warps=8, **EXACT)
    room = min(LISTED, vocab)
    values = logits.new_empty((count, room))
    ids = logits.new_empty((count, room), dtype=torch.int32)
    listed = (cuts, firsts, greatest, values, ids, vocab, room)
    list_kernel[grid](*source, *listed, SIZE=TILE, num_warps=8, **EXACT)
    noise_of = (rows.seed, rows.index, rows.position)
    chosen = (cuts, greatest, mass, values, ids, tokens, vocab, room)
    choose_kernel[(count,)](
        *source[:2], *filters, *noise_of, *chosen, SIZE=CHUNK, num_warps=8, **EXACT
    )

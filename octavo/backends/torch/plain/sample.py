"""Sampling as graph/batch (SamplingRows) says it: all rows at once, by sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.backends.torch.kernels import SampleArrays, Sampled

_C = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def sample(logits: Tensor, rows: SampleArrays) -> Sampled:
    """Choose a token for every row of logits [S, vocab], with its log probabilities."""
    adjusted = _adjusted(logits, rows) if rows.has_edits else logits
    tokens = _chosen(adjusted, rows)
    shifted = (logits - logits.amax(1, keepdim=True)).double()
    log_softmax = (shifted - shifted.exp().sum(1, keepdim=True).log()).float()
    logprobs = log_softmax.gather(1, tokens.clamp_min(0)[:, None])[:, 0]
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, : rows.num_top]
    top_ids = tokens.new_zeros((len(logits), rows.num_top), dtype=torch.int32)
    top_logprobs = torch.zeros_like(top_ids, dtype=torch.float32)
    top_ids[:, : best.shape[1]] = best
    top_logprobs[:, : best.shape[1]] = log_softmax.gather(1, best)
    return Sampled(tokens.int(), logprobs, top_ids, top_logprobs)


def gumbel_noise(rows: SampleArrays, vocab_size: int) -> Tensor:
    """The noise of every token [S, vocab], as graph/batch (Noise) says it."""
    start = _mix(rows.seed + _C) ^ rows.index.long()
    key = _mix(_mix(start) ^ (rows.position.long() + _C))
    tokens = torch.arange(1, vocab_size + 1, device=rows.seed.device)
    bits = _shifted_right(_mix(key[:, None] + _C * tokens), 40)
    return -torch.log(-torch.log((bits.double() + 0.5) / 2**24)).float()


def _mix(z: Tensor) -> Tensor:
    """The finalizer of splitmix64, on the bits of uint64 in int64."""
    z = (z ^ _shifted_right(z, 30)) * _FIRST
    z = (z ^ _shifted_right(z, 27)) * _SECOND
    return z ^ _shifted_right(z, 31)


def _shifted_right(z: Tensor, count: int) -> Tensor:
    """Zeros come in from the left, as in an unsigned integer."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _adjusted(logits: Tensor, rows: SampleArrays) -> Tensor:
    """Bias, then penalties."""
    count, vocab = logits.shape
    # Entries that no row owns go to a row of their own.
    adjusted = torch.cat([logits, logits.new_zeros((1, vocab))])
    owners = _owners(rows.bias_start, rows.bias_ids)
    adjusted.index_put_((owners, rows.bias_ids.long()), rows.bias_values, accumulate=True)

    owners, ids = _owners(rows.penalty_start, rows.penalty_ids), rows.penalty_ids.long()
    counts = rows.penalty_counts.float()
    values = adjusted[owners, ids]
    given = owners.clamp_max(count - 1)
    repetition = rows.repetition[given]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - rows.presence[given] * (counts > 0)
    values = values - rows.frequency[given] * counts
    adjusted[owners, ids] = values
    return adjusted[:count]


def _owners(start: Tensor, entries: Tensor) -> Tensor:
    """The row of each entry; the number of rows for entries past the last row's."""
    places = torch.arange(len(entries), device=start.device, dtype=start.dtype)
    return torch.searchsorted(start[1:].contiguous(), places, right=True)


def _chosen(adjusted: Tensor, rows: SampleArrays) -> Tensor:
    """[S] int64: the token of each row, or -1."""
    greedy = adjusted.argmax(1)  # the lowest id of equals
    is_greedy = (rows.temperature == 0) | (adjusted.amax(1) == float("inf"))
    tokens = greedy
    if rows.has_noise:
        scaled = adjusted / torch.where(is_greedy, 1, rows.temperature)[:, None]
        score = scaled + gumbel_noise(rows, adjusted.shape[1])
        if rows.has_filters:
            score = score.masked_fill(~_kept(scaled, rows), float("-inf"))
        tokens = torch.where(is_greedy, greedy, score.argmax(1))
    is_sound = adjusted.isfinite().any(1) & ~adjusted.isnan().any(1)
    return torch.where(is_sound, tokens, -1)


def _kept(scaled: Tensor, rows: SampleArrays) -> Tensor:
    """Which tokens [S, vocab] top_k, top_p and min_p leave, looked at in this order."""
    # Most probable first, lower id first among equals.
    ordered, order = scaled.sort(dim=1, descending=True, stable=True)
    places = torch.arange(scaled.shape[1], device=scaled.device)
    top_k = torch.where(rows.top_k > 0, rows.top_k, scaled.shape[1])[:, None]
    kept = places < top_k
    weights = (ordered - ordered[:, :1]).double().exp() * kept
    kept &= weights >= rows.min_p.double()[:, None] * weights[:, :1]
    before = weights.cumsum(1) - weights
    top_p = rows.top_p.double()[:, None]
    kept &= (before < top_p * weights.sum(1, keepdim=True)) | (top_p >= 1)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(1, order, kept)

"""Sampling as `graph/batch` (SamplingRows) says it, one row at a time in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.graph.batch import Float32, SamplingRows, StepOutput

_C = np.uint64(0x9E3779B97F4A7C15)


def sample(logits: Float32, rows: SamplingRows) -> StepOutput:
    """Choose a token for every row of logits [S, vocab], with its log probabilities."""
    num_top = max(0, int(rows.num_logprobs.max(initial=0)))
    tokens = np.full(len(logits), -1, np.int32)
    logprobs = np.zeros(len(logits), np.float32)
    top_ids = np.zeros((len(logits), num_top), np.int32)
    top_logprobs = np.zeros((len(logits), num_top), np.float32)
    for s, row in enumerate(logits):
        tokens[s] = _choose(row, rows, s)
        wanted = int(rows.num_logprobs[s])
        if wanted < 0 or tokens[s] < 0:
            continue
        log_softmax = _log_softmax(row)
        logprobs[s] = log_softmax[tokens[s]]
        best = np.argsort(-row, kind="stable")[:wanted]
        top_ids[s, : len(best)] = best
        top_logprobs[s, : len(best)] = log_softmax[best]
    return StepOutput(tokens=tokens, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs)


def empty_output() -> StepOutput:
    """The output of a step that samples nothing."""
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return StepOutput(
        tokens=none[0],
        logprobs=none[1],
        top_ids=none[0].reshape(0, 0),
        top_logprobs=none[1].reshape(0, 0),
    )


def gumbel_noise(seed: int, index: int, position: int, vocab_size: int) -> Float32:
    """The noise of every token of a row: a pure function of the four numbers."""
    with np.errstate(over="ignore"):  # uint64 wraps around, as wanted
        start = _mix(np.uint64(seed) + _C) ^ np.uint64(index)
        key = _mix(_mix(start) ^ (np.uint64(position) + _C))
        tokens = np.arange(1, vocab_size + 1, dtype=np.uint64)
        bits = _mix(key + _C * tokens) >> np.uint64(40)
    uniform = (bits.astype(np.float64) + 0.5) / 2**24
    noise: Float32 = (-np.log(-np.log(uniform))).astype(np.float32)
    return noise


def _mix(z: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    mixed = np.asarray(z, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _choose(logits: Float32, rows: SamplingRows, s: int) -> int:
    adjusted = _adjust(logits, rows, s)
    if np.isnan(adjusted).any() or not np.isfinite(adjusted).any():
        return -1
    filters, noise = rows.filters, rows.noise
    temperature = filters.temperature[s]
    if temperature == 0 or adjusted.max() == np.inf:
        return int(np.argmax(adjusted))
    scaled = adjusted / temperature
    kept = _filter(scaled, int(filters.top_k[s]), float(filters.top_p[s]), float(filters.min_p[s]))
    gumbel = gumbel_noise(
        int(noise.seed[s]), int(noise.index[s]), int(noise.position[s]), len(logits)
    )
    return int(np.argmax(np.where(kept, scaled + gumbel, np.float32(-np.inf))))


def _adjust(logits: Float32, rows: SamplingRows, s: int) -> Float32:
    """Bias, then penalties."""
    adjusted = logits.copy()
    bias, penalties = rows.bias, rows.penalties
    own = slice(bias.start[s], bias.start[s + 1])
    np.add.at(adjusted, bias.token_ids[own], bias.values[own])
    seen = slice(penalties.start[s], penalties.start[s + 1])
    ids, counts = penalties.token_ids[seen], penalties.counts[seen].astype(np.float32)
    values = adjusted[ids]
    repetition = penalties.repetition[s]
    values = np.where(values > 0, values / repetition, values * repetition)
    values -= penalties.presence[s] * (counts > 0)
    values -= penalties.frequency[s] * counts
    adjusted[ids] = values
    return adjusted


def _filter(scaled: Float32, top_k: int, top_p: float, min_p: float) -> NDArray[np.bool_]:
    """Which tokens top_k, top_p and min_p leave, looked at in this order."""
    order = np.argsort(-scaled, kind="stable")  # most probable first, lower id first among equals
    if top_k > 0:
        order = order[:top_k]
    weights = np.exp((scaled[order] - scaled[order[0]]).astype(np.float64))
    kept = weights >= min_p * weights[0]
    if top_p < 1:
        before = np.cumsum(weights) - weights  # the sum of those more probable
        kept &= before < top_p * weights.sum()
    kept[0] = True
    mask = np.zeros(len(scaled), np.bool_)
    mask[order[kept]] = True
    return mask


def _log_softmax(logits: Float32) -> Float32:
    shifted = logits.astype(np.float64) - float(logits.max())
    result: Float32 = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return result

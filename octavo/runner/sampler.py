"""SamplingParams and history of every row as arrays, and a step's SamplingRows of them.

The arithmetic of sampling is an operator of the backends (`graph/batch.py`, SamplingRows); here it
is only described. Tokens seen are counted as they come, so a step costs the same however long a
sequence is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from octavo.graph.batch import Bias, Filters, Float32, Int32, Noise, Penalties, SamplingRows
from octavo.runner.batch import SampledRows
from octavo.types import Fork, NewSequence

GREEDY_BELOW = 1e-4
"""A positive temperature below this is taken as its limit, 0: the quotient could leave float32."""

_SEED_MASK = (1 << 64) - 1


@dataclass(slots=True)
class SeenTokens:
    """The distinct tokens of a row with their count in its output, in order of first appearance."""

    ids: Int32 = field(default_factory=lambda: np.zeros(64, np.int32))
    counts: Int32 = field(default_factory=lambda: np.zeros(64, np.int32))
    size: int = 0
    _place: dict[int, int] = field(default_factory=dict)

    def add(self, token_id: int, count: int) -> None:
        """Note a token; `count` is 1 for a token of the output, 0 for one of the prompt."""
        place = self._place.get(token_id)
        if place is None:
            if self.size == len(self.ids):
                self.ids = np.concatenate((self.ids, np.zeros_like(self.ids)))
                self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
            place = self._place[token_id] = self.size
            self.ids[place] = token_id
            self.counts[place] = 0
            self.size += 1
        self.counts[place] += count


@dataclass(frozen=True, slots=True)
class RowBias:
    """What is added to the logits of some tokens of one row, each id once."""

    ids: Int32
    values: Float32


@dataclass(slots=True)
class RowHistory:
    """What one row with penalties or biases needs beyond its numbers."""

    seen: SeenTokens | None
    bias: RowBias | None
    """The user's logit_bias."""
    banned: RowBias | None
    """The same with every token that would end the sequence at -inf."""
    first_free_position: int
    """From this position on a token may end the sequence."""


class SamplerTable:
    """Sampling state of every row."""

    def __init__(self, num_rows: int, eos_token_ids: Iterable[int]) -> None:
        """Allocate for `num_rows` rows; eos_token_ids are banned before a row's min_tokens."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._floats: Float32 = np.zeros((6, num_rows), np.float32)
        self._ints: Int32 = np.zeros((3, num_rows), np.int32)
        self._seeds: NDArray[np.uint64] = np.zeros(num_rows, np.uint64)
        self._histories: dict[int, RowHistory] = {}
        self._last: tuple[bytes, SamplingRows] | None = None
        """The rows of the last step and how they were sampled, while that says all but where."""

    def insert(self, sequence: NewSequence) -> None:
        """Take in a sequence with its parameters and all of its tokens."""
        params, row = sequence.params, sequence.row
        self._last = None
        self._floats[:, row] = (
            params.temperature if params.temperature >= GREEDY_BELOW else 0.0,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        num_logprobs = -1 if params.logprobs is None else params.logprobs
        self._ints[:, row] = (max(params.top_k, 0), sequence.index, num_logprobs)
        self._seeds[row] = (params.seed or 0) & _SEED_MASK
        history = _history(sequence, self._eos_token_ids)
        if history is None:
            self._histories.pop(row, None)
        else:
            self._histories[row] = history

    def fork(self, forks: Sequence[Fork]) -> None:
        """Let rows be sampled as their parents are; of rows without penalties and biases alone."""
        self._last = None
        for fork in forks:
            self._floats[:, fork.row] = self._floats[:, fork.parent_row]
            self._ints[:, fork.row] = self._ints[:, fork.parent_row]
            self._seeds[fork.row] = self._seeds[fork.parent_row]

    def remove(self, row: int) -> None:
        """Forget a row."""
        self._histories.pop(row, None)

    def build(self, sampled: SampledRows) -> SamplingRows:
        """How to sample these rows now."""
        rows = sampled.rows
        key = rows.tobytes()
        if self._last is not None and self._last[0] == key:
            last = self._last[1]
            return replace(last, noise=replace(last.noise, position=sampled.positions))
        temperature, top_p, min_p, repetition, presence, frequency = self._floats.take(rows, axis=1)
        top_k, index, num_logprobs = self._ints.take(rows, axis=1)
        seen_start, seen_ids, seen_counts = self._seen(rows)
        built = SamplingRows(
            filters=Filters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
            noise=Noise(seed=self._seeds[rows], index=index, position=sampled.positions),
            penalties=Penalties(
                repetition=repetition,
                presence=presence,
                frequency=frequency,
                start=seen_start,
                token_ids=seen_ids,
                counts=seen_counts,
            ),
            bias=self._biases(sampled),
            num_logprobs=num_logprobs,
        )
        # Penalties and biases change with every token.
        self._last = None if self._histories else (key, built)
        return built

    def append_tokens(self, sampled: SampledRows, token_ids: Int32) -> None:
        """Count each sampled token in the history of its row."""
        if not self._histories:
            return
        for row, token_id in zip(sampled.rows.tolist(), token_ids.tolist(), strict=True):
            history = self._histories.get(row)
            if history is not None and history.seen is not None and token_id >= 0:
                history.seen.add(token_id, 1)

    def _seen(self, rows: NDArray[np.intp]) -> tuple[Int32, Int32, Int32]:
        start = np.zeros(len(rows) + 1, np.int32)
        ids: list[Int32] = []
        counts: list[Int32] = []
        if self._histories:
            for place, row in enumerate(rows.tolist()):
                history = self._histories.get(row)
                if history is not None and history.seen is not None:
                    seen = history.seen
                    ids.append(seen.ids[: seen.size])
                    counts.append(seen.counts[: seen.size])
                    start[place + 1] = seen.size
            np.cumsum(start, out=start)
        return start, _joined(ids), _joined(counts)

    def _biases(self, sampled: SampledRows) -> Bias:
        start = np.zeros(len(sampled.rows) + 1, np.int32)
        ids: list[Int32] = []
        values: list[Float32] = []
        if self._histories:
            positions = sampled.positions.tolist()
            for place, row in enumerate(sampled.rows.tolist()):
                history = self._histories.get(row)
                if history is None:
                    continue
                is_free = positions[place] >= history.first_free_position
                bias = history.bias if is_free else history.banned
                if bias is not None:
                    ids.append(bias.ids)
                    values.append(bias.values)
                    start[place + 1] = len(bias.ids)
            np.cumsum(start, out=start)
        floats: Float32 = np.concatenate(values) if values else np.zeros(0, np.float32)
        return Bias(start=start, token_ids=_joined(ids), values=floats)


def _joined(parts: list[Int32]) -> Int32:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _history(sequence: NewSequence, eos_token_ids: frozenset[int]) -> RowHistory | None:
    params = sequence.params
    has_count_penalty = params.presence_penalty != 0 or params.frequency_penalty != 0
    has_repetition = params.repetition_penalty != 1
    seen = SeenTokens() if has_count_penalty or has_repetition else None
    if seen is not None:
        if has_repetition:
            for token_id in sequence.token_ids[: sequence.num_prompt_tokens]:
                seen.add(token_id, 0)
        for token_id in sequence.token_ids[sequence.num_prompt_tokens :]:
            seen.add(token_id, 1)
    bias = _bias(params.logit_bias)
    banned = bias
    if params.min_tokens > 0:
        enders = eos_token_ids.union(params.stop_token_ids)
        banned = _bias({**params.logit_bias, **dict.fromkeys(enders, float("-inf"))})
    if seen is None and bias is None and banned is None:
        return None
    return RowHistory(seen, bias, banned, sequence.num_prompt_tokens + params.min_tokens)


def _bias(values: dict[int, float]) -> RowBias | None:
    if not values:
        return None
    return RowBias(
        np.fromiter(values.keys(), np.int32, len(values)),
        np.fromiter(values.values(), np.float32, len(values)),
    )

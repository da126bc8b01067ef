"""The arrays of one ragged step, to a Program and back. Built whole, then read-only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One ragged step of B sequences and T tokens.

    Sequence b owns tokens query_start_loc[b] to query_start_loc[b + 1].

    Attributes:
        token_ids: [T]; where a Program's depth is above 1, -(s + 1) is the token that the step
            before samples as its s-th, which the host need not know yet.
        positions: [1, T], absolute.
        query_start_loc: [B + 1].
        seq_lens: [B], tokens of the sequence including those of this step.
        block_tables: one [B, M] a cache group; entries past a sequence's blocks are 0 and never
            read.
        slot_mapping: one [T] a cache group: block_id * block_size + offset, where K and V of each
            token go.
        logits_rows: [S], tokens whose logits are wanted.
        inputs: named inputs, [T, features] float32.
    """

    token_ids: Int32
    positions: Int32
    query_start_loc: Int32
    seq_lens: Int32
    block_tables: tuple[Int32, ...]
    slot_mapping: tuple[Int32, ...]
    logits_rows: Int32
    inputs: Mapping[str, Float32] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Temperature and what a row may choose from.

    top_p and min_p look at softmax(logits / temperature) after top_k; top_p keeps the most
    probable tokens, the lower id first among equals, until their sum reaches it, at least one.

    Attributes:
        temperature: [S] float32, 0 is greedy.
        top_k: [S] int32, 0 keeps all.
        top_p, min_p: [S] float32; 1 and 0 keep all.
    """

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What the noise of a row is a pure function of, beside the token.

    All in uint64 with wrap-around: mix(z) is splitmix64's finalizer (z ^= z >> 30; z *=
    0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31); key =
    mix(mix(mix(seed + C) ^ index) ^ position + C) with C = 0x9E3779B97F4A7C15; u = ((mix(key + C *
    (token + 1)) >> 40) + 0.5) / 2**24; noise = -log(-log(u)).

    Attributes:
        seed: [S] uint64.
        index: [S] int32, the sequence's index in its request.
        position: [S] int32, of the token to be sampled.
    """

    seed: NDArray[np.uint64]
    index: Int32
    position: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """The penalties of a row and the tokens that they apply to.

    Attributes:
        repetition, presence, frequency: [S] float32; 1, 0, 0 change nothing.
        start: [S + 1] int32, row s owning token_ids and counts start[s] to start[s + 1].
        token_ids, counts: int32, tokens of prompt and output with their count in the output. Rows
            without penalties own none.
    """

    repetition: Float32
    presence: Float32
    frequency: Float32
    start: Int32
    token_ids: Int32
    counts: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """What is added to the logits of some tokens.

    Attributes:
        start: [S + 1] int32, row s owning token_ids and values start[s] to start[s + 1].
        token_ids: int32.
        values: float32, added to the logits; -inf bans a token.
    """

    start: Int32
    token_ids: Int32
    values: Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """How to sample each of the S rows of the logits.

    Order: bias, penalties, temperature, top_k, top_p, min_p, noise.

    The sample of a row is argmax(logits / temperature + Gumbel(seed, index, position, token)) over
    the tokens that the filters leave; greedy (temperature 0) is argmax(logits), the lowest id of
    equals.

    Attributes:
        filters, noise, penalties, bias: as these records say.
        num_logprobs: [S] int32; -1: none wanted, 0: of the sampled token, k: and of the k most
            probable ones.
    """

    filters: Filters
    noise: Noise
    penalties: Penalties
    bias: Bias
    num_logprobs: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a Program returns.

    Attributes:
        tokens: [S] int32, the sampled ids; -1 where no logit of the row is finite or one is NaN.
            Empty if nothing was to be sampled.
        logprobs: [S] float32 of the sampled tokens, log-softmax of the raw logits; unspecified
            where num_logprobs is -1.
        top_ids, top_logprobs: [S, K], K the largest num_logprobs; best first, lower id first among
            equals; a row's entries past its own num_logprobs are unspecified.
        values: the named outputs of the graph that were asked for.
    """

    tokens: Int32
    logprobs: Float32
    top_ids: Int32
    top_logprobs: Float32
    values: Mapping[str, Float32] = field(default_factory=dict)

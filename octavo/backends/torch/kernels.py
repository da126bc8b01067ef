"""The kernels of the torch backend: a table of functions, and the records that they share.

There are two tables. `plain` is torch alone, slow and obvious, for any device; `triton` is fast,
one kernel a file. Both keep the contracts below, whose arithmetic is that of graph/ops; one test
checks both against the reference backend.

T is the number of tokens of a step, B of sequences, S of sampled rows. Activations are [T,
features] in the dtype that the model computes in (float32, bfloat16 or float16); their rows may be
strided, a row itself is contiguous. Kernels sum in float32 and round once, to the dtype of x. What
a row becomes depends on no other row, if `deterministic` is asked for where there is a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from octavo.graph import ops as op


@dataclass(frozen=True, slots=True)
class StaticScale:
    """Rounding to fp8 by one scale for all tokens, which is known before the step.

    Attributes:
        scale: a float32 from 2**-126 to 2**126, so that 1 / scale is as exact as it.
    """

    scale: float

    def __str__(self) -> str:
        """Without the number, as the other modes are named."""
        return "fp8 static"


QuantizeMode = Literal["int8 token", "fp8 token", "fp8 group"] | StaticScale
"""One scale a token, one a group of 128 of its features (the last may be shorter), or a given one.
"""
QUANTIZE_GROUP = 128


@dataclass(frozen=True, slots=True)
class StepArrays:
    """Where a step's tokens stand, on the device.

    Rows that pad a step to a size that was captured have a seq_len of 0 and slots of -1: nothing is
    written for them and what is computed for them is finite and unspecified.

    Attributes:
        positions: [T] int32.
        slots: [T] int32, block_id * block_size + offset; -1: nowhere.
        starts: [B + 1] int32, sequence b owns tokens starts[b] to starts[b + 1].
        seq_lens: [B] int32, those of this step included.
        block_tables: [B, M] int32.
        max_query_len: the most tokens of one sequence in this step.
        max_seq_len: the greatest of seq_lens, or a bound of them.
        max_decode_len: the same of the sequences with one token; 0 without any.
    """

    positions: Tensor
    slots: Tensor
    starts: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_seq_len: int
    max_decode_len: int


@dataclass(frozen=True, slots=True)
class LayerCache:
    """K and V of one layer.

    Blocks may be strided (a block of all layers is one piece of memory); inside a block, values and
    scales are contiguous.

    Attributes:
        values: [num_blocks, 2, num_kv_heads, block_size, head_dim], K before V; float16, bfloat16,
            float32, or codes in int8 or float8_e4m3fn.
        scales: of codes, float32 [num_blocks, 2, num_kv_heads, block_size]; else None.
    """

    values: Tensor
    scales: Tensor | None


def query_dtype(computed: torch.dtype, cached: torch.dtype) -> torch.dtype:
    """The dtype of rotated queries, which scores are computed in.

    Args:
        computed: the dtype of activations.
        cached: that of the values of the cache. Codes are exact in any; float16 holds bfloat16
            exactly within its range, far beyond that of queries and keys.
    """
    dtypes = {computed} if cached.itemsize == 1 else {computed, cached}
    if torch.float32 in dtypes:
        return torch.float32
    return torch.float16 if torch.float16 in dtypes else torch.bfloat16


class Quantized(NamedTuple):
    """Activations as codes: x is about codes * scales.

    int8 as the contract of Linear in graph/ops rounds a group (a group is the whole row here). fp8
    is float8_e4m3fn: scale = max|x| / 448, code = x * (448 / max|x|) rounded to nearest even; a
    group whose max|x| is below 2**-119 (448 over less is infinite) is zeros with scale 0. NaN or
    infinity make a NaN of the scale.

    With a StaticScale, code = x * (1 / scale), both operations in float32, at most 448 and at least
    -448 (infinity too), rounded to nearest even; NaN makes a NaN of its own code.
    """

    codes: Tensor
    """[T, features] int8 or float8_e4m3fn."""
    scales: Tensor
    """float32 [T, 1], equal ones of a StaticScale, or [T, ceil(features / 128)]."""


class Normed(NamedTuple):
    """What rms_norm returns."""

    total: Tensor
    """x, or x + residual rounded to the dtype of x: the next residual."""
    values: Tensor | Quantized
    """The norm of `total`."""


class Sampled(NamedTuple):
    """What sample returns; as graph/batch.StepOutput says."""

    tokens: Tensor
    """[S] int32."""
    logprobs: Tensor
    """[S] float32."""
    top_ids: Tensor
    """[S, K] int32."""
    top_logprobs: Tensor
    """[S, K] float32."""


@dataclass(frozen=True, slots=True)
class SampleArrays:
    """graph/batch.SamplingRows on the device, field by field under the same names.

    Attributes:
        seed: [S] int64, the bits of the uint64.
        num_top: K, the greatest of num_logprobs, at least 0.
        has_filters: some row has a top_k, top_p or min_p that keeps less than all.
        has_noise: some row has a temperature above 0.
        has_edits: some row has a penalty or a bias.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    index: Tensor
    position: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    penalty_start: Tensor
    penalty_ids: Tensor
    penalty_counts: Tensor
    bias_start: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    num_logprobs: Tensor
    num_top: int
    has_filters: bool
    has_noise: bool
    has_edits: bool


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A grouped integer weight, packed for products; made by weights.pack_grouped.

    Attributes:
        codes: int32 [blocks, out_features, 16], words as `weights` lays them out.
        scales: int32, two float16 each, the first in the lower bits: [groups, out_features] of a
            scale and a minimum; without minimums [ceil(groups / 2), out_features] of the scales of
            two groups in a row.
        has_minimums: whether there are minimums.
        factors: float32 [out_features], powers of two that scales and minimums are multiplied with.
        bits: of a code as packed, 4 or 8.
        zero: the code that stands for 0.
        group: columns a group, a multiple of 16.
        shape: (out_features, in_features).
    """

    codes: Tensor
    scales: Tensor
    has_minimums: bool
    factors: Tensor
    bits: int
    zero: int
    group: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in int8 or fp8 for products with quantized activations.

    Attributes:
        codes: [out_features, in_features] int8 or float8_e4m3fn.
        scales: float32: [1, 1] of the whole, [out_features, 1] of rows, or [ceil(out / 128),
            ceil(in / 128)] of blocks of 128 by 128.
    """

    codes: Tensor
    scales: Tensor


Activation = Literal["silu", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """A table of kernels.

    Attributes:
        rms_norm: (x [T, heads * F], weight float32 [F], eps, residual like x or None, quantize or
            None) → Normed. Of each head of F features by itself; a residual or quantize only comes
            with one head.
        gated: (gate, up, activation, quantize or None) → activation(gate) * up, [T, F].
        quantize: (x [T, F], mode) → Quantized.
        rope_write: (q [T, heads * D], k and v [T, kv_heads * D], table or None, arrays, cache,
            factors or None) → the rotated q, contiguous, rounded once, to query_dtype. Rotates q
            and k by the table float32 [max_model_len, D] (cosines, then sines, of D / 2 angles
            each; None: no rotation) at their positions, then writes k and v to their slots. With a
            cache of codes, each head of a token is one group of its own (int8 or fp8 as in
            Quantized), and factors, float32 [kv_heads, D], divide k (by multiplication with 1 /
            factor) and multiply q.
        attention: (q [T, heads * D] as rope_write returns it, cache, arrays, operator, dtype of the
            result, deterministic) → [T, heads * D].
        matmul: (x [T, K], weight [N, K] of x's dtype, bias of x's dtype [N] or None) → [T, N], each
            row in the same order of sums whatever T.
        linear: the same, in whatever order of sums is fast for this T.
        grouped_linear: (x [T, K], weight, bias or None, deterministic) → [T, N].
        quantized_linear: (x, weight, bias or None, dtype of the result, deterministic) → [T, N].
        sample: (logits [S, V] float32, which it may overwrite, rows) → Sampled.
        copy_blocks: (pool uint8 [layers, num_blocks, bytes], pairs int32 [P, 2]) → None. Copies
            whole blocks over all layers; no destination is a source of the same call.
    """

    rms_norm: Callable[[Tensor, Tensor, float, Tensor | None, QuantizeMode | None], Normed]
    gated: Callable[[Tensor, Tensor, Activation, QuantizeMode | None], Tensor | Quantized]
    quantize: Callable[[Tensor, QuantizeMode], Quantized]
    rope_write: Callable[
        [Tensor, Tensor, Tensor, Tensor | None, StepArrays, LayerCache, Tensor | None], Tensor
    ]
    attention: Callable[
        [Tensor, LayerCache, StepArrays, op.PagedAttention, torch.dtype, bool], Tensor
    ]
    matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    grouped_linear: Callable[[Tensor, GroupedWeight, Tensor | None, bool], Tensor]
    quantized_linear: Callable[
        [Quantized, QuantizedWeight, Tensor | None, torch.dtype, bool], Tensor
    ]
    sample: Callable[[Tensor, SampleArrays], Sampled]
    copy_blocks: Callable[[Tensor, Tensor], None]

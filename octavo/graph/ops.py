"""The operators: each one's contract stands here once; one test checks every implementation.

T is the number of tokens of a step (ragged: rows of all sequences, one after another), S the
number of sampled rows. Every value is float32 [T, features], except after SelectRows: [S,
features].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shard = Literal["none", "column", "row"]


@dataclass(frozen=True, slots=True)
class Input:
    """A named input of the graph, [T, features] float32 (Batch.inputs[name])."""

    name: str
    features: int


@dataclass(frozen=True, slots=True)
class Embed:
    """Row token_ids[t] of the weight [num_embeddings, features], times scale. No inputs.

    scale is rounded to float32; Gemma's is sqrt(features).
    """

    weight: str
    num_embeddings: int
    features: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / sqrt(mean(x²) + eps) * weight, for each head of a row [num_heads * features] by itself.

    num_heads is 1 for the norm of a whole row; all heads share the weight [features].

    Source: Zhang and Sennrich 2019 (RMSNorm); over heads: Henry et al. 2020 (Query-Key
    Normalization).
    """

    weight: str
    features: int
    eps: float
    num_heads: int = 1


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T + bias; weight [out_features, in_features].

    With a grouped weight, backends that say so round x to int8 a group of the weight's columns
    first, 32 of a larger one: scale = max|x| / 127 over the group (float32), code =
    round-half-even(x * (127 / max|x|)); a group whose max|x| is below 2**-120 counts as zeros,
    with scale 0.
    The product of a group is scale_w * scale_x * Σ (code_w - zero) * code_x + minimum_w * scale_x
    * Σ code_x, the sums exact integers; groups are added in ascending order in float32.
    """

    weight: str
    in_features: int
    out_features: int
    bias: str | None = None
    shard: Shard = "none"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of [T, heads * head_dim] at positions[t], "half" layout.

    With i < head_dim / 2 and a = positions[t] * inv_freq[i] (float32): out[i] = x[i] cos a - x[i +
    half] sin a, out[i + half] = x[i + half] cos a + x[i] sin a. cos and sin are taken in float64
    of the float32 angle and rounded to float32.

    Source: Su et al. 2021 (RoFormer), section 3.4; llama3 scaling is already inside inv_freq.
    """

    num_heads: int
    head_dim: int
    inv_freq: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Write K and V of the step into the cache, then causal attention of each row over it.

    Inputs: query [T, num_heads * head_dim], key and value [T, num_kv_heads * head_dim]. K and V
    are rounded to the cache's dtype and read back from it, also those of this step.

    In an int8 cache each head of a token of K, and of V, is rounded as one group, as Linear rounds
    x, and read back as scale * code; NaN or infinity in the head makes all of it NaN. K is divided
    by static factors before (multiplied by 1 / factor) and the query multiplied by them
    (backends/key_scaling.py), for K's rounding alone.

    Softmax accumulates in float32 in ascending order of absolute position, so a row's result
    depends on nothing but its query and its sequence's cache.

    A row at position p attends to the positions 0 to p; with a window, to the last `window` of
    them: p - window + 1 to p. What lies before is never read into a result, NaN included.
    With a soft_cap, scores are soft_cap * tanh(q·k * scale / soft_cap), else q·k * scale.

    Source: Kwon et al. 2023 (PagedAttention), section 4; online softmax: Milakov and
    Gimelshein 2018; window: Beltagy et al. 2020 (Longformer); soft cap: Gemma 2 report 2024.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class SiluMul:
    """silu(gate) * up of two values of equal shape; silu(x) = x / (1 + exp(-x))."""


@dataclass(frozen=True, slots=True)
class GeluMul:
    """gelu(gate) * up of two values of equal shape, gelu in its tanh approximation.

    gelu(x) = x (1 + tanh u) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x³).

    Source: Hendrycks and Gimpel 2016 (GELU); gated: Shazeer 2020 (GEGLU).
    """


@dataclass(frozen=True, slots=True)
class Add:
    """The sum of two values of equal shape."""


@dataclass(frozen=True, slots=True)
class SelectRows:
    """The rows Batch.logits_rows of a value: [S, features]."""


Operator = (
    Input | Embed | RmsNorm | Linear | Rope | PagedAttention | SiluMul | GeluMul | Add | SelectRows
)

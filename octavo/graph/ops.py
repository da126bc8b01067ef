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
    """Row token_ids[t] of the weight [num_embeddings, features]. No inputs."""

    weight: str
    num_embeddings: int
    features: int


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / sqrt(mean(x²) + eps) * weight, a row at a time.

    Source: Zhang and Sennrich 2019 (RMSNorm).
    """

    weight: str
    features: int
    eps: float


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T + bias; weight [out_features, in_features].

    With a grouped weight, backends that say so round x to int8 a group of the weight's columns
    first: scale = max|x| / 127 over the group (float32), code = round-half-even(x * (127 /
    max|x|)); a group whose max|x| is below 2**-120 counts as zeros, with scale 0.
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
    are rounded to the cache's dtype and read back from it, also those of this step. Softmax
    accumulates in float32 in ascending order of absolute position, so a row's result depends on
    nothing but its query and its sequence's cache.

    Source: Kwon et al. 2023 (PagedAttention), section 4; online softmax: Milakov and
    Gimelshein 2018.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, slots=True)
class SiluMul:
    """silu(gate) * up of two values of equal shape; silu(x) = x / (1 + exp(-x))."""


@dataclass(frozen=True, slots=True)
class Add:
    """The sum of two values of equal shape."""


@dataclass(frozen=True, slots=True)
class SelectRows:
    """The rows Batch.logits_rows of a value: [S, features]."""


Operator = Input | Embed | RmsNorm | Linear | Rope | PagedAttention | SiluMul | Add | SelectRows

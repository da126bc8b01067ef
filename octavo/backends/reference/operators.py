"""The operators of `graph/ops` in numpy float32, each a few lines that read like its contract.

The BLAS behind numpy sums in an order that depends on the shapes, so a row's result may differ in
its last bits with the rows beside it: this backend promises closeness, the fast ones promise bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from octavo.graph import ops as op
from octavo.graph.batch import Float32, Int32
from octavo.graph.tensors import GroupedTensor, StoredTensor

_SMALLEST_PEAK = np.float32(2.0**-120)
_TILE_ELEMENTS = 1 << 18
"""Products of groups are made in tiles of so many numbers, to stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """A grouped weight ready for products with activations rounded to int8.

    Attributes:
        codes: [groups, group, rows] float32, code - zero: whole numbers.
        scales, minimums: [groups, 1, rows] float32.
    """

    codes: Float32
    scales: Float32
    minimums: Float32 | None

    @classmethod
    def of(cls, weight: GroupedTensor) -> RoundedLinear:
        """Lay a stored weight out by groups."""
        weight = weight.in_small_groups()
        rows, columns = weight.shape
        codes = weight.codes.values().astype(np.float32) - np.float32(weight.codes.zero)
        by_group = codes.reshape(rows, columns // weight.group, weight.group)
        return cls(
            np.ascontiguousarray(by_group.transpose(1, 2, 0)),
            _by_group(weight.scales.values()),
            None if weight.minimums is None else _by_group(weight.minimums.values()),
        )


def _by_group(scales: Float32) -> Float32:
    return np.ascontiguousarray(scales.T[:, None, :])


def round_to_int8(x: Float32, group: int) -> tuple[Float32, Float32]:
    """Round rows to int8 in groups of columns, as the contract of Linear says.

    Returns:
        codes [groups, T, group], whole numbers in float32, and scales [groups, T, 1].
    """
    grouped = x.reshape(len(x), -1, group).transpose(1, 0, 2)
    peak: Float32 = np.abs(grouped).max(axis=2, keepdims=True)
    peak[peak < _SMALLEST_PEAK] = 0
    factor: Float32 = np.float32(127) / peak
    factor[peak == 0] = 0
    scales: Float32 = peak / np.float32(127)
    return np.rint(grouped * factor), scales


def linear_rounded(x: Float32, weight: RoundedLinear) -> Float32:
    """Product with weight.T of x rounded to int8: exact sums in a group, groups added in order.

    NOTE: a float32 product of the codes is exact whatever its order: |code - zero| <= 255, so the
    sum of 32 products stays below 2**24.
    """
    groups, group, rows = weight.codes.shape
    codes, scales = round_to_int8(x, group)
    sums = codes.sum(axis=2, keepdims=True)
    out = np.empty((len(x), rows), np.float32)
    tile = max(16, _TILE_ELEMENTS // (groups * max(1, len(x))))
    for start in range(0, rows, tile):
        n = slice(start, start + tile)
        products = codes @ weight.codes[:, :, n]
        products *= weight.scales[:, :, n] * scales
        if weight.minimums is not None:
            products += weight.minimums[:, :, n] * scales * sums
        total = np.zeros(products.shape[1:], np.float32)
        for product in products:
            total += product
        out[:, n] = total
    return out


def embed(weight: StoredTensor, token_ids: Int32, scale: float) -> Float32:
    """The rows of the tokens, in float32, times scale."""
    return weight.take_rows(token_ids.astype(np.int64)).dequantize() * np.float32(scale)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """RMS norm of every len(weight) features: x / sqrt(mean(x²) + eps) * weight."""
    heads = x.reshape(len(x), -1, len(weight))
    mean: Float32 = np.mean(heads * heads, axis=2, keepdims=True, dtype=np.float32)
    root: Float32 = np.sqrt(mean + np.float32(eps), dtype=np.float32)
    normed: Float32 = heads / root * weight
    return normed.reshape(x.shape)


def rope(x: Float32, operator: op.Rope, positions: Int32) -> Float32:
    """Rotate the pairs (i, i + half) of every head by positions * inv_freq[i]."""
    inv_freq = np.array(operator.inv_freq, np.float32)
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    cos = np.cos(angles).astype(np.float32)[:, None, :]
    sin = np.sin(angles).astype(np.float32)[:, None, :]
    heads = x.reshape(len(x), operator.num_heads, 2, operator.head_dim // 2)
    first, second = heads[:, :, 0], heads[:, :, 1]
    rotated = np.stack([first * cos - second * sin, second * cos + first * sin], axis=2)
    return rotated.reshape(x.shape)


def attend(
    query: Float32, keys: Float32, values: Float32, positions: Int32, operator: op.PagedAttention
) -> Float32:
    """Causal attention of some rows of one sequence over its tokens.

    Args:
        query: [rows, num_heads, head_dim].
        keys: [tokens, num_kv_heads, head_dim], token i at position i.
        values: like keys.
        positions: [rows]; a row sees the tokens up to its own position.
        operator: scale, window and soft cap.

    Returns:
        [rows, num_heads, head_dim].
    """
    rows, num_heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    # Heads that share K and V stand together: [kv_heads, rows * heads a kv head, head_dim].
    grouped = query.reshape(rows, kv_heads, -1, head_dim).transpose(1, 0, 2, 3)
    scores = grouped.reshape(kv_heads, -1, head_dim) @ keys.transpose(1, 2, 0)
    scores = scores.reshape(kv_heads, rows, -1, len(keys)) * np.float32(operator.scale)
    if operator.soft_cap is not None:
        soft_cap = np.float32(operator.soft_cap)
        scores = soft_cap * np.tanh(scores / soft_cap)
    at = np.arange(len(keys))
    hidden = at > positions[:, None]
    if operator.window is not None:
        hidden |= at <= positions[:, None] - operator.window
    scores = np.where(hidden[None, :, None, :], np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True, dtype=np.float32)
    mixed = weights.reshape(kv_heads, -1, len(keys)) @ values.transpose(1, 0, 2)
    by_row = mixed.reshape(kv_heads, rows, -1, head_dim).transpose(1, 0, 2, 3)
    out: Float32 = by_row.reshape(rows, num_heads, head_dim)
    return out


def silu_mul(gate: Float32, up: Float32) -> Float32:
    """Gated activation: silu(gate) * up."""
    denominator: Float32 = np.exp(-gate, dtype=np.float32) + np.float32(1)
    return gate / denominator * up


def gelu_mul(gate: Float32, up: Float32) -> Float32:
    """Gated activation: gelu(gate) * up, gelu in its tanh approximation."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
    half: Float32 = np.float32(0.5) * (np.tanh(inner, dtype=np.float32) + np.float32(1))
    return gate * half * up

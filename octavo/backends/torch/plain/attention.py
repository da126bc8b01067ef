"""Paged attention, a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.backends.torch.kernels import LayerCache, StepArrays
from octavo.graph import ops as op


def attention(
    q: Tensor,
    cache: LayerCache,
    arrays: StepArrays,
    operator: op.PagedAttention,
    dtype: torch.dtype,
    deterministic: bool,
) -> Tensor:
    """Causal attention of each row over its sequence's cache; see `Kernels.attention`.

    In float64 and of one row at a time, whose shapes are those of what it sees: always
    deterministic.
    """
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    heads = (operator.num_kv_heads, -1, operator.head_dim)
    starts = arrays.starts.tolist()
    for b, length in enumerate(arrays.seq_lens.tolist()):
        if not length:  # It pads the step.
            continue
        first = length - (starts[b + 1] - starts[b])
        lowest = 0 if operator.window is None else max(0, first - operator.window + 1)
        keys, values = read(cache, arrays.block_tables[b], lowest, length)
        for position in range(first, length):
            row = starts[b] + position - first
            low = 0 if operator.window is None else max(0, position - operator.window + 1)
            seen = slice(low - lowest, position + 1 - lowest)
            result = attend(q[row].double().view(heads), keys[:, seen], values[:, seen], operator)
            out[row] = result.reshape(-1).to(dtype)
    return out


def read(cache: LayerCache, table: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """K and V of the positions `low` to `high`, float64 [kv_heads, positions, head_dim]."""
    block_size = cache.values.shape[3]
    at = torch.arange(low, high, device=table.device)
    blocks, offsets = table[at // block_size].long(), at % block_size
    both = cache.values[blocks, :, :, offsets].double()
    if cache.scales is not None:
        both *= cache.scales[blocks, :, :, offsets].double()[..., None]
    keys, values = both.permute(1, 2, 0, 3).contiguous()
    return keys, values


def attend(query: Tensor, keys: Tensor, values: Tensor, operator: op.PagedAttention) -> Tensor:
    """Attention of the heads [kv_heads, heads, head_dim] of a row to all of some positions."""
    scores = query @ keys.transpose(1, 2) * operator.scale
    if operator.soft_cap is not None:
        scores = operator.soft_cap * torch.tanh(scores / operator.soft_cap)
    return torch.softmax(scores, dim=2) @ values

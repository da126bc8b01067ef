"""The paged cache: rotating and writing the K of a step, and copying blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.backends.torch.kernels import LayerCache, StepArrays, query_dtype
from octavo.backends.torch.plain.rows import to_codes


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    arrays: StepArrays,
    cache: LayerCache,
    factors: Tensor | None,
) -> Tensor:
    """See Kernels.rope_write."""
    kv_heads, head_dim = cache.values.shape[2], cache.values.shape[4]
    queries, keys, values = (x.float().unflatten(1, (-1, head_dim)) for x in (q, k, v))
    if table is not None:
        angles = table[arrays.positions.long()][:, None]
        queries, keys = _rotate(queries, angles), _rotate(keys, angles)
    if factors is not None:
        queries = queries * factors.repeat_interleave(queries.shape[1] // kv_heads, dim=0)
        keys = keys * (1 / factors)
    for kind, x in enumerate((keys, values)):
        _write(x, kind, arrays.slots.long(), cache)
    return queries.flatten(1).to(query_dtype(q.dtype, cache.values.dtype)).contiguous()


def copy_blocks(pool: Tensor, pairs: Tensor) -> None:
    """See Kernels.copy_blocks."""
    source, destination = pairs.long().unbind(1)
    pool[:, destination] = pool[:, source]


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotate [T, heads, D] by the table's rows [T, 1, D]."""
    first, second = heads.chunk(2, dim=2)
    cos, sin = angles.chunk(2, dim=2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2)


def _write(heads: Tensor, kind: int, slots: Tensor, cache: LayerCache) -> None:
    """Keep K (kind 0) or V (1), [T, kv_heads, D], at its slots."""
    kept = slots >= 0
    blocks, offsets = slots[kept] // cache.values.shape[3], slots[kept] % cache.values.shape[3]
    if cache.scales is None:
        cache.values[blocks, kind, :, offsets] = heads[kept].to(cache.values.dtype)
        return
    codes, scales = to_codes(heads[kept], cache.values.dtype)
    # As bytes: not every device of torch has indexed writes of float8.
    cache.values.view(torch.uint8)[blocks, kind, :, offsets] = codes.view(torch.uint8)
    cache.scales[blocks, kind, :, offsets] = scales

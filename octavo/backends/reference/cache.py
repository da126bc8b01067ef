"""The paged KV cache of the reference backend: one numpy array a layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.graph.batch import Float32, Int32
from octavo.graph.trace import CacheGroup


class PagedCache:
    """K and V of the layers of one cache group; every slot reads as zero until it is written."""

    def __init__(
        self, group: CacheGroup, num_blocks: int, block_size: int, dtype: type[np.floating]
    ) -> None:
        """Make the arrays of all layers."""
        shape = (2, num_blocks * block_size, group.num_kv_heads, group.head_dim)
        self.num_slots = num_blocks * block_size
        self._block_size = block_size
        self._layers: dict[int, NDArray[np.floating]] = {
            layer: np.zeros(shape, dtype) for layer in group.layers
        }

    def write(self, layer: int, slots: Int32, keys: Float32, values: Float32) -> None:
        """Round K and V [T, num_kv_heads * head_dim] of a step and keep them at their slots."""
        cache = self._layers[layer]
        cache[0, slots] = keys.reshape(-1, *cache.shape[2:])
        cache[1, slots] = values.reshape(-1, *cache.shape[2:])

    def read(self, layer: int, block_table: Int32, num_tokens: int) -> tuple[Float32, Float32]:
        """K and V of a sequence's first tokens, each [num_tokens, num_kv_heads, head_dim]."""
        positions = np.arange(num_tokens)
        slots = block_table[positions // self._block_size] * self._block_size
        slots = slots + positions % self._block_size
        keys, values = self._layers[layer][:, slots].astype(np.float32)
        return keys, values

"""The paged KV cache of the reference backend: numpy arrays, one a layer, for int8 two."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from octavo.backends.reference.operators import round_to_int8
from octavo.graph.batch import Float32, Int32
from octavo.graph.trace import CacheDtype, CacheGroup

_DTYPES = {"fp16": np.float16, "int8": np.int8, "fp32": np.float32}


class PagedCache:
    """K and V of the layers of one cache group; every slot reads as zero until it is written."""

    def __init__(
        self, group: CacheGroup, num_blocks: int, block_size: int, dtype: CacheDtype
    ) -> None:
        """Make the arrays of all layers."""
        shape = (2, num_blocks * block_size, group.num_kv_heads, group.head_dim)
        self.num_slots = num_blocks * block_size
        self._block_size = block_size
        self._layers: dict[int, NDArray[np.generic]] = {
            layer: np.zeros(shape, _DTYPES[dtype]) for layer in group.layers
        }
        self._scales: dict[int, Float32] = {}
        if dtype == "int8":
            self._scales = {layer: np.zeros((*shape[:-1], 1), np.float32) for layer in group.layers}

    def copy_blocks(self, pairs: Int32) -> None:
        """Copy whole blocks, one (source, destination) after another."""
        for pieces in self._pieces():
            for source, destination in pairs:
                pieces[:, destination] = pieces[:, source]

    def read_blocks(self, ids: Int32) -> NDArray[np.uint8]:
        """The bytes of whole blocks, [B, block_bytes]."""
        taken = [
            np.moveaxis(pieces[:, ids], 1, 0).reshape(len(ids), 2 * pieces.shape[2])
            for pieces in self._pieces()
        ]
        return np.concatenate(taken, axis=1)

    def write_blocks(self, ids: Int32, data: NDArray[np.uint8]) -> None:
        """Give blocks the bytes that were read."""
        start = 0
        for pieces in self._pieces():
            size = pieces.shape[2]
            pieces[:, ids] = np.moveaxis(
                data[:, start : start + 2 * size].reshape(len(ids), 2, size), 1, 0
            )
            start += 2 * size

    def _pieces(self) -> Iterator[NDArray[np.uint8]]:
        """Views [2, blocks, bytes] of everything that belongs to the blocks."""
        for array in (*self._layers.values(), *self._scales.values()):
            num_blocks = self.num_slots // self._block_size
            yield array.reshape(2, num_blocks, -1).view(np.uint8)

    def write(self, layer: int, slots: Int32, keys: Float32, values: Float32) -> None:
        """Round K and V [T, num_kv_heads * head_dim] of a step and keep them at their slots."""
        cache = self._layers[layer]
        for number, x in enumerate((keys, values)):
            if layer in self._scales:
                codes, scales = round_to_int8(x, cache.shape[3])
                # A NaN is no code; the scale beside it is NaN or infinite.
                cache[number, slots] = np.nan_to_num(codes).transpose(1, 0, 2)
                self._scales[layer][number, slots] = scales.transpose(1, 0, 2)
            else:
                cache[number, slots] = x.reshape(-1, *cache.shape[2:])

    def read(self, layer: int, block_table: Int32, num_tokens: int) -> tuple[Float32, Float32]:
        """K and V of a sequence's first tokens, each [num_tokens, num_kv_heads, head_dim]."""
        positions = np.arange(num_tokens)
        slots = block_table[positions // self._block_size] * self._block_size
        slots = slots + positions % self._block_size
        both = self._layers[layer][:, slots].astype(np.float32)
        if layer in self._scales:
            both *= self._scales[layer][:, slots]
        keys, values = both
        return keys, values

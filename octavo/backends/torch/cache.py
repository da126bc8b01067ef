"""The KV pool of a Program: one piece of memory in which a block of a layer is one run of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from octavo.backends.torch.kernels import LayerCache
from octavo.errors import ConfigError
from octavo.graph.trace import CacheDtype, CacheGroup

DTYPES: dict[CacheDtype, torch.dtype] = {
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32,
}
_CODES = (torch.int8, torch.float8_e4m3fn)
_SCALE_BYTES = 4
_WORD = torch.int64
"""Blocks are moved in these: the bytes of a layer's block are a multiple of its 8 slots or more."""


def independent(pairs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Copies (source, destination), one after another, as lists whose copies may run at once."""
    together: list[tuple[int, int]] = []
    sources: set[int] = set()
    destinations: set[int] = set()
    for source, destination in pairs:
        if source in destinations or destination in sources | destinations:
            yield together
            together, sources, destinations = [], set(), set()
        together.append((source, destination))
        sources.add(source)
        destinations.add(destination)
    if together:
        yield together


class KVCache:
    """K and V of all layers of a cache group; every slot reads as zero until it is written.

    A block is the values of K, then of V, then their scales if they are codes.

    Attributes:
        pool: uint8 [layers, num_blocks, bytes].
        layers: the views of it, by layer.
    """

    def __init__(
        self, group: CacheGroup, block_size: int, dtype: CacheDtype, device: torch.device
    ) -> None:
        """Plan the cache; `allocate` makes it."""
        self._group = group
        self._device = device
        self._dtype = DTYPES[dtype]
        self._shape = (2, group.num_kv_heads, block_size, group.head_dim)
        num_values = 2 * group.num_kv_heads * block_size * group.head_dim
        self._value_bytes = num_values * self._dtype.itemsize
        scales = 2 * group.num_kv_heads * block_size if self._dtype in _CODES else 0
        self._block_bytes = self._value_bytes + scales * _SCALE_BYTES
        self.pool = torch.empty((len(group.layers), 0, self._block_bytes), dtype=torch.uint8)
        self.layers: dict[int, LayerCache] = {}

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return len(self._group.layers) * int(self._block_bytes)

    @property
    def num_blocks(self) -> int:
        """How many there are."""
        return int(self.pool.shape[1])

    def allocate(self, num_blocks: int) -> None:
        """Make the pool.

        Raises:
            ConfigError: the device has no room for it.
        """
        shape = (len(self._group.layers), num_blocks, self._block_bytes)
        try:
            self.pool = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"the device has no room for a KV cache of {num_blocks * self.block_bytes:,} "
                "bytes: lower --memory"
            ) from None
        for place, layer in enumerate(self._group.layers):
            self.layers[layer] = self._views(self.pool[place])

    def release(self) -> None:
        """Free the pool."""
        self.layers.clear()
        self.pool = self.pool[:, :0].clone()

    def _views(self, blocks: Tensor) -> LayerCache:
        values = blocks[:, : self._value_bytes].view(self._dtype)
        scales = None
        if self._block_bytes > self._value_bytes:
            scales = blocks[:, self._value_bytes :].view(torch.float32)
            scales = scales.unflatten(1, self._shape[:-1])
        return LayerCache(values.unflatten(1, self._shape), scales)

    def gather(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """The content of blocks [B], layer after layer: uint8 [B, block_bytes]."""
        if out is None:
            shape = (len(ids), self.block_bytes)
            out = torch.empty(shape, dtype=torch.uint8, device=self._device)
        words, rows = self._words(ids)
        torch.index_select(words, 0, rows, out=out.view(_WORD).view(-1, words.shape[1]))
        return out

    def scatter(self, ids: Tensor, data: Tensor) -> None:
        """Give blocks [B] a content as `gather` returns it."""
        words, rows = self._words(ids)
        words.index_copy_(0, rows, data.view(_WORD).view(-1, words.shape[1]))

    def _words(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The pool as rows of words, and which of them make up blocks, block after block."""
        num_layers, num_blocks, _ = self.pool.shape
        starts = torch.arange(num_layers, device=self._device) * num_blocks
        return self.pool.view(_WORD).flatten(0, 1), (ids[:, None] + starts).flatten()

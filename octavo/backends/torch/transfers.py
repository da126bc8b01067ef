"""Whole KV blocks on their way between the pool and the host's memory, beside the steps.

Reading gathers blocks into a buffer of the device on the stream that computes, so that it sees them
before a later step overwrites them; a stream of its own copies the buffer to the host meanwhile.
Two buffers of bounded size take turns: one is filled again once its copy is done, for which the
device waits, never the host. Writing is queued on the stream that computes: copies to the device,
then a scatter, before the step that is begun next.

So whatever is read into a place of the host's memory comes after what was written from it before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.backends.program import Bytes, no_seconds
from octavo.backends.torch.arrays import put_ids
from octavo.backends.torch.cache import KVCache
from octavo.graph.batch import Int32

CHUNK_BYTES = 64 << 20
"""Of one buffer."""
DEVICE_BYTES = 3 * CHUNK_BYTES
"""What transfers take of the device: two buffers to read, and one while something is written."""


@dataclass(frozen=True, slots=True)
class PendingRows:
    """See backends.program.PendingBlocks."""

    rows: Sequence[Bytes]
    event: torch.cuda.Event | None

    def is_done(self) -> bool:
        """Whether they are there."""
        return self.event is None or bool(self.event.query())

    def result(self) -> Sequence[Bytes]:
        """Wait for them."""
        if self.event is not None:
            self.event.synchronize()
        return self.rows


def host_memory(num_bytes: int, device: torch.device) -> Bytes:
    """Memory that the device copies from and to by itself.

    NOTE: torch rounds its size up to a power of two.

    Raises:
        MemoryError: there is no more.
    """
    try:
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    except RuntimeError as error:
        raise MemoryError(f"{num_bytes:,} bytes: {error}") from None
    array: Bytes = memory.numpy()
    return array


class Transfers:
    """The transfers of one pool."""

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        """Serve `cache`; buffers are made when they are needed."""
        self._cache = cache
        self._device = device
        self._chunk = max(1, CHUNK_BYTES // cache.block_bytes)
        self._buffers: list[Tensor] = []
        self._is_free: list[torch.cuda.Event] = []
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, ids: Int32, out: Sequence[Bytes] | None) -> PendingRows:
        """Begin to read blocks, whose ids lie in the pool."""
        block_bytes = self._cache.block_bytes
        if out is None:
            memory = host_memory(len(ids) * block_bytes, self._device)
            out = list(memory.reshape(len(ids), block_bytes))
        places = [torch.from_numpy(row) for row in out]
        there = put_ids(ids, self._device)
        event = None
        for start in range(0, len(ids), self._chunk):
            end = min(start + self._chunk, len(ids))
            event = self._read_chunk(there[start:end], places[start:end])
        return PendingRows(out, event)

    def _read_chunk(self, ids: Tensor, places: Sequence[Tensor]) -> torch.cuda.Event | None:
        if self._stream is None:
            for place, row in zip(places, self._cache.gather(ids), strict=True):
                place.copy_(row)
            return None
        if not self._buffers:
            self._make_buffers()
        self._turn = 1 - self._turn
        buffer, is_free = self._buffers[self._turn][: len(ids)], self._is_free[self._turn]
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(is_free)
        self._cache.gather(ids, buffer)
        is_filled = torch.cuda.Event()
        is_filled.record(computing)
        self._stream.wait_event(is_filled)
        with torch.cuda.stream(self._stream):
            for place, row in zip(places, buffer, strict=True):
                place.copy_(row, non_blocking=True)
        done = torch.cuda.Event()
        done.record(self._stream)
        self._is_free[self._turn] = done
        return done

    def _make_buffers(self) -> None:
        shape = (self._chunk, self._cache.block_bytes)
        self._buffers = [
            torch.empty(shape, dtype=torch.uint8, device=self._device) for _ in range(2)
        ]
        # An event that was never recorded is waited for by nobody.
        self._is_free = [torch.cuda.Event(), torch.cuda.Event()]

    def write(self, ids: Int32, data: Sequence[Bytes]) -> Callable[[], float]:
        """Queue the content of blocks, whose ids lie in the pool; return what tells its seconds."""
        there = put_ids(ids, self._device)
        if self._stream is None:
            self._cache.scatter(there, torch.from_numpy(np.ascontiguousarray(data)))
            return no_seconds
        computing = torch.cuda.current_stream(self._device)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record(computing)
        for start in range(0, len(ids), self._chunk):
            end = min(start + self._chunk, len(ids))
            self._write_chunk(there[start:end], data[start:end])
        ended.record(computing)

        def seconds() -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1000

        return seconds

    def _write_chunk(self, ids: Tensor, data: Sequence[Bytes]) -> None:
        shape = (len(data), self._cache.block_bytes)
        rows = [torch.from_numpy(row) for row in data]
        if not all(row.is_pinned() for row in rows):
            # The host would wait for the device. Torch keeps this until the device has copied it.
            is_gpu = self._device.type == "cuda"
            pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=is_gpu)
            np.stack(data, out=pinned.numpy())
            self._cache.scatter(ids, pinned.to(self._device, non_blocking=True))
            return
        there = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for place, row in zip(there, rows, strict=True):
            place.copy_(row, non_blocking=True)
        self._cache.scatter(ids, there)

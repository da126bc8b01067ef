"""Arrays of the host on their way to a device: weights while a model loads.

A GPU copies from pinned memory as fast as its bus is, and by itself. So arrays go through two
pinned buffers in turn, and one is filled while the other is copied. Torch's CPU device gets a copy.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Of one buffer."""


class Uploads:
    """What brings arrays to one device.

    Attributes:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        """Buffers are made when they are needed."""
        self.device = device
        self._buffers: list[Tensor] = []
        self._are_free: list[torch.cuda.Event] = []
        self._turn = 0

    def put(self, data: NDArray[np.generic]) -> Tensor:
        """A copy: what is mapped may be read-only, unaligned and strided. uint16 becomes int16."""
        if data.dtype == np.uint16:
            data = data.view(np.int16)
        if self.device.type == "cuda" and data[:1].nbytes <= CHUNK_BYTES:
            return self._put_in_turns(data)
        copy = np.empty(data.shape, data.dtype)
        copy[...] = data
        return torch.from_numpy(copy).to(self.device)

    def _put_in_turns(self, data: NDArray[np.generic]) -> Tensor:
        if not self._buffers:
            self._make_buffers()
        dtype = torch.from_numpy(np.empty(0, data.dtype)).dtype
        there = torch.empty(data.shape, dtype=dtype, device=self.device)
        step = CHUNK_BYTES // max(1, data[:1].nbytes)
        for start in range(0, len(data), step):
            rows = data[start : start + step]
            self._turn = 1 - self._turn
            is_free = self._are_free[self._turn]
            is_free.synchronize()
            host = self._buffers[self._turn][: rows.nbytes].view(dtype).view(rows.shape)
            host.numpy()[...] = rows
            there[start : start + step].copy_(host, non_blocking=True)
            is_free.record()
        return there

    def _make_buffers(self) -> None:
        is_gpu = self.device.type == "cuda"
        for _ in range(2):
            self._buffers.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=is_gpu))
            # An event that was never recorded is waited for by nobody.
            self._are_free.append(torch.cuda.Event())

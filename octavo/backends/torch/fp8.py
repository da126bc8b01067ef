"""FP8 weights of a file on the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.backends.torch.kernels import QuantizedWeight
from octavo.backends.torch.weights import BLOCK
from octavo.graph.tensors import BlockFloatTensor

FIRST_CAPABILITY = (8, 9)
"""The first compute capability of NVIDIA that multiplies e4m3."""


def has_fp8(device: torch.device) -> bool:
    """Whether products of e4m3 codes run there; AMD's first FP8 is another format."""
    if device.type == "cpu":
        return True
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    return torch.version.hip is None and capability >= FIRST_CAPABILITY


def scales_of(tensor: BlockFloatTensor) -> tuple[int, int] | None:
    """The shape of its scales as products read them; None if they are of other blocks."""
    rows, columns = tensor.shape
    if tensor.block == (BLOCK, BLOCK):
        return tensor.scales.shape[0], tensor.scales.shape[1]
    if tensor.block[1] >= columns and (tensor.block[0] == 1 or tensor.block[0] >= rows):
        return (rows, 1) if tensor.block[0] == 1 else (1, 1)
    return None


def bring_fp8(tensor: BlockFloatTensor, device: torch.device) -> QuantizedWeight:
    """The weight on the device, bit for bit; `scales_of` must know its scales.

    Inputs are rounded with scales of their own, token by token or group by group, which loses less
    than a static scale (`BlockFloatTensor.input_scale`).
    """
    shape = scales_of(tensor)
    assert shape is not None
    codes = _bring(tensor.codes, device).view(torch.float8_e4m3fn)
    return QuantizedWeight(codes, _bring(tensor.scales, device).float().reshape(shape))


def _bring(data: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy: what is mapped may be read-only or strided."""
    return torch.from_numpy(np.array(data, order="C")).to(device)

"""Part A: stored weights packed on the device, beside those packed on the CPU, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from octavo.backends.torch import weights
from octavo.backends.torch.uploads import Uploads
from octavo.graph.tensors import GroupedTensor
from octavo.weights.formats.layout import BlockLayout
from octavo.weights.formats.registry import BLOCKS
from parts.check import BF16, F32, Checks, unlike
from parts.machine import Setup
from parts.record import Recorder

ROWS, PER_ROW = 67, 3


def run(setup: Setup, recorder: Recorder) -> None:
    """Every format of grouped integers in a GGUF file, and rounding to codes."""
    checks = Checks(setup, recorder, "Weights")
    for name, layout in BLOCKS.items():
        tensor = tensor_of(layout)
        checks.add(f"pack_grouped {name}", lambda t=tensor: packed(setup, t))
        checks.add(f"dense {name}", lambda t=tensor: dense(setup, t))
    modes: tuple[weights.WeightMode, ...] = ("int8 row", "fp8 row", "fp8 block")
    for mode in modes:
        checks.add(f"quantize_dense {mode}", lambda m=mode: rounded(setup, m))


def tensor_of(layout: BlockLayout) -> GroupedTensor:
    """Random bytes of a file's format, with scales of ordinary size."""
    rng = np.random.default_rng(8)
    data = rng.integers(0, 256, (ROWS, PER_ROW, layout.block_bytes), np.uint8)
    for halves in (layout.scales, layout.minimums):
        if halves is not None:
            values = rng.normal(0, 1, (ROWS, PER_ROW, 1)).astype("<f2")
            data[:, :, halves.start : halves.start + 2] = values.view(np.uint8)
    return layout.read(data.reshape(-1), (ROWS, PER_ROW * layout.block_len))


def packed(setup: Setup, tensor: GroupedTensor) -> float:
    """Words, scales and factors; then what they mean."""
    uploads = Uploads(setup.device), Uploads(torch.device("cpu"))
    ours, theirs = (weights.pack_grouped(tensor, to) for to in uploads)
    names = ("codes", "scales", "factors")
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in names]
    pairs.append((weights.unpack_grouped(ours), weights.unpack_grouped(theirs)))
    return all_unlike(pairs)


def dense(setup: Setup, tensor: GroupedTensor) -> float:
    """In floating point, which float32 holds exactly as numpy computes it."""
    exact = torch.from_numpy(tensor.dequantize())
    uploads = Uploads(setup.device)
    pairs = [(weights.dense(tensor, dtype, uploads), exact.to(dtype)) for dtype in (F32, BF16)]
    return all_unlike(pairs)


def rounded(setup: Setup, mode: weights.WeightMode) -> float:
    """Codes and scales of a dense matrix."""
    matrix = torch.randn((300, 400), generator=torch.Generator().manual_seed(9))
    ours = weights.quantize_dense(matrix.to(setup.device), mode)
    theirs = weights.quantize_dense(matrix, mode)
    return all_unlike([(ours.codes, theirs.codes), (ours.scales, theirs.scales)])


def all_unlike(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of the device and of the CPU."""
    return max(unlike(ours.cpu(), theirs) for ours, theirs in pairs)

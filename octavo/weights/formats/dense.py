"""Floating-point tensors: F32, F16 and BF16, views of the file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from octavo.graph.tensors import DenseDtype, DenseTensor

DENSE: Mapping[str, tuple[DenseDtype, np.dtype[np.generic]]] = {
    "F32": ("f32", np.dtype("<f4")),
    "F16": ("f16", np.dtype("<f2")),
    "BF16": ("bf16", np.dtype("<u2")),
}


def read_dense(name: str, data: NDArray[np.uint8], shape: tuple[int, ...]) -> DenseTensor:
    """See the bytes of a tensor of the format `name` as its stored form."""
    dtype, stored = DENSE[name]
    return DenseTensor(data.view(stored).reshape(shape), dtype)

"""Random weights in the block formats of GGUF, made as bytes: quick, and of ordinary size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.weights.formats.registry import BLOCKS

HALVES = {
    "Q4_0": {0: 0.0045},
    "Q4_1": {0: 0.0045, 2: -0.034},
    "Q5_0": {0: 0.0022},
    "Q5_1": {0: 0.0022, 2: -0.034},
    "Q8_0": {0: 0.00028},
    "Q2_K": {80: 0.0024, 82: 0.0036},
    "Q3_K": {108: 0.00048},
    "Q4_K": {0: 0.0001, 2: 0.00075},
    "Q5_K": {0: 0.00005, 2: 0.00077},
    "Q6_K": {208: 1.6e-5},
}
"""Where a block's float16 factors stand, and values with which random codes have a standard
deviation near 0.02 and a mean near 0, as weights of a model have."""


def random_blocks(rng: np.random.Generator, type_name: str, weights: int) -> NDArray[np.uint8]:
    """The bytes of this many weights, [blocks, block_bytes]."""
    layout = BLOCKS[type_name]
    count = weights // layout.block_len
    raw = np.frombuffer(rng.bytes(count * layout.block_bytes), np.uint8)
    blocks = raw.reshape(count, layout.block_bytes).copy()
    for at, value in HALVES[type_name].items():
        blocks[:, at : at + 2] = np.array([value], "<f2").view(np.uint8)
    return blocks


def random_matrix(
    rng: np.random.Generator, type_name: str, rows: int, columns: int
) -> StoredTensor:
    """A random weight [rows, columns] in its stored form; also "F32" and "BF16"."""
    if type_name in BLOCKS:
        data = random_blocks(rng, type_name, rows * columns).reshape(-1)
        return BLOCKS[type_name].read(data, (rows, columns))
    values = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    if type_name == "F32":
        return DenseTensor(values, "f32")
    assert type_name == "BF16"
    return DenseTensor((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16), "bf16")


def file_bytes(type_name: str, weights: int) -> int:
    """What this many weights take in a file."""
    if type_name in BLOCKS:
        return weights // BLOCKS[type_name].block_len * BLOCKS[type_name].block_bytes
    return weights * {"F32": 4, "BF16": 2}[type_name]

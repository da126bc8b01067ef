"""Which formats of tensors are supported: one line a family."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.graph.tensors import StoredTensor
from octavo.weights.formats.dense import DENSE, read_dense
from octavo.weights.formats.k_quants import K_QUANTS
from octavo.weights.formats.simple import SIMPLE
from octavo.weights.mapping import TensorInfo

BLOCKS = {layout.name: layout for layout in (*SIMPLE, *K_QUANTS)}

SUPPORTED = (*DENSE, *BLOCKS)


def check_format(info: TensorInfo) -> None:
    """Refuse a tensor that cannot be read.

    Raises:
        ModelFileError: its format is not supported.
    """
    if info.type not in SUPPORTED:
        raise ModelFileError(
            f"tensor {info.name} has the format {info.type}, which is not supported; take a file "
            f"that holds only {', '.join(SUPPORTED)}"
        )
    if info.type in BLOCKS and len(info.shape) != 2:
        raise ModelFileError(
            f"tensor {info.name} in the format {info.type} has {len(info.shape)} dimensions, "
            "only matrices are supported; take a file of another model"
        )


def read_tensor(
    info: TensorInfo, buffer: mmap.mmap, rows: NDArray[np.int64] | None = None
) -> StoredTensor:
    """See a tensor of a mapped file as its stored form; the file stays mapped while it lives.

    Args:
        info: its place, already checked against the file.
        buffer: the whole file.
        rows: another order of all its rows, which takes a copy; None for the file's.

    Raises:
        ModelFileError: its format is not supported.
    """
    check_format(info)
    data = np.frombuffer(buffer, np.uint8, info.nbytes, info.offset)
    if rows is not None:
        data = data.reshape(info.shape[0], -1)[rows].reshape(-1)
    if info.type in DENSE:
        return read_dense(info.type, data, info.shape)
    return BLOCKS[info.type].read(data, (info.shape[0], info.shape[1]))

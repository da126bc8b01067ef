"""A name for a model's weights that is the same wherever the same files lie.

Hashing every byte of a file takes seconds and gigabytes of reading; its size and time say nothing
on another machine. So the name is SHA-256 over every byte that is not a tensor's (names, shapes,
types, configuration) and over pieces of each tensor, spread evenly over its length, some two
thousand in all. Weights that were trained further or quantized in another way differ nearly
everywhere, hence in the pieces. A file in which somebody changed single bytes may keep its name:
this is no seal against tampering. Figures: docs/decisions/045-cache-isolation.md.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable
from hashlib import sha256

from octavo.weights.mapping import TensorInfo

PIECE_BYTES = 256
NUM_PIECES = 2048
"""Pieces of all tensors together; a model of more tensors has `MIN_PIECES` of each."""
MIN_PIECES = 2


def weights_digest(files: Iterable[tuple[mmap.mmap, Collection[TensorInfo]]], config: bytes) -> str:
    """The name of the weights in some mapped files, as hexadecimal digits.

    Args:
        files: each with its tensors, in an order that depends on the files' own contents or names.
        config: what lies beside them and changes what is computed.
    """
    parts = [(buffer, sorted(infos, key=_by_offset)) for buffer, infos in files]
    num_pieces = max(MIN_PIECES, NUM_PIECES // max(1, sum(len(infos) for _, infos in parts)))
    digest = sha256(b"octavo weights 1" + len(config).to_bytes(8, "little") + config)
    for buffer, infos in parts:
        head_bytes = infos[0].offset if infos else len(buffer)
        digest.update(head_bytes.to_bytes(8, "little"))
        digest.update(buffer[:head_bytes])
        for info in infos:
            end = info.offset + info.nbytes
            step = max(PIECE_BYTES, info.nbytes // num_pieces)
            for start in range(info.offset, end, step):
                digest.update(buffer[start : min(start + PIECE_BYTES, end)])
    return digest.hexdigest()


def _by_offset(info: TensorInfo) -> int:
    return info.offset

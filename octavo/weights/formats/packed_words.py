"""Weights of GPTQ and AWQ: small integers packed into 32-bit words, scales of float16.

Both keep w[n, k] = scale * (code - zero) with a scale and a zero point for every row n and group of
columns k, all transposed: K comes first. They differ in where a word's codes belong:

- GPTQ, qweight [K * bits / 32, N]: a word holds the codes of columns in sequence, the first in the
  lowest bits. qzeros [groups, N * bits / 32]: so for rows. Its first convention stores zero - 1,
  and the borrow of a zero of 0 runs into the next field: adding 1 to every field undoes both.
- AWQ, qweight [K, N / 8]: a word holds the codes of eight rows, in the order 0, 2, 4, 6, 1, 3, 5,
  7. qzeros [groups, N / 8] alike.

What is made counts codes from the middle of their range, so that a symmetric weight needs no
minimums; else minimum = scale * (middle - zero), kept as these two numbers and so exact. A backend
that rounds it to float16 errs by less than 1/256 of the step between two codes of 4 bits, 1/16 of
that of 8 bits.

Sources: the packing of AutoGPTQ, GPTQModel and AutoAWQ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.graph.tensors import BlockScales, Codes, GroupedTensor, GroupScales, Plane

Words = NDArray[np.uint32]

_BLOCK = 32
"""Columns of a plane's block."""

_AWQ_PAIRS = ((0, 2), (4, 6), (1, 3), (5, 7))
"""Of the eight rows of a word, those in the low and the high half of each of its bytes."""


def read_gptq(
    qweight: Words, qzeros: Words, scales: NDArray[np.float32], *, stores_less_1: bool
) -> GroupedTensor:
    """The stored form of a GPTQ weight.

    Args:
        qweight: as in the file.
        qzeros: as in the file, of a shape that fits.
        scales: [groups, N].
        stores_less_1: whether qzeros hold zero - 1.
    """
    bits = 32 * qzeros.shape[1] // scales.shape[1]
    if stores_less_1:
        qzeros = qzeros + np.uint32(0xFFFFFFFF // (2**bits - 1))
    codes = _fields(np.ascontiguousarray(qweight.T), bits)
    return _grouped(codes, _fields(qzeros, bits), scales, bits, "GPTQ")


def read_awq(qweight: Words, qzeros: Words, scales: NDArray[np.float32]) -> GroupedTensor:
    """The stored form of an AWQ weight, of the same arguments."""
    return _grouped(
        _interleaved_rows(qweight), _interleaved_rows(qzeros).T, scales, bits=4, name="AWQ"
    )


def _fields(words: Words, bits: int) -> NDArray[np.uint8]:
    """[rows, words] → [rows, fields], the lowest bits of a word first; bits are 4 or 8."""
    small = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return small
    fields = np.empty((len(small), 2 * small.shape[1]), np.uint8)
    np.bitwise_and(small, 15, out=fields[:, 0::2])
    np.right_shift(small, 4, out=fields[:, 1::2])
    return fields


def _interleaved_rows(words: Words) -> NDArray[np.uint8]:
    """[K, words] of AWQ → [8 * words, K]."""
    pairs = np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint8).T)
    pairs = pairs.reshape(-1, 4, len(words))
    rows = np.empty((len(pairs), 8, len(words)), np.uint8)
    for byte, (low, high) in enumerate(_AWQ_PAIRS):
        np.bitwise_and(pairs[:, byte], 15, out=rows[:, low])
        np.right_shift(pairs[:, byte], 4, out=rows[:, high])
    return rows.reshape(-1, len(words))


def _grouped(
    codes: NDArray[np.uint8],
    zeros: NDArray[np.uint8],
    scales: NDArray[np.float32],
    bits: int,
    name: str,
) -> GroupedTensor:
    """Of codes [N, K], zeros and scales [groups, N]."""
    columns = codes.shape[1]
    middle = 1 << bits - 1
    halves = np.ascontiguousarray(scales.T).astype(np.float16)
    minimums = None
    if (zeros != middle).any():
        factors = Codes((_bytes(np.ascontiguousarray(zeros.T), bits, 1),), middle)
        minimums = BlockScales(halves, factors, sign=-1)
    return GroupedTensor(
        codes=Codes((_bytes(codes, bits, min(_BLOCK, columns)),), middle),
        bits=bits,
        group=columns // len(scales),
        scales=GroupScales(halves),
        minimums=minimums,
        format=name,
    )


def _bytes(values: NDArray[np.uint8], bits: int, block: int) -> Plane:
    """[rows, columns], a byte each, as a plane of blocks of so many columns."""
    byte_of = np.arange(block, dtype=np.uint16)
    shift_of = np.zeros(block, np.uint8)
    return Plane(values.reshape(len(values), -1, block), byte_of, shift_of, bits)

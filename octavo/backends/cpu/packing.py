"""Hands stored weights to the native side, which repacks them: addresses and strides of views.

The arrays are read while `add_*` runs and not afterwards, so the caller may unmap the file when a
Program is compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.backends.cpu import _native
from octavo.errors import KernelError
from octavo.graph.tensors import (
    BlockFloatTensor,
    Codes,
    DenseTensor,
    GroupedTensor,
    GroupScales,
    Plane,
    Scales,
    StoredTensor,
)

BLOCK_COLUMNS = 256
"""Columns a block of two-level scales, in the kernels' layout (csrc/kernels.h)."""

_DENSE_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def known_form(weight: StoredTensor) -> StoredTensor:
    """The weight in a form that the kernels have: FP8 becomes dense, large groups small ones."""
    if isinstance(weight, BlockFloatTensor):
        return weight.to_half()
    if isinstance(weight, GroupedTensor):
        return weight.in_small_groups()
    return weight


def add_matrix(program: _native.Program, name: str, weight: StoredTensor) -> int:
    """Pack a matrix in a `known_form`; returns its native number.

    Raises:
        KernelError: the stored form is outside this backend's contract; the message names the
            weight.
    """
    try:
        if isinstance(weight, GroupedTensor):
            return _add_grouped(program, weight)
        assert isinstance(weight, DenseTensor)
        return _add_dense(program, weight)
    except ValueError as error:
        raise KernelError(f"{name}: {error}") from None


def add_vector(program: _native.Program, name: str, weight: StoredTensor) -> int:
    """Copy a vector (a norm's weight, a bias) in float32; returns its native number."""
    values = weight.dequantize()
    if values.ndim != 1:
        raise KernelError(f"{name}: expected one dimension, not {values.ndim}")
    return program.add_vector(np.ascontiguousarray(values))


def _add_grouped(program: _native.Program, weight: GroupedTensor) -> int:
    rows, columns = weight.shape
    if weight.group not in (16, 32) or not 1 <= weight.bits <= 8:
        raise ValueError(f"groups of {weight.group} with {weight.bits} bits are not supported")
    scales, minimums = weight.scales, weight.minimums
    if minimums is not None and (
        type(minimums) is not type(scales) or minimums.shape != scales.shape
    ):
        raise ValueError("scales and minimums differ in form")
    return program.add_grouped(
        (rows, columns),
        (weight.group, weight.bits),
        _codes(weight.codes, rows, columns),
        _scales(scales, weight.group),
        None if minimums is None else _scales(minimums, weight.group),
    )


def _codes(codes: Codes, rows: int, columns: int) -> _native.CodesTuple:
    return [_plane(plane, rows, columns) for plane in codes.planes], codes.zero


def _plane(plane: Plane, rows: int, columns: int) -> _native.PlaneTuple:
    data = plane.data
    block = len(plane.byte_of)
    if data.dtype != np.uint8 or data.ndim != 3 or data.shape[:2] != (rows, columns // block):
        raise ValueError(f"a plane of shape {data.shape} does not fit {rows} rows of {columns}")
    if len(plane.shift_of) != block or int(plane.byte_of.max()) >= data.shape[2]:
        raise ValueError("a plane's tables point outside its blocks")
    byte_of = np.ascontiguousarray(plane.byte_of, np.uint16)
    shift_of = np.ascontiguousarray(plane.shift_of, np.uint8)
    strides = (data.strides[0], data.strides[1], data.strides[2])
    return _address(data), strides, byte_of, shift_of, plane.bits, plane.lift, plane.flip


def _scales(scales: Scales, group: int) -> _native.ScaleTuple:
    halves = scales.halves if isinstance(scales, GroupScales) else scales.d
    if halves.ndim != 2 or halves.dtype != np.float16:
        raise ValueError("scales must be float16 of two dimensions")
    strides = (halves.strides[0], halves.strides[1])
    if isinstance(scales, GroupScales):
        return _address(halves), strides, ([], 0), False
    rows, groups = scales.shape
    if groups != halves.shape[1] * BLOCK_COLUMNS // group:
        raise ValueError(f"scales of two levels must have blocks of {BLOCK_COLUMNS} columns")
    return _address(halves), strides, _codes(scales.factors, rows, groups), scales.sign < 0


def _add_dense(program: _native.Program, weight: DenseTensor) -> int:
    data = weight.data
    if data.ndim != 2 or data.dtype != _DENSE_DTYPES[weight.dtype]:
        raise ValueError(f"expected two dimensions of {weight.dtype}, not {data.ndim}")
    if data.strides[1] != data.itemsize:
        data = np.ascontiguousarray(data)
    return program.add_dense(
        (data.shape[0], data.shape[1]), weight.dtype, _address(data), data.strides[0]
    )


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address

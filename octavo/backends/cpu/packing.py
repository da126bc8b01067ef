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
from octavo.graph.tensors import DenseTensor, GroupedTensor, Plane, StoredTensor

_Scales = NDArray[np.floating[Any]]

_DENSE_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def add_matrix(program: _native.Program, name: str, weight: StoredTensor) -> int:
    """Pack a matrix; returns its native number.

    Raises:
        KernelError: the stored form is outside this backend's contract; the message names the
            weight.
    """
    try:
        if isinstance(weight, GroupedTensor):
            return _add_grouped(program, weight)
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
    planes = [_plane(plane, rows, columns) for plane in weight.planes]
    keep = [_checked_scales(weight.scales)]
    if weight.minimums is not None:
        keep.append(_checked_scales(weight.minimums))
        if keep[1].shape != keep[0].shape:
            raise ValueError("scales and minimums differ in shape")
        if keep[1].dtype != keep[0].dtype:
            keep = [array.astype(np.float32) for array in keep]
    scales = [_scales(array) for array in keep]
    return program.add_grouped(
        (rows, columns),
        (weight.group, weight.bits, weight.zero),
        planes,
        scales[0],
        scales[1] if len(scales) == 2 else None,
    )


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


def _checked_scales(scales: _Scales) -> _Scales:
    if scales.ndim != 2 or scales.dtype not in (np.float16, np.float32):
        raise ValueError("scales must be float16 or float32 of two dimensions")
    return scales


def _scales(scales: _Scales) -> tuple[int, tuple[int, int], bool]:
    strides = (scales.strides[0], scales.strides[1])
    return _address(scales), strides, scales.dtype == np.float32


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

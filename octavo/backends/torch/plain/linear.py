"""Linear operators in torch alone: the weight is written out, then multiplied in float64.

Rows are multiplied in tiles of one shape, whatever their number, so that a row's sums do not depend
on the rows beside it; what little a library's order of sums could change is far below the rounding.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from octavo.backends.torch.kernels import (
    QUANTIZE_GROUP,
    GroupedWeight,
    Quantized,
    QuantizedWeight,
)
from octavo.backends.torch.weights import dequantize, unpack_grouped

_TILE = 16


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product x @ weight.T + bias; see Kernels."""
    return _product(x, weight, bias).to(x.dtype)


def grouped_linear(
    x: Tensor, weight: GroupedWeight, bias: Tensor | None, deterministic: bool
) -> Tensor:
    """The product with a grouped weight, in full precision; see Kernels."""
    del deterministic  # it always is
    return _product(x, unpack_grouped(weight), bias).to(x.dtype)


def quantized_linear(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    deterministic: bool,
) -> Tensor:
    """The product of two that are quantized; see Kernels."""
    del deterministic
    codes = x.codes.to(torch.float32)
    scales = x.scales
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(QUANTIZE_GROUP, 1)[:, : codes.shape[1]]
    return _product(codes.double() * scales.double(), dequantize(weight), bias).to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float64, rounded to float32."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    wide = weight.double().T
    for start in range(0, x.shape[0], _TILE):
        rows = x[start : start + _TILE].double()
        tile = torch.nn.functional.pad(rows, (0, 0, 0, _TILE - rows.shape[0]))
        sums = tile @ wide
        if bias is not None:
            sums = sums + bias.double()
        out[start : start + _TILE] = sums[: rows.shape[0]]
    return out


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Each row's product with the weight [N, K] of its expert; as in triton/grouped_matmul.py."""
    out = torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device)
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        out[start:stop] = matmul(x[start:stop], weight[expert], None)
    return out

"""activation(gate) * up of a gated feed-forward layer, and its rounding to codes in one pass.

Tiles as in quantize. Memory is the limit: 6 bytes a 16-bit feature, 5 where codes are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import Activation, Quantized, QuantizeMode
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.backends.torch.triton.quantize import Tile, empty_codes, given_scale, store_codes


@triton.jit
def gated_kernel(
    gate,
    up,
    out,
    scales,
    given,
    gate_stride,
    up_stride,
    FEATURES: tl.constexpr,
    GELU: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of a row. `out` takes codes where there are scales; `given` as of store_codes."""
    tiles: tl.constexpr = (FEATURES + GROUPS * WIDTH - 1) // (GROUPS * WIDTH)
    num_groups: tl.constexpr = 1 if given is not None else (FEATURES + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // tiles).to(tl.int64)
    group = (tl.program_id(0) % tiles) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = column < FEATURES
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=mask, other=0).to(tl.float32)
    # gelu(x) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x³).
    exponent = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU else x
    values = x / (1.0 + tl.exp(-exponent)) * factor
    out += row * FEATURES
    if scales is not None:
        scales += row * num_groups
        store_codes(values, out, scales, given, column, mask, group, num_groups)
    else:
        tl.store(out + column, values.to(out.dtype.element_ty), mask=mask)


def gated(
    gate: Tensor, up: Tensor, activation: Activation, mode: QuantizeMode | None
) -> Tensor | Quantized:
    """See Kernels.gated."""
    rows, features = gate.shape
    result = (
        torch.empty((rows, features), dtype=gate.dtype, device=gate.device)
        if mode is None
        else empty_codes(gate, mode)
    )
    out, scales = (result, None) if isinstance(result, Tensor) else result
    tile = Tile.of(features, mode)
    if rows:
        gated_kernel[(rows * tile.count(features),)](
            gate,
            up,
            out,
            scales,
            given_scale(mode),
            gate.stride(0),
            up.stride(0),
            FEATURES=features,
            GELU=activation == "gelu",
            GROUPS=tile.groups,
            WIDTH=tile.width,
            num_warps=tile.num_warps,
            **FP_FUSION,
        )
    return result

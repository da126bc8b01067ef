"""Norms, gated activations and the rounding of activations to codes.

Sums and functions are in float64: their order, which differs on the CPU with the shape and the
place of a row, is then lost in the one rounding that follows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.backends.torch.kernels import (
    QUANTIZE_GROUP,
    Activation,
    Normed,
    Quantized,
    QuantizeMode,
    StaticScale,
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, mode: QuantizeMode | None
) -> Normed:
    """See Kernels.rms_norm."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    heads = total.double().unflatten(1, (-1, len(weight)))
    mean = heads.square().mean(dim=2, keepdim=True)
    normed = (heads / (mean + eps).sqrt() * weight.double()).flatten(1)
    return Normed(total, _rounded(normed, x.dtype, mode))


def gated(
    gate: Tensor, up: Tensor, activation: Activation, mode: QuantizeMode | None
) -> Tensor | Quantized:
    """See Kernels.gated."""
    x = gate.double()
    exponent = x if activation == "silu" else math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
    return _rounded(x / (1 + torch.exp(-exponent)) * up.double(), gate.dtype, mode)


def quantize(x: Tensor, mode: QuantizeMode) -> Quantized:
    """See Kernels.quantize."""
    if isinstance(mode, StaticScale):
        scales = torch.full((x.shape[0], 1), mode.scale, dtype=torch.float32, device=x.device)
        scaled = x.float() * scales.reciprocal()
        return Quantized(scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scales)
    groups = x.float()[:, None]
    if mode == "fp8 group":
        padding = -x.shape[1] % QUANTIZE_GROUP
        padded = torch.nn.functional.pad(x.float(), (0, padding))
        groups = padded.unflatten(1, (-1, QUANTIZE_GROUP))
    codes, scales = to_codes(groups, torch.int8 if mode == "int8 token" else torch.float8_e4m3fn)
    return Quantized(codes.flatten(1)[:, : x.shape[1]].contiguous(), scales)


def to_codes(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round float32 [..., group] to codes of dtype with one scale a group, [...].

    Codes are 0 where the scale is NaN.
    """
    most, least = (127.0, 2.0**-120) if dtype == torch.int8 else (448.0, 2.0**-119)
    peak = groups.abs().amax(dim=-1)  # NaN if one is
    finite = peak < math.inf
    usual = finite & (peak >= least)
    zero = torch.zeros_like(peak)
    # Not most / peak, which torch makes a product with the rounded 1 / peak.
    factor = torch.where(usual, torch.full_like(peak, most) / peak, zero)
    scales = torch.where(usual, peak / most, torch.where(finite, zero, math.nan))
    codes = torch.where(usual[..., None], groups * factor[..., None], zero[..., None])
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


def _rounded(x: Tensor, dtype: torch.dtype, mode: QuantizeMode | None) -> Tensor | Quantized:
    return x.to(dtype) if mode is None else quantize(x, mode)

"""Writes quantized weights as their tools do, from codes that the tests choose, in torch.

Written from the formats' own descriptions (AutoGPTQ, GPTQModel, AutoAWQ, compressed-tensors,
DeepSeek-V3's weights), sharing nothing with the reader.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Integers:
    """A quantized weight before it is packed.

    Attributes:
        codes: int64 [N, K].
        zeros: int64 [N, groups].
        scales: float16 [N, groups].
        bits: of a code.
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    bits: int

    def dequantized(self) -> torch.Tensor:
        """scale * (code - zero) in float32: exact, having less than 24 bits."""
        times = self.codes.shape[1] // self.zeros.shape[1]
        zeros = self.zeros.repeat_interleave(times, 1)
        return self.scales.float().repeat_interleave(times, 1) * (self.codes - zeros)


def round_to_integers(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool = False
) -> Integers:
    """The nearest codes; group -1 is a whole row."""
    rows, columns = weight.shape
    grouped = weight.double().reshape(rows, -1, columns if group == -1 else group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    most = 2**bits - 1
    scales = ((high - low) / most).half()
    zeros = (-low / scales.double()).round().long().clamp(0, most)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    codes = (grouped / scales.double()[..., None]).round().long() + zeros[..., None]
    return Integers(codes.clamp(0, most).reshape(rows, columns), zeros, scales, bits)


def random_integers(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> Integers:
    """Every code and zero point, zeros of 0 and of the greatest code among them."""
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else columns // group
    return Integers(
        torch.randint(0, 2**bits, (rows, columns), generator=random),
        torch.randint(0, 2**bits, (rows, groups), generator=random),
        torch.rand((rows, groups), generator=random).half() / 8 + 0.001,
        bits,
    )


def _int32(words: torch.Tensor) -> torch.Tensor:
    """Unsigned words in int64 as the int32 of the same bits."""
    words = words & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _join(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Along the last axis: field i of a word is value order[i]."""
    count = 32 // bits
    words = torch.zeros((*values.shape[:-1], values.shape[-1] // count), dtype=torch.int64)
    for i in range(count):
        words |= values[..., (i if order is None else order[i]) :: count] << (bits * i)
    return words


def pack_gptq(module: str, weight: Integers, *, version: int = 1) -> Tensors:
    """qweight, qzeros, scales and a sorted g_idx."""
    qzeros = _join(weight.zeros.T, weight.bits)
    if version == 1:  # one less in every field, as one subtraction from the word
        qzeros = qzeros - sum(1 << bit for bit in range(0, 32, weight.bits))
    columns = weight.codes.shape[1]
    group = columns // weight.zeros.shape[1]
    return {
        f"{module}.qweight": _int32(_join(weight.codes, weight.bits).T.contiguous()),
        f"{module}.qzeros": _int32(qzeros),
        f"{module}.scales": weight.scales.T.contiguous(),
        f"{module}.g_idx": (torch.arange(columns) // group).to(torch.int32),
    }


def pack_awq(module: str, weight: Integers) -> Tensors:
    """qweight, qzeros and scales of the "gemm" version."""
    return {
        f"{module}.qweight": _int32(_join(weight.codes.T, 4, AWQ_ORDER)),
        f"{module}.qzeros": _int32(_join(weight.zeros.T, 4, AWQ_ORDER)),
        f"{module}.scales": weight.scales.T.contiguous(),
    }


def round_to_float8(
    weight: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales by blocks (the last ones cut), and codes * scales in float32."""
    (rows, columns), (height, width) = weight.shape, block
    grid = -(-rows // height), -(-columns // width)
    padded = torch.zeros(grid[0] * height, grid[1] * width)
    padded[:rows, :columns] = weight
    blocks = padded.reshape(grid[0], height, grid[1], width)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (codes.float() * scales[:, None, :, None]).reshape(padded.shape)
    return (
        codes.reshape(padded.shape)[:rows, :columns].contiguous(),
        scales,
        values[:rows, :columns],
    )

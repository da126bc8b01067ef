"""The angles of rotary position embedding, computed once a model in emulated float32.

inv_freq is the same to the last bit or the one before it as what transformers computes in float32
    tensors: a model's
angles at position 8,000 depend on that bit. Imports no numpy: declaring a model is cheap enough for
the HTTP process.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's rule: low frequencies are divided, high ones stay, others are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class FrequencyDivisors:
    """One divisor a frequency, as a GGUF stores llama3 scaling (tensor rope_freqs.weight)."""

    divisors: tuple[float, ...]


Scaling = LinearScaling | Llama3Scaling | FrequencyDivisors


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How a model turns positions into angles.

    Attributes:
        theta: the base; frequency i is theta ** (-2 i / head_dim).
        scaling: how the frequencies are stretched for long contexts, or None.
    """

    theta: float = 10000.0
    scaling: Scaling | None = None

    def inv_freq(self, head_dim: int) -> tuple[float, ...]:
        """The head_dim / 2 angles a position, each a float32 value; scaling is inside."""
        base = _f32(self.theta)
        plain = tuple(_f32(1.0 / _f32(base ** _f32(i / head_dim))) for i in range(0, head_dim, 2))
        match self.scaling:
            case None:
                return plain
            case LinearScaling(factor):
                return tuple(_f32(f / _f32(factor)) for f in plain)
            case Llama3Scaling():
                return tuple(_llama3(f, self.scaling) for f in plain)
            case FrequencyDivisors(divisors):
                return tuple(_f32(f / d) for f, d in zip(plain, divisors, strict=True))


def _f32(x: float) -> float:
    """The float32 nearest to x (infinity beyond the largest)."""
    if abs(x) > 3.4028235677973366e38:
        return math.copysign(math.inf, x)
    rounded: float = struct.unpack("<f", struct.pack("<f", x))[0]
    return rounded


def _llama3(freq: float, s: Llama3Scaling) -> float:
    """One frequency under Llama 3.1's rule, rounded to float32 after every operation."""
    # NOTE: `number / tensor` in torch is number * (1 / tensor), two roundings; so it is here.
    wavelength = _f32(_f32(2 * math.pi) * _f32(1.0 / freq))
    context = s.original_max_position_embeddings
    if wavelength < context / s.high_freq_factor:
        return freq
    if wavelength > context / s.low_freq_factor:
        return _f32(freq / _f32(s.factor))
    turns = _f32(_f32(context) * _f32(1.0 / wavelength))
    span = _f32(s.high_freq_factor - s.low_freq_factor)
    smooth = _f32(_f32(turns - _f32(s.low_freq_factor)) / span)
    stretched = _f32(_f32(_f32(1.0 - smooth) * freq) / _f32(s.factor))
    return _f32(stretched + _f32(smooth * freq))

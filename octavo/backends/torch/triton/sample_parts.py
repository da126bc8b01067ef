"""What the kernels of sampling share: order of tokens, noise, and which rows are filtered.

A token and how good it is are one int64, a pair: the float's bits in an order that integers have,
above the complement of the id. The greatest pair is the best token, and the lowest id of equals.
"""

from __future__ import annotations

import triton
import triton.language as tl

_C = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_LOW = tl.constexpr(0x7FFFFFFF)
NO_PAIR = tl.constexpr(-(2**63))
UNALIGNED = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "index",
    "position",
    "repetition",
    "presence",
    "frequency",
    "num_logprobs",
    "start",
    "ids",
    "values",
    "counts",
)
"""Arguments that may lie anywhere in one piece of memory: where must not compile kernels anew."""
INFINITE = tl.constexpr(0x7F800000)
"""The order of infinity; only NaN's is above it."""


@triton.jit
def order_of(values):
    """float32 → int32 in the same order; 0 and -0 are equal, NaN is greatest."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & _LOW)
    return tl.where(values != values, _LOW, order)


@triton.jit
def value_of(order):
    """The inverse of order_of."""
    return (order ^ ((order >> 31) & _LOW)).to(tl.float32, bitcast=True)


@triton.jit
def pairs_of(values, ids):
    """Values and ids as one, in the order of preference."""
    return (order_of(values).to(tl.int64) << 32) | (ids ^ _LOW).to(tl.int64)


@triton.jit
def id_of_pair(pair):
    """The id of a pair."""
    return (pair & _LOW).to(tl.int32) ^ _LOW


@triton.jit
def order_of_pair(pair):
    """The order of a pair's value."""
    return (pair >> 32).to(tl.int32)


@triton.jit
def mixed(z):
    """The finalizer of splitmix64; z is uint64."""
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def key_of_row(seed, index, position):
    """What a row's noise is a function of, beside the token."""
    start = mixed(seed.to(tl.uint64) + _C) ^ index.to(tl.uint64)
    return mixed(mixed(start) ^ (position.to(tl.uint64) + _C))


@triton.jit
def hash24(key, ids):
    """24 random bits a token."""
    return (mixed(key + (ids + 1).to(tl.uint64) * _C) >> 40).to(tl.int32)


@triton.jit
def noise(key, ids):
    """Gumbel noise as the reference has it, in float64, rounded once."""
    uniform = (hash24(key, ids).to(tl.float64) + 0.5) * 5.9604644775390625e-08
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def fast_noise(key, ids):
    """The same within 5e-6, in float32.

    A device's fast logarithm errs by 2**-22 absolutely near 1 and relatively elsewhere, so that of
    a u near 1 comes from the series of 1 - u.
    """
    bits = hash24(key, ids)
    uniform = (bits.to(tl.float32) + 0.5) * 5.9604644775390625e-08
    rest = ((0xFFFFFF - bits).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    series = rest * (1 + rest * (0.5 + rest * (0.33333334 + rest * (0.25 + rest * 0.2))))
    return -tl.log(tl.where(rest < 0.0625, series, -tl.log(uniform)))


@triton.jit
def is_filtered(temperature, top_k, top_p, min_p, vocab):
    """Whether a row may choose from less than all tokens."""
    is_less = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)
    return is_less & (temperature > 0)

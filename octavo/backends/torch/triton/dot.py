"""Tensor core products and rounding to 16 bits, with what Triton's interpreter needs to have right.

It multiplies bfloat16 as whole numbers, and cuts to it instead of rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, sums):
    """Sums + a @ b in float32, of 16-bit or float32 numbers."""
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Float32 numbers rounded to nearest even."""
    if IS_INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(DTYPE)

"""Norms, gated activations, rounding to codes, cache writes and block copies of real models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aot_case import AotCase

from octavo.backends.torch.kernels import QuantizeMode, StaticScale
from octavo.backends.torch.triton.copy_blocks import copy_blocks_kernel
from octavo.backends.torch.triton.gated import gated_kernel
from octavo.backends.torch.triton.quantize import Tile, quantize_kernel, warps_of
from octavo.backends.torch.triton.rms_norm import Shape, rms_norm_kernel
from octavo.backends.torch.triton.rope_write import rope_write_kernel, tile_of

STATIC = StaticScale(0.5)
STRIDES = ("x_stride", "residual_stride")
FP8_TARGETS = ("sm_90", "sm_100", "gfx942")
"""Triton has no conversion to float8_e4m3fn before sm_89."""


def targets_of(mode: QuantizeMode | None) -> tuple[str, ...]:
    """Where codes of this mode can be made; empty: everywhere."""
    return () if mode in (None, "int8 token") else FP8_TARGETS


def code_of(mode: QuantizeMode | None, dtype: str) -> str:
    """Type of the result."""
    return dtype if mode is None else "i8" if mode == "int8 token" else "fp8e4nv"


def rms_norm(
    dtype: str,
    features: int,
    *,
    heads: int = 1,
    residual: bool = True,
    mode: QuantizeMode | None = None,
) -> AotCase:
    """As rms_norm launches it."""
    shape = Shape.of(features, heads, mode)
    signature = {
        "x": f"*{dtype}",
        "residual": f"*{dtype}",
        "weight": "*fp32",
        "total": f"*{dtype}",
        "out": f"*{code_of(mode, dtype)}",
        "scales": "*fp32",
        "given": "fp32",
        "num_rows": "i32",
        "x_stride": "i32",
        "residual_stride": "i32",
        "eps": "fp32",
    }
    optional = {"residual": residual, "scales": mode is not None, "given": mode == STATIC}
    absent = [name for name, is_there in optional.items() if not is_there]
    return AotCase(
        f"rms_norm {dtype} {heads} x {features}{' + residual' * residual} {mode or ''}".strip(),
        rms_norm_kernel,
        signature,
        {
            **dict.fromkeys(absent),
            "HEADS": heads,
            "FEATURES": features,
            "LINES": shape.lines,
            "WIDTH": shape.width,
        },
        divisible=("x", "residual", "weight", "total", "out", "scales", *STRIDES),
        options={"num_warps": warps_of(shape.lines * shape.width)},
        targets=targets_of(mode),
    )


def of_tile(tile: Tile, features: int, mode: QuantizeMode | None) -> Mapping[str, Any]:
    """The constants that gated and quantize share."""
    given = {} if mode == STATIC else {"given": None}
    return {**given, "FEATURES": features, "GROUPS": tile.groups, "WIDTH": tile.width}


def gated(dtype: str, features: int, activation: str, mode: QuantizeMode | None = None) -> AotCase:
    """As gated launches it."""
    tile = Tile.of(features, mode)
    return AotCase(
        f"gated {activation} {dtype} {features} {mode or ''}".strip(),
        gated_kernel,
        {
            "gate": f"*{dtype}",
            "up": f"*{dtype}",
            "out": f"*{code_of(mode, dtype)}",
            "scales": "*fp32",
            "given": "fp32",
            "gate_stride": "i32",
            "up_stride": "i32",
        },
        {
            **({} if mode else {"scales": None}),
            **of_tile(tile, features, mode),
            "GELU": activation == "gelu",
        },
        divisible=("gate", "up", "out", "scales", "gate_stride", "up_stride"),
        options={"num_warps": tile.num_warps},
        targets=targets_of(mode),
    )


def quantize(dtype: str, features: int, mode: QuantizeMode) -> AotCase:
    """As quantize launches it."""
    tile = Tile.of(features, mode)
    return AotCase(
        f"quantize {dtype} {features} {mode}",
        quantize_kernel,
        {
            "x": f"*{dtype}",
            "codes": f"*{code_of(mode, dtype)}",
            "scales": "*fp32",
            "given": "fp32",
            "stride": "i32",
        },
        of_tile(tile, features, mode),
        divisible=("x", "codes", "scales", "stride"),
        options={"num_warps": tile.num_warps},
        targets=targets_of(mode),
    )


def rope_write(
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cache: str,
    *,
    scale_keys: bool = False,
) -> AotCase:
    """As rope_write launches it for blocks of 16 tokens."""
    tile, half = tile_of(kv_heads, head_dim)
    codes = cache in ("i8", "fp8e4nv")
    pointers = {
        **dict.fromkeys(("q", "k", "v"), f"*{dtype}"),
        "out": f"*{dtype if codes else cache}",
        "table": "*fp32",
        "positions": "*i32",
        "slots": "*i32",
        "cache": f"*{cache}",
        "scales": "*fp32",
        "factors": "*fp32",
    }
    strides = ("q_stride", "k_stride", "v_stride", "block_stride", "scale_stride")
    absent = [n for n, there in (("scales", codes), ("factors", scale_keys)) if not there]
    return AotCase(
        f"rope_write {dtype} {heads} + {kv_heads} x {head_dim} to {cache}{' scaled' * scale_keys}",
        rope_write_kernel,
        {**pointers, **dict.fromkeys(strides, "i32")},
        {
            **dict.fromkeys(absent),
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "D": head_dim,
            "BLOCK_SIZE": 16,
            "TILE": tile,
            "HALF": half,
        },
        divisible=(*pointers, *strides),
        options={"num_warps": max(tile * half // 256, 1)},
        targets=FP8_TARGETS if cache == "fp8e4nv" else (),
    )


def copy_blocks(size: int) -> AotCase:
    """As copy_blocks launches it; size is in elements of four bytes."""
    return AotCase(
        f"copy_blocks {4 * size} bytes",
        copy_blocks_kernel,
        {"pool": "*i32", "pairs": "*i32", "layer_stride": "i32", "block_stride": "i32"},
        {"SIZE": size, "PIECE": 2048},
        divisible=("pool", "pairs", "layer_stride", "block_stride"),
    )


CASES: tuple[AotCase, ...] = (
    rms_norm("bf16", 576),
    rms_norm("bf16", 1152),
    rms_norm("fp16", 3584),
    rms_norm("bf16", 4096, residual=False),
    rms_norm("bf16", 4096),
    rms_norm("fp32", 4096),
    rms_norm("bf16", 8192),
    rms_norm("bf16", 16384),
    rms_norm("bf16", 4096, mode="int8 token"),
    rms_norm("bf16", 4096, mode="fp8 token"),
    rms_norm("bf16", 8192, mode="int8 token"),
    rms_norm("bf16", 8192, mode="fp8 token"),
    rms_norm("bf16", 4096, mode=STATIC),
    rms_norm("bf16", 8192, mode=STATIC),
    rms_norm("bf16", 5120, mode="fp8 group"),
    rms_norm("bf16", 8192, mode="fp8 group"),
    rms_norm("bf16", 16384, mode="fp8 group"),
    rms_norm("bf16", 128, heads=32, residual=False),
    rms_norm("bf16", 256, heads=4, residual=False),
    gated("bf16", 1536, "silu"),
    gated("bf16", 14336, "silu"),
    gated("fp16", 18944, "silu"),
    gated("bf16", 6912, "gelu"),
    gated("fp32", 14336, "silu"),
    gated("bf16", 14336, "silu", "int8 token"),
    gated("bf16", 14336, "silu", "fp8 token"),
    gated("bf16", 14336, "silu", STATIC),
    gated("bf16", 14336, "gelu", "int8 token"),
    gated("bf16", 28672, "silu", "int8 token"),
    gated("bf16", 28672, "silu", "fp8 token"),
    gated("bf16", 28672, "silu", "fp8 group"),
    gated("bf16", 6912, "gelu", "fp8 group"),
    gated("fp16", 6912, "gelu", STATIC),
    quantize("bf16", 4096, "int8 token"),
    quantize("bf16", 4096, "fp8 token"),
    quantize("bf16", 8192, "fp8 group"),
    quantize("bf16", 4096, STATIC),
    quantize("fp16", 28672, "int8 token"),
    quantize("bf16", 28672, "fp8 token"),
    rope_write("bf16", 9, 3, 64, "fp16"),
    rope_write("bf16", 32, 8, 128, "fp16"),
    rope_write("fp16", 32, 32, 128, "fp16"),
    rope_write("bf16", 64, 8, 128, "i8"),
    rope_write("bf16", 28, 4, 128, "i8", scale_keys=True),
    rope_write("bf16", 64, 8, 128, "fp8e4nv"),
    rope_write("bf16", 28, 4, 128, "fp8e4nv", scale_keys=True),
    rope_write("bf16", 4, 1, 256, "fp16"),
    rope_write("bf16", 32, 32, 96, "fp8e4nv"),
    rope_write("fp32", 32, 8, 128, "fp32"),
    copy_blocks(16384),
    copy_blocks(4224),
)

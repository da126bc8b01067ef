"""Linear operators: dense in fixed tiles, grouped weights, int8 and fp8 codes, experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from aot_case import AotCase

from octavo.backends.torch.triton import (
    grouped_linear,
    grouped_matmul,
    matmul,
    parts,
    quantized_linear,
    row_linear,
)

NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
FP8_NVIDIA = ("sm_90", "sm_100")
"""fp8 is float8_e4m3fn, which sm_80 and the matrix cores of gfx942 lack."""
COUNTS = ("tokens", "num_parts", "part_steps", "part_blocks", "zero", "mask", "one", "first")
"""Integers that are not specialized, so they count as divisible by nothing."""
FORMS = {
    "Q4_K": (4, 32, True),
    "AWQ": (4, 128, True),
    "Q2_K": (4, 16, True),
    "Q6_K": (8, 16, False),
}
"""Bits, columns a group and whether there are minimums."""


def _case(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
    targets: tuple[str, ...],
) -> AotCase:
    """A case whose other arguments are integers, divisible by 16 where that is looked at."""
    integers = [n for n in kernel.arg_names if n not in types and n not in constants]
    return AotCase(
        name,
        kernel,
        {**types, **dict.fromkeys(integers, "i32")},
        constants,
        (*types, *(n for n in integers if n not in COUNTS and not n.endswith("scale_stride"))),
        options,
        targets,
    )


def _matmuls() -> Iterator[AotCase]:
    for dtype in ("bf16", "fp16"):
        for pieces, is_shared in ((1, True), (1, False), (2, False))[: 3 if dtype == "bf16" else 1]:
            types = {"x": f"*{dtype}", "weight": f"*{dtype}", "bias": f"*{dtype}"}
            constants: dict[str, Any] = {
                "IS_SHARED": is_shared, "PIECES": pieces, "WHOLE_K": True, "HAS_BIAS": True,
                "PIECE": matmul.PIECE, "TILE_N": matmul.TILE_N, "STEP": 64, "BAND": 16,
            }  # fmt: skip
            if is_shared:
                types.pop("bias")
                constants |= {"bias": None, "HAS_BIAS": False}
            types["out"] = "*fp32" if is_shared else f"*{dtype}"
            for stages, targets in ((4, NVIDIA), (2, AMD)):
                yield _case(
                    f"matmul {dtype} pieces {pieces}{' shared' * is_shared} stages {stages}",
                    matmul.matmul_kernel,
                    types,
                    constants,
                    {"num_warps": 8, "num_stages": stages},
                    targets,
                )


def _grouped(
    forms: Sequence[str], dtype: str, tokens: int, *, is_shared: bool = False, warps: int = 4
) -> Iterator[AotCase]:
    for form in forms:
        bits, group, has_minimums = FORMS[form]
        constants: dict[str, Any] = {
            "BITS": bits, "GROUP": group, "HAS_MINIMUMS": has_minimums, "HAS_BIAS": False,
            "bias": None, "ASCENDING": grouped_linear.ASCENDING,
        }  # fmt: skip
        types = {
            "x": f"*{dtype}", "words": "*i32", "scales": "*i32", "factors": "*fp32",
            "out": "*fp32" if is_shared else f"*{dtype}",
        }  # fmt: skip
        kernel = grouped_linear.grouped_row_kernel
        if tokens == 1:
            constants["BLOCKS"] = warps
        else:
            kernel = grouped_linear.grouped_tile_kernel
            constants |= {
                "TILE_M": tokens, "TILE_N": grouped_linear.TILE_N, "WHOLE_K": True, "BAND": 64,
                "IS_SHARED": is_shared,
            }  # fmt: skip
        for stages, targets in ((4, NVIDIA), (2, AMD)):
            yield _case(
                f"grouped {form} {dtype} tokens {tokens} warps {warps}"
                f"{' shared' * is_shared} stages {stages}",
                kernel,
                types,
                constants,
                {"num_warps": warps, "num_stages": stages},
                targets,
            )


def _unpacks() -> Iterator[AotCase]:
    for form in ("Q4_K", "Q6_K"):
        bits, group, has_minimums = FORMS[form]
        types = {"words": "*i32", "scales": "*i32", "factors": "*fp32", "out": "*bf16"}
        constants: dict[str, Any] = {
            "BITS": bits, "GROUP": group, "HAS_MINIMUMS": has_minimums,
            "TILE_N": grouped_linear.TILE_N, "ASCENDING": grouped_linear.ASCENDING,
        }  # fmt: skip
        yield _case(
            f"unpack {form}", grouped_linear.unpack_kernel, types, constants, {"num_warps": 4}, ()
        )


def _quantized(codes: str, *, is_blocked: bool) -> Iterator[AotCase]:
    for pieces, is_shared in ((1, True), (1, False), (2, False)):
        types = {"x": f"*{codes}", "weight": f"*{codes}", "x_scales": "*fp32", "w_scales": "*fp32"}
        types["out"] = "*fp32" if is_shared else "*bf16"
        constants = {
            "IS_BLOCKED": is_blocked, "HAS_BIAS": False, "bias": None, "IS_SHARED": is_shared,
            "PIECES": pieces, "WHOLE_K": True, "PIECE": matmul.PIECE, "TILE_N": matmul.TILE_N,
            "STEP": 128, "BAND": 16,
        }  # fmt: skip
        for stages, targets in ((4, NVIDIA if codes == "i8" else FP8_NVIDIA), (2, AMD)):
            if codes != "i8" and targets == AMD:
                continue
            yield _case(
                f"quantized {codes}{' blocks' * is_blocked} pieces {pieces}"
                f"{' shared' * is_shared} stages {stages}",
                quantized_linear.quantized_kernel,
                types,
                constants,
                {"num_warps": 8, "num_stages": stages},
                targets,
            )


def _rows() -> Iterator[AotCase]:
    for dtype in ("bf16", "fp16", "fp32", "fp8e4nv"):
        scales = ("x_scales", "w_scales")
        is_fp8 = dtype == "fp8e4nv"
        types = {"x": f"*{dtype}", "weight": f"*{dtype}", "bias": "*bf16", "out": "*bf16"}
        if not is_fp8:
            types |= {"bias": f"*{dtype}", "out": f"*{dtype}"}
        width = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1}[dtype]
        for lanes, targets in ((32, FP8_NVIDIA if is_fp8 else NVIDIA), (64, AMD)):
            if is_fp8 and targets == AMD:
                continue
            warps = row_linear.WIDTH * width // (16 * lanes)
            yield _case(
                f"row linear {dtype} warps {warps}",
                row_linear.row_linear_kernel,
                types | (dict.fromkeys(scales, "*fp32") if is_fp8 else {}),
                {
                    "HAS_SCALES": is_fp8, "HAS_BIAS": True, "ROWS": row_linear.ROWS,
                    "WIDTH": row_linear.WIDTH, **({} if is_fp8 else dict.fromkeys(scales)),
                },
                {"num_warps": warps},
                targets,
            )  # fmt: skip


def _sums() -> Iterator[AotCase]:
    for name, scaled in (
        ("", ()),
        (" scaled", ("scales",)),
        (" scaled rows", ("scales", "row_scales")),
    ):
        absent = {"scales", "row_scales", "bias"} - {*scaled}
        yield _case(
            f"sum parts{name}",
            parts.sum_parts_kernel,
            {"sums": "*fp32", "out": "*bf16", **dict.fromkeys(scaled, "*fp32")},
            {
                **dict.fromkeys(absent), "HAS_ROW_SCALES": "row_scales" in scaled,
                "HAS_SCALES": "scales" in scaled, "HAS_BIAS": False, "BLOCK": 512,
                "MAX_PARTS": parts.MAX_PARTS,
            },
            {"num_warps": 4},
            (),
        )  # fmt: skip


def _experts() -> Iterator[AotCase]:
    for tile_m, (stages, targets) in product((16, 64), ((4, NVIDIA), (2, AMD))):
        yield _case(
            f"experts bf16 rows {tile_m} stages {stages}",
            grouped_matmul.grouped_matmul_kernel,
            {"x": "*bf16", "weight": "*bf16", "offsets": "*i32", "out": "*bf16"},
            {
                "WHOLE_K": True, "EXPERTS": 128, "TILE_M": tile_m,
                "TILE_N": grouped_matmul.TILE_N, "STEP": grouped_matmul.STEP,
            },
            {"num_warps": 4, "num_stages": stages},
            targets,
        )  # fmt: skip


CASES = (
    *_matmuls(),
    *_grouped([*FORMS], "bf16", 1, warps=8),
    *_grouped(["Q4_K"], "fp16", 1, warps=16),
    *_grouped([*FORMS], "bf16", 16),
    *_grouped(["Q4_K"], "bf16", 16, is_shared=True),
    *_grouped(["Q4_K", "Q6_K"], "bf16", 64),
    *_grouped(["AWQ"], "fp16", 64),
    *_unpacks(),
    *_quantized("i8", is_blocked=False),
    *_quantized("fp8e4nv", is_blocked=False),
    *_quantized("fp8e4nv", is_blocked=True),
    *_rows(),
    *_experts(),
    *_sums(),
)

"""Linear operators: dense in fixed tiles, grouped weights, int8 and fp8."""

from __future__ import annotations

from collections.abc import Iterator

from aot_case import AotCase

from octavo.backends.torch.triton import grouped_linear, matmul

NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
_COUNTS = {"tokens": "i32", "num_parts": "i32", "part_steps": "i32"}


def _matmuls() -> Iterator[AotCase]:
    for dtype in ("bf16", "fp16"):
        for pieces, is_shared in ((1, True), (1, False), (2, False)):
            out = "fp32" if is_shared else dtype
            has_bias = not is_shared
            yield AotCase(
                name=f"matmul {dtype} pieces {pieces}{' shared' if is_shared else ''}",
                kernel=matmul.matmul_kernel,
                signature={
                    "x": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{out}", **_COUNTS,
                    "n": "i32", "k": "i32", "x_stride": "i32", "weight_stride": "i32",
                } | ({"bias": f"*{dtype}"} if has_bias else {}),
                constants={
                    "HAS_BIAS": has_bias, "IS_SHARED": is_shared, "PIECES": pieces,
                    "WHOLE_K": True, "PIECE": 64, "TILE_N": 128, "STEP": 64, "BAND": 16,
                } | ({} if has_bias else {"bias": None}),
                divisible=("x", "weight", "out", "n", "k", "x_stride", "weight_stride"),
                options={"num_warps": 8, "num_stages": 4},
            )  # fmt: skip


FORMS = (
    ("Q4_K", 4, 32, True),
    ("Q4_0", 4, 32, False),
    ("AWQ", 4, 128, True),
    ("Q2_K", 4, 16, True),
    ("Q6_K", 8, 16, False),
    ("Q8_0", 8, 32, False),
)


def _grouped(dtype: str, tokens: int, *, is_shared: bool = False, warps: int = 4) -> list[AotCase]:
    cases = []
    for form, bits, group, has_minimums in FORMS:
        counts = ["n", "k", "num_blocks", "zero", "mask", "one"]
        constants = {
            "BITS": bits, "GROUP": group, "HAS_MINIMUMS": has_minimums, "HAS_BIAS": False,
            "bias": None,
        }  # fmt: skip
        pointers = ["x", "words", "scales", "factors", "out"]
        if has_minimums:
            pointers.append("minimums")
        else:
            constants["minimums"] = None
        kernel = grouped_linear.grouped_row_kernel
        if tokens == 1:
            constants["BLOCKS"] = warps
        else:
            kernel = grouped_linear.grouped_tile_kernel
            counts += ["tokens", "num_parts", "part_blocks", "x_stride"]
            constants |= {
                "TILE_M": tokens, "TILE_N": grouped_linear.TILE_N, "WHOLE_K": True, "BAND": 64,
                "IS_SHARED": is_shared,
            }  # fmt: skip
        types = {
            "x": f"*{dtype}", "words": "*i32", "scales": "*fp16", "minimums": "*fp16",
            "factors": "*fp32", "out": "*fp32" if is_shared else f"*{dtype}",
        }  # fmt: skip
        for stages, targets in ((4, NVIDIA), (2, AMD)):
            cases.append(
                AotCase(
                    f"grouped {form} {dtype} tokens {tokens} warps {warps}"
                    f"{' shared' * is_shared} stages {stages}",
                    kernel,
                    {**{name: types[name] for name in pointers}, **dict.fromkeys(counts, "i32")},
                    constants,
                    (*pointers, "n", "k", "num_blocks", *(["x_stride"] if tokens > 1 else [])),
                    {"num_warps": warps, "num_stages": stages},
                    targets,
                )
            )
    return cases


CASES = (
    *_matmuls(),
    *_grouped("bf16", 1, warps=16),
    *_grouped("bf16", 1, warps=8),
    *_grouped("bf16", 16, is_shared=True),
    *_grouped("fp16", 16),
    *_grouped("bf16", 64),
)

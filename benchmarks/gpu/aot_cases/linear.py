"""Linear operators: dense in fixed tiles, grouped weights, int8 and fp8."""

from __future__ import annotations

from collections.abc import Iterator

from aot_case import AotCase

from octavo.backends.torch.triton import matmul

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


CASES = (*_matmuls(),)

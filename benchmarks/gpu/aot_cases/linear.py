"""Linear operators: dense in fixed tiles, grouped weights, int8 and fp8."""

from __future__ import annotations

from collections.abc import Iterator

from aot_case import AotCase

from octavo.backends.torch.triton import grouped_linear, matmul

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


def _grouped() -> Iterator[AotCase]:
    forms = (("Q4_K", 4, 32, True), ("Q4_0", 4, 32, False), ("AWQ", 4, 128, True),
             ("Q6_K", 8, 16, False), ("Q8_0", 8, 32, False))  # fmt: skip
    for form, bits, group, has_minimums in forms:
        for dtype, tokens, is_shared in (
            ("bf16", 1, True), ("bf16", 1, False), ("bf16", 16, True), ("fp16", 16, False), ("bf16", 64, False),
        ):  # fmt: skip
            out = "fp32" if is_shared else dtype
            counts = ["n", "k", "num_blocks", "part_blocks", "zero", "mask", "one"]
            sizes = {} if tokens == 1 else {"TILE_M": tokens, "WHOLE_K": True, "BAND": 64}
            if tokens > 1:
                counts += ["tokens", "num_parts", "x_stride"]
            yield AotCase(
                name=f"grouped {form} {dtype} tokens {tokens}{' shared' if is_shared else ''}",
                kernel=grouped_linear.grouped_row_kernel
                if tokens == 1
                else grouped_linear.grouped_tile_kernel,
                signature={
                    "x": f"*{dtype}", "words": "*i32", "scales": "*fp16", "factors": "*fp32",
                    "out": f"*{out}", **dict.fromkeys(counts, "i32"),
                } | ({"minimums": "*fp16"} if has_minimums else {}),
                constants={
                    "bias": None, "BITS": bits, "GROUP": group, "HAS_MINIMUMS": has_minimums,
                    "HAS_BIAS": False, "IS_SHARED": is_shared, "TILE_N": grouped_linear.TILE_N, **sizes,
                } | ({} if has_minimums else {"minimums": None})
                | ({"UNROLL": grouped_linear.UNROLL} if tokens == 1 else {}),
                divisible=("x", "words", "scales", "factors", "out", "n", "k", "num_blocks")
                + (("x_stride",) if tokens > 1 else ())
                + (("minimums",) if has_minimums else ()),
                options={"num_warps": 4, "num_stages": 3 if tokens == 1 else 4},
            )  # fmt: skip


CASES = (*_matmuls(), *_grouped())

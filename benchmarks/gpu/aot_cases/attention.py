"""Attention: ragged, split and merging, in the tiles that each device gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from aot_case import AotCase

from octavo.backends.torch.kernels import query_dtype
from octavo.backends.torch.triton.attention import ragged_kernel
from octavo.backends.torch.triton.attention_shapes import (
    MERGE_OPTIONS,
    MOST_SPLIT_ROWS,
    Device,
    choose_shape,
)
from octavo.backends.torch.triton.attention_split import merge_kernel, split_kernel
from octavo.graph.ops import PagedAttention

DEVICES = {
    "sm_80": Device(108, 80, reads_fp8=False),
    "sm_90": Device(132, 90, reads_fp8=True),
    "sm_100": Device(148, 100, reads_fp8=True),
    "gfx942": Device(304, 0, reads_fp8=False),
}
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn


def _operator(heads: int, kv_heads: int, dim: int, window: int | None = None) -> PagedAttention:
    return PagedAttention(0, heads, kv_heads, dim, dim**-0.5, window)


LLAMA_7B, LLAMA_8B, LLAMA_70B = (_operator(*h, 128) for h in ((32, 32), (32, 8), (64, 8)))
QWEN2_7B, SMOLLM2 = _operator(28, 4, 128), _operator(9, 3, 64)
GEMMA3_4B = _operator(8, 4, 256, 1024)
GEMMA2_9B = replace(_operator(16, 8, 256, 4096), soft_cap=50.0)

MODELS = (
    ("Llama-7B", LLAMA_7B, BF16, F16),
    ("Llama-8B", LLAMA_8B, BF16, F16),
    ("Llama-8B", LLAMA_8B, BF16, INT8),
    ("Llama-8B", LLAMA_8B, BF16, FP8),
    ("Llama-70B", LLAMA_70B, BF16, FP8),
    ("Qwen2-7B", QWEN2_7B, BF16, F16),
    ("SmolLM2", SMOLLM2, F16, F16),
    ("SmolLM2", SMOLLM2, F32, F32),
    ("Gemma3-4B", GEMMA3_4B, BF16, F16),
    ("Gemma3-4B", GEMMA3_4B, BF16, INT8),
    ("Gemma2-9B", GEMMA2_9B, BF16, F16),
)
"""Names, operators, and the dtypes of activations and cache."""
ELSEWHERE = (1, 2, 3, 6, 7, 8)
"""Indices of the models that devices other than sm_90 have cases for."""
DETERMINISTIC = {
    ("Llama-8B", F16),
    ("Llama-8B", FP8),
    ("SmolLM2", F16),
    ("SmolLM2", F32),
    ("Gemma3-4B", F16),
}


def _case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> AotCase:
    """A case for one target, whose name ends with it."""
    pointers = {"starts": "*i32", "seq_lens": "*i32", "partial": "*fp32", "stats": "*fp32"}
    floats = {"scale": "fp32", "cap_scale": "fp32"}
    known = {**types, **pointers, "tables": "*i32", **floats}
    names = [n for n in kernel.arg_names if n not in constants]
    return AotCase(
        name=name,
        kernel=kernel,
        signature={n: known.get(n, "i32") for n in names},
        constants=constants,
        divisible=tuple(
            n
            for n in names
            if known.get(n, "").startswith("*") or n in ("query_stride", "block_stride")
        ),
        options=options,
        targets=(name.rsplit(maxsplit=1)[1],),
    )


def _cases() -> Iterator[AotCase]:
    for target, device in DEVICES.items():
        models = MODELS if target == "sm_90" else [MODELS[i] for i in ELSEWHERE]
        for model, operator, computed, cached in models:
            query = query_dtype(computed, cached)
            modes = (False, True) if (model, cached) in DETERMINISTIC else (False,)
            for deterministic in modes:
                mode = " deterministic" if deterministic else ""
                end = f"{model} {NAMES[computed]} {NAMES[cached]}{mode} {target}"
                is_shown = (model, cached) in (("Llama-8B", F16), ("Gemma3-4B", F16))
                group = operator.num_heads // operator.num_kv_heads
                several = [MOST_SPLIT_ROWS // group] if is_shown and not deterministic else []
                for tokens in (1, *several, MOST_SPLIT_ROWS + 1):
                    shape = choose_shape(operator, query, cached, 16, tokens, deterministic, device)
                    constants = shape.constants
                    values = "u8" if constants["FP8_BITS"] else NAMES[cached]
                    types = {
                        "query": f"*{NAMES[query]}",
                        "values": f"*{values}",
                        "scales": "*fp32" if constants["CODES"] else f"*{values}",
                        "out": f"*{NAMES[computed]}",
                    }
                    kernel = split_kernel if shape.split else ragged_kernel
                    kind = "split" if shape.split else "ragged"
                    kind += " several" if tokens in several else ""
                    name = f"attention {kind} {end}"
                    yield _case(name, kernel, types, constants, shape.options)
                    if tokens == 1 and is_shown:
                        name, constants = f"attention merge {end}", shape.merge_constants
                        yield _case(name, merge_kernel, types, constants, MERGE_OPTIONS)


CASES = tuple(_cases())

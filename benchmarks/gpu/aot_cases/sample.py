"""Sampling with vocabularies of 128,256 (Llama 3), 152,064 (Qwen2) and 262,144 (Gemma3) tokens."""

from __future__ import annotations

from typing import Any

import triton
from aot_case import AotCase

from octavo.backends.torch.triton import sample, sample_filters
from octavo.backends.torch.triton.sample_parts import UNALIGNED

TYPES = {
    "logits": "*fp32",
    "raw": "*fp32",
    "temperature": "*fp32",
    "top_p": "*fp32",
    "min_p": "*fp32",
    "repetition": "*fp32",
    "presence": "*fp32",
    "frequency": "*fp32",
    "seed": "*i64",
    "best": "*i64",
    "best_in": "*i64",
    "best_out": "*i64",
    "top_in": "*i64",
    "top_out": "*i64",
    "max_in": "*fp32",
    "max_out": "*fp32",
    "sum_in": "*fp32",
    "sum_out": "*fp32",
    "masses_in": "*fp64",
    "masses_out": "*fp64",
    "mass_in": "*fp64",
    "mass_out": "*fp64",
    "greatest_in": "*fp32",
    "greatest_out": "*fp32",
    "logprobs": "*fp32",
    "top_logprobs": "*fp32",
    "values_out": "*fp32",
    "listed_values": "*fp32",
}
NUMBERS = ("stride", "raw_stride", "vocab", "num_top", "num_tiles", "num_best", "room")
DIVISIBLE = ("stride", "raw_stride", "vocab", "room")


def case(name: str, kernel: Any, warps: int, **constants: Any) -> AotCase:
    """A case whose pointers to large arrays are divisible by 16; int32 where TYPES says nothing."""
    names = [n for n in kernel.arg_names if n not in constants]
    values_of_bias = {"values": "*fp32"} if kernel is sample.bias_kernel else {}
    types = TYPES | values_of_bias
    return AotCase(
        name=f"sample {name}",
        kernel=kernel,
        signature={n: "i32" if n in NUMBERS else types.get(n, "*i32") for n in names},
        constants=constants,
        divisible=tuple(n for n in names if n in DIVISIBLE or n not in (*NUMBERS, *UNALIGNED)),
        options={"num_warps": warps, **sample.EXACT},
    )


def of_tiles(name: str, **changes: bool) -> AotCase:
    """The pass over the logits."""
    constants = {"NOISE": True, "FILTERS": False} | changes
    return case(f"tile {name}", sample.tile_kernel, 4, SIZE=sample.TILE, **constants)


def of_vocabulary(vocab: int, has_filters: bool) -> AotCase:
    """The merge of the tiles of a vocabulary, with up to 20 log probabilities."""
    tiles = triton.cdiv(vocab, sample.TILE)
    return case(
        f"merge {vocab}{' filters' if has_filters else ''}",
        sample.merge_kernel,
        4,
        TILES=triton.next_power_of_2(tiles),
        TOPS=triton.next_power_of_2(tiles * sample.MOST_TOP),
        FILTERS=has_filters,
    )


def of_filters(vocab: int) -> tuple[AotCase, ...]:
    """The kernels of filtered rows whose constants depend on the vocabulary."""
    bests = triton.next_power_of_2(triton.cdiv(vocab, sample.TILE))
    tiles = triton.next_power_of_2(triton.cdiv(vocab, sample_filters.TILE))
    size = sample_filters.TILE
    filters = sample_filters
    return (
        case(f"count {vocab}", filters.count_kernel, 8, BESTS=bests, SIZE=size),
        case(f"cut {vocab}", filters.cut_kernel, 8, BESTS=bests, TILES=tiles),
    )


CASES: tuple[AotCase, ...] = (
    case("bias", sample.bias_kernel, 4, SIZE=sample.EDITS),
    case("penalty", sample.penalty_kernel, 4, SIZE=sample.EDITS),
    of_tiles("greedy", NOISE=False),
    of_tiles("noise"),
    of_tiles("filters", FILTERS=True),
    *(of_vocabulary(vocab, f) for vocab in (128_256, 262_144) for f in (False, True)),
    *of_filters(128_256),
    *of_filters(262_144),
    case("list", sample_filters.list_kernel, 8, SIZE=sample_filters.TILE),
    case("choose", sample_filters.choose_kernel, 8, SIZE=sample_filters.CHUNK),
)

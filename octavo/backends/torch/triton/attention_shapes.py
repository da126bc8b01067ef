"""What the host decides of a launch of attention: tiles, dtypes of products, constants."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.torch.kernels import LayerCache
from octavo.backends.torch.triton.launch import FP_FUSION
from octavo.graph import ops as op

SEGMENT = 512
"""Positions after which a deterministic softmax starts anew."""
MOST_SPLIT_ROWS = 64
"""Rows of a sequence that caches are split for: more of them fill a device as they are."""
MERGE_OPTIONS = {"num_warps": 4, **FP_FUSION}
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Device:
    """What of a device decides how kernels are launched.

    Attributes:
        processors: streaming multiprocessors, compute units.
        capability: 80, 90 and so on of NVIDIA; 0 of AMD.
        reads_fp8: an instruction reads float8_e4m3fn.
        interpreted: Triton's interpreter runs the kernels.
    """

    processors: int
    capability: int
    reads_fp8: bool
    interpreted: bool = False

    def name(self, dtype: torch.dtype) -> Any:
        """The dtype of products in Triton; its interpreter has none of bfloat16."""
        if dtype == torch.float16:
            return tl.float16
        return tl.float32 if dtype == torch.float32 or self.interpreted else tl.bfloat16


@functools.cache
def device_of(device: torch.device) -> Device:
    """The facts of a device; made-up ones of a processor, on which the interpreter runs."""
    if device.type != "cuda":
        return Device(processors=4, capability=90, reads_fp8=True, interpreted=True)
    facts = torch.cuda.get_device_properties(device)
    version = facts.major * 10 + facts.minor
    if torch.version.hip is not None:
        return Device(facts.multi_processor_count, 0, version >= 95)
    return Device(facts.multi_processor_count, version, version >= 89)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel cuts its work: rows and keys of a tile; `registers` is a bound for a thread."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What decides the tiles of a kernel.

    Attributes:
        dim: the head_dim, padded to a power of two.
        itemsize: bytes of a number of the cache.
        wide: products are of float32.
        deterministic: the tiles are the same for all steps.
        capability: of the device.
    """

    dim: int
    itemsize: int
    wide: bool
    deterministic: bool
    capability: int


def ragged_tiles(case: Case) -> Tiles:
    """The tiles of the ragged kernel: what registers hold.

    On Hopper loads that wait for block ids take two stages: five of them keep a tile on its way,
    three none. Up to a head_dim of 64, two programs of 128 registers a thread share a processor;
    beyond, such a bound makes ptxas wait for each wgmma.
    """
    hopper = case.capability == 90
    stages = 3 if case.capability else 2
    warps = 4 if case.dim <= 128 else 8
    if case.wide:
        return Tiles(32, 32, 4, stages)
    stages = 5 if hopper else stages
    if case.deterministic:
        roomy = case.dim <= 64 or (hopper and case.dim <= 128 and case.itemsize > 1)
        return Tiles(64, 64 if roomy else 32, warps, stages)
    if hopper:
        shared = case.dim <= 64 and case.itemsize > 1
        return Tiles(128, 64 if case.dim <= 128 else 32, 8, stages, 128 if shared else None)
    if case.dim > 128:
        return Tiles(64, 32, warps, stages)
    return Tiles(128, 64 if case.dim <= 64 or case.capability >= 100 else 32, 8, stages)


def split_tiles(case: Case, rows: int) -> Tiles | None:
    """The tiles to split caches with, for the rows of the largest sequence; None: too many."""
    tiles = ragged_tiles(case)
    if rows > min(tiles.rows, MOST_SPLIT_ROWS):
        return None
    if case.deterministic:
        return tiles
    warps = 4 if case.dim <= 128 else 8
    # Numbers enough for one trip to pay, few enough for two programs to share a processor.
    keys = max(32, 16384 // (case.dim * max(2, case.itemsize)))
    # Two heights are all that is to be loaded before requests come, and one between would save
    # little: on Hopper 64 rows are one wgmma, for which codes become numbers once, in the order
    # that they lie in.
    is_low = rows <= 16 and (case.capability != 90 or case.itemsize > 1 or case.wide)
    height = 16 if is_low else min(tiles.rows, MOST_SPLIT_ROWS)
    return Tiles(height, keys, 4 if is_low else warps, 5 if case.capability else 2)


@dataclass(frozen=True, slots=True)
class Shape:
    """A launch, but for tensors and counts.

    Attributes:
        split: caches are split.
        head_tiles: tiles of the heads of a token.
        slots: programs that the device may work at at once, for each tile of heads.
        constants: the tl.constexpr arguments.
        options: warps, stages and the like.
    """

    split: bool
    head_tiles: int
    slots: int
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def merge_constants(self) -> dict[str, Any]:
        """The tl.constexpr arguments of the kernel that merges."""
        names = ("NUM_HEADS", "HEAD_DIM", "DIM", "BLOCK_N", "SEGMENT", "WINDOW")
        return {name: self.constants[name] for name in names}


@functools.lru_cache(maxsize=4096)
def choose_shape(
    operator: op.PagedAttention,
    query: torch.dtype,
    cached: torch.dtype,
    block_size: int,
    tokens: int,
    deterministic: bool,
    device: Device,
) -> Shape:
    """The launch for these dtypes and sizes.

    Args:
        operator: whose heads and window count.
        query: the dtype of queries, of both products but for the weights of codes.
        cached: that of the cache.
        block_size: of the cache.
        tokens: the greatest number of a sequence's.
        deterministic: see `Kernels.attention`.
        device: what is launched on.
    """
    dim = max(16, triton.next_power_of_2(operator.head_dim))
    codes = cached.itemsize == 1
    # Weights times the scales of codes may be below the range of float16.
    weighted = torch.bfloat16 if codes and query == torch.float16 else query
    case = Case(dim, cached.itemsize, query == torch.float32, deterministic, device.capability)
    group = operator.num_heads // operator.num_kv_heads
    heads = min(group, ragged_tiles(case).rows, MOST_SPLIT_ROWS)
    split = split_tiles(case, heads * tokens)
    tiles = split or ragged_tiles(case)
    head_tiles = operator.num_kv_heads * triton.cdiv(group, heads)
    constants = {
        "NUM_HEADS": operator.num_heads,
        "KV_HEADS": operator.num_kv_heads,
        "HEAD_DIM": operator.head_dim,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "HEADS": heads,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "SEGMENT": SEGMENT if deterministic else 0,
        "WINDOW": operator.window or 0,
        "SOFT_CAP": operator.soft_cap is not None,
        "CODES": codes,
        "FP8_BITS": cached == torch.float8_e4m3fn and not device.reads_fp8,
        "DTYPE": device.name(query),
        "P_DTYPE": device.name(weighted),
        "PRECISION": "tf32x3" if case.wide and device.capability else "ieee",
    }
    options: dict[str, Any] = {
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **FP_FUSION,
    }
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    slots = max(1, 2 * device.processors // head_tiles)
    return Shape(split is not None, head_tiles, slots, constants, options)


def score_factors(operator: op.PagedAttention) -> tuple[float, float]:
    """What scores, or the tanh of them, are multiplied by; and for tanh, what its argument is."""
    if operator.soft_cap is None:
        return operator.scale * LOG2_E, 0.0
    return operator.soft_cap * LOG2_E, operator.scale / operator.soft_cap * 2 * LOG2_E


def cache_tensors(cache: LayerCache, shape: Shape) -> tuple[Tensor, Tensor]:
    """Values and scales as kernels take them; without scales, some tensor in their place."""
    values = cache.values.view(torch.uint8) if shape.constants["FP8_BITS"] else cache.values
    return values, values if cache.scales is None else cache.scales


def cache_strides(cache: LayerCache) -> tuple[int, int]:
    """From block to block, of values and of scales."""
    return cache.values.stride(0), 0 if cache.scales is None else cache.scales.stride(0)

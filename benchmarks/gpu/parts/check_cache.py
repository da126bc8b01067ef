"""Part A: rotation, the writes of K and V, and copies of blocks, against torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.backends import torch as backend
from octavo.backends.torch.kernels import Kernels, LayerCache, Quantized, StepArrays
from octavo.backends.torch.plain.table import KERNELS as PLAIN
from octavo.backends.torch.tables import choose_kernels
from octavo.models.rope import RopeConfig
from parts.check import (
    BF16,
    F16,
    F32,
    FP8,
    INT8,
    NAMES,
    Checks,
    codes_error,
    error_of,
    generator,
    unlike,
    value_error,
)
from parts.machine import Setup
from parts.record import Recorder

BLOCKS, BLOCK_SIZE, POSITIONS = 24, 16, 4096
SHAPES = ((32, 32, 128), (32, 8, 128), (14, 2, 64), (4, 1, 256), (9, 3, 64), (7, 1, 6))
CACHES = ((BF16, BF16), (F16, F16), (F32, F32), (BF16, INT8), (F16, INT8), (BF16, FP8))


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes, dtypes, and whether there are angles and factors."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    cached: torch.dtype
    rotates: bool = True
    has_factors: bool = False


def run(setup: Setup, recorder: Recorder) -> None:
    """Writes of all shapes and dtypes, and copies of odd sizes."""
    checks = Checks(setup, recorder, "Cache")
    kernels = choose_kernels(setup.table, setup.device)
    shapes = SHAPES[2:4] if setup.quick else SHAPES
    cases = [Case(*shape, BF16, F16) for shape in shapes]
    cases += [Case(*shapes[1], *dtypes) for dtypes in CACHES]
    cases += [Case(*shapes[1], BF16, INT8, True, True), Case(*shapes[1], BF16, F16, False)]
    for case in cases:
        name = f"{case.heads}/{case.kv_heads} heads of {case.dim}, {NAMES[case.dtype]}"
        name += f", cache {NAMES[case.cached]}" + (", factors" if case.has_factors else "")
        name += "" if case.rotates else ", no angles"
        checks.add(f"rope_write {name}", lambda c=case: writes(setup, kernels, c))
    for size in (6, 4096, 8200) if setup.quick else (1, 6, 4096, 8200, 40000, 262144):
        checks.add(f"copy_blocks of {size} bytes", lambda s=size: copies(setup, kernels, s))


def writes(setup: Setup, kernels: Kernels, case: Case) -> float:
    """The rotated queries and the whole cache, with rows that pad among those that write."""
    device, tokens = setup.device, 37
    random = generator(setup)
    sizes = [case.heads * case.dim, case.kv_heads * case.dim, case.kv_heads * case.dim]
    joined = torch.randn((tokens, sum(sizes)), generator=random, device=device).to(case.dtype)
    q, k, v = joined.split(sizes, dim=1)
    table = factors = None
    if case.rotates:
        table = backend._angles(RopeConfig().inv_freq(case.dim), POSITIONS, device)
    if case.has_factors:
        shape = (case.kv_heads, case.dim)
        factors = torch.rand(shape, generator=random, device=device) * 0.9 + 0.1
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=random, device=device)[:tokens].int()
    slots[5], slots[tokens - 1] = -1, -1
    positions = torch.randint(0, POSITIONS, (tokens,), generator=random, device=device).int()
    none = torch.zeros(0, dtype=torch.int32, device=device)
    arrays = StepArrays(positions, slots, none, none, none.reshape(0, 0), tokens, POSITIONS, 0)
    ours, theirs = cache_of(setup, case), cache_of(setup, case)
    actual = kernels.rope_write(q, k, v, table, arrays, ours, factors)
    expected = PLAIN.rope_write(q, k, v, table, arrays, theirs, factors)
    return max(value_error(actual, expected), cache_error(ours, theirs))


def cache_of(setup: Setup, case: Case) -> LayerCache:
    """A layer whose blocks lie apart."""
    shape = (BLOCKS, 3, case.kv_heads, BLOCK_SIZE, case.dim)
    values = torch.ones(shape, device=setup.device).to(case.cached)[:, 1:]
    if case.cached not in (INT8, FP8):
        return LayerCache(values, None)
    return LayerCache(values, torch.full(shape[:-1], 7.0, device=setup.device)[:, 1:])


def cache_error(actual: LayerCache, expected: LayerCache) -> float:
    """Over all slots, those that nobody wrote included."""
    if actual.scales is None or expected.scales is None:
        ours, theirs = actual.values, expected.values
        # A rotation's last bit may turn one rounding; V is not computed with.
        allowed = theirs.double().abs() * torch.finfo(theirs.dtype).eps + 4e-6
        values = unlike(ours[:, 1], theirs[:, 1])
        return max(values, error_of(ours[:, 0], theirs[:, 0], allowed[:, 0]))
    ours, theirs = (Quantized(c.values, c.scales) for c in (actual, expected))
    return codes_error(ours, theirs)


def copies(setup: Setup, kernels: Kernels, size: int) -> float:
    """Over all layers, of which every byte else stays."""
    layers, blocks = 3, 7
    pool = torch.randint(0, 256, (layers, blocks, size), dtype=torch.uint8, device=setup.device)
    pairs = [(5, 0), (2, 6), (5, 3)]
    expected = pool.clone()
    for source, destination in pairs:
        expected[:, destination] = pool[:, source]
    kernels.copy_blocks(pool, torch.tensor(pairs, dtype=torch.int32, device=setup.device))
    return unlike(pool, expected)


def dequantized(cache: LayerCache) -> Tensor:
    """What the cache means, in float32."""
    values = cache.values.float()
    return values if cache.scales is None else values * cache.scales[..., None]

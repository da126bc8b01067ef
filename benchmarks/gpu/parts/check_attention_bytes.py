"""Part A: in deterministic mode a row's bytes depend on no other row; windows hide what is before.

A row is computed alone, in a chunk and in a whole prefill, beside any other, in any order.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from octavo.backends.torch.kernels import Kernels, query_dtype
from octavo.backends.torch.tables import choose_kernels
from octavo.graph.ops import PagedAttention
from parts.check import BF16, F16, F32, FP8, INT8, NAMES, Checks, unlike
from parts.check_attention import Parts, operator_of, pool_of
from parts.machine import Setup
from parts.record import Recorder

LENGTHS = (2500, 40, 1100)
STEPS: tuple[Parts, ...] = (
    ((0, 1499, 1),),
    ((0, 511, 1),),
    ((1, 39, 1), (0, 512, 1), (-1, 0, 1), (2, 1099, 1)),
    ((1, 3, 2), (0, 1030, 3)),
    ((1, 0, 20), (0, 700, 800), (1, 20, 9)),
    ((2, 0, 1100), (0, 0, 700)),
    ((2, 0, 1100), (0, 2499, 1), (1, 39, 1)),
    (*((1, 39, 1) for _ in range(200)), (0, 1000, 1)),
)
QUICK: tuple[Parts, ...] = (((0, 69, 1),), ((1, 3, 2), (0, 30, 3)), ((0, 20, 40), (1, 0, 9)))


def run(setup: Setup, recorder: Recorder, first: int, of: int) -> None:
    """Every `of`-th case: shapes and caches, with and without a window."""
    checks = Checks(setup, recorder, "Bytes of attention, deterministic")
    kernels = choose_kernels(setup.table, setup.device)
    llama = operator_of(4, 2, 16) if setup.quick else operator_of(32, 8, 128)
    cases = [(llama, BF16, F16), (llama, BF16, INT8)]
    if not setup.quick:
        cases += [(llama, F32, F16), (llama, BF16, FP8)]
        shapes = ((32, 32, 128), (64, 8, 128), (14, 2, 64), (4, 1, 256))
        cases += [(operator_of(*shape), BF16, F16) for shape in shapes]
    cases.append((replace(llama, window=200, soft_cap=3.0), BF16, F16))
    for operator, dtype, cached in cases[first::of]:
        name = f"{operator.num_heads}/{operator.num_kv_heads} heads of {operator.head_dim}, "
        name += f"{NAMES[dtype]}, cache {NAMES[cached]}"
        name += f", window {operator.window}" if operator.window else ""
        checks.add(name, lambda o=operator, d=dtype, c=cached: bytes_of(setup, kernels, o, d, c))
    for deterministic in (False, True)[first::of]:
        checks.add(
            f"nothing before a window is read, deterministic {deterministic}",
            lambda d=deterministic: hidden(setup, kernels, llama, d),
        )


def bytes_of(
    setup: Setup,
    kernels: Kernels,
    operator: PagedAttention,
    dtype: torch.dtype,
    cached: torch.dtype,
) -> float:
    """Rows of sequence 0 in each of the steps, beside those of its whole prefill."""
    lengths = (70, 40) if setup.quick else LENGTHS
    pool = pool_of(setup, operator, cached, lengths)
    rounded = query_dtype(dtype, cached)
    q, arrays = pool.step(((0, 0, lengths[0]),), rounded)
    whole = kernels.attention(q, pool.cache, arrays, operator, dtype, True)
    worst = 0.0
    for parts in QUICK if setup.quick else STEPS:
        q, arrays = pool.step(parts, rounded)
        actual = kernels.attention(q, pool.cache, arrays, operator, dtype, True)
        row = 0
        for sequence, start, count in parts:
            if sequence == 0:
                mine = actual[row : row + count]
                worst = max(worst, unlike(mine, whole[start : start + count]))
            row += count
    return worst


def hidden(setup: Setup, kernels: Kernels, operator: PagedAttention, deterministic: bool) -> float:
    """NaN in what lies before the window, and blocks given away, change nothing."""
    operator = replace(operator, window=50)
    pool = pool_of(setup, operator, F16, (700, 5))
    worst = 0.0
    for part in ((0, 660, 40), (0, 699, 1)):
        q, arrays = pool.step((part,), F16)
        expected = kernels.attention(q, pool.cache, arrays, operator, BF16, deterministic)
        below = part[1] - 50 + 1
        for position in range(below):
            block = int(pool.tables[0, position // 16])
            pool.cache.values[block, :, :, position % 16] = torch.nan
        pool.tables[0, : below // 16] = 0
        q, arrays = pool.step((part,), F16)
        actual = kernels.attention(q, pool.cache, arrays, operator, BF16, deterministic)
        worst = max(worst, unlike(actual, expected))
        if not bool(actual.isfinite().all()):
            return torch.inf
    return worst

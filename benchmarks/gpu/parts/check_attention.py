"""Part A: paged attention against torch alone, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from octavo.backends.torch.kernels import Kernels, LayerCache, StepArrays, query_dtype
from octavo.backends.torch.plain.table import KERNELS as PLAIN
from octavo.backends.torch.tables import choose_kernels
from octavo.graph.ops import PagedAttention
from parts.check import BF16, F16, F32, FP8, INT8, NAMES, Checks, error_of
from parts.check_cache import dequantized
from parts.machine import Setup
from parts.record import Recorder

TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}
"""Of the greatest value: a rounding of the weights and one of the result."""
Parts = Sequence[tuple[int, int, int]]
"""Of a step: sequence, tokens before, tokens. A sequence of -1 pads it."""
LENGTHS = (9, 23, 83, 270, 1, 700)
MIXED: Parts = ((1, 20, 1), (0, 0, 9), (-1, 0, 1), (2, 75, 8), (1, 21, 2), (3, 170, 100))
DECODE: Parts = ((3, 269, 1), (5, 699, 1), (-1, 0, 1), (4, 0, 1), (2, 82, 1))
PREFILL: Parts = ((5, 0, 700), (2, 0, 83), (0, 0, 9))
SMALL: Parts = ((1, 20, 1), (0, 0, 9), (-1, 0, 1))


@dataclass(frozen=True, slots=True)
class Pool:
    """A cache whose sequences lie in blocks out of order; what nobody owns is NaN."""

    cache: LayerCache
    tables: Tensor
    queries: Tensor
    operator: PagedAttention

    def step(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, StepArrays]:
        """Strided queries, each a function of its sequence and position, and where they stand."""
        device = self.tables.device
        rows = torch.cat([self.queries[b, start : start + count] for b, start, count in parts])
        wide = torch.nn.functional.pad(rows, (0, 16)).to(dtype)
        counts = [count for _, _, count in parts]
        lengths = [start + count if b >= 0 else 0 for b, start, count in parts]

        def put(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        zeros = put([0] * len(rows))
        arrays = StepArrays(
            positions=zeros,
            slots=zeros,
            starts=put([0, *accumulate(counts)]),
            seq_lens=put(lengths),
            block_tables=torch.stack([self.tables[b] for b, _, _ in parts]),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            max_decode_len=max(
                (n for n, c in zip(lengths, counts, strict=True) if c == 1), default=0
            ),
        )
        return wide[:, : rows.shape[1]], arrays


def pool_of(
    setup: Setup,
    operator: PagedAttention,
    cached: torch.dtype,
    lengths: Sequence[int] = LENGTHS,
    block_size: int = 16,
) -> Pool:
    """Random K and V; blocks of another layer lie between."""
    random = torch.Generator().manual_seed(5)
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 2
    order = 1 + torch.randperm(num_blocks - 1, generator=random)
    tables = torch.zeros((len(lengths), max(counts) + 1), dtype=torch.int32)
    owned = torch.zeros((num_blocks, block_size), dtype=torch.bool)
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        tables[b, :count], order = order[:count].int(), order[count:]
        at = torch.arange(length)
        owned[tables[b, at // block_size].long(), at % block_size] = True
    shape = (num_blocks, 2, 2, operator.num_kv_heads, block_size, operator.head_dim)
    values = torch.randn(shape, generator=random)
    scales = torch.rand(shape[:-1], generator=random) * 0.03 + 0.01
    nobody = ~owned[:, None, None, None]
    scales.masked_fill_(nobody, torch.nan)
    if cached in (INT8, FP8):
        values = (values * 40).clamp(-127, 127)
    else:
        values.masked_fill_(nobody[..., None], torch.nan)
    features = operator.num_heads * operator.head_dim
    queries = torch.randn((len(lengths), max(lengths), features), generator=random)
    device = setup.device
    cache = LayerCache(
        values.to(cached).to(device)[:, 0],
        scales.to(device)[:, 0] if cached in (INT8, FP8) else None,
    )
    return Pool(cache, tables.to(device), queries.to(device), operator)


def operator_of(heads: int, kv_heads: int, dim: int) -> PagedAttention:
    """Full attention of a layer."""
    return PagedAttention(0, heads, kv_heads, dim, dim**-0.5)


def run(setup: Setup, recorder: Recorder, first: int, of: int) -> None:
    """Every `of`-th case: dtypes, shapes, windows, soft caps; decode, prefill and mixed steps."""
    checks = Checks(setup, recorder, "Attention")
    kernels = choose_kernels(setup.table, setup.device)
    for name, operator, dtype, cached in cases(setup)[first::of]:
        pool = pool_of(setup, operator, cached)
        steps = {"small": SMALL} if setup.quick else {"mixed": MIXED, "decode": DECODE}
        if dtype == BF16 and cached == F16:
            steps |= {} if setup.quick else {"prefill": PREFILL}
        for kind, parts in steps.items():
            for deterministic in (False, True):
                mode = ", deterministic" if deterministic else ""
                checks.add(
                    f"{name}, {kind}{mode}",
                    lambda p=pool, s=parts, t=dtype, d=deterministic: error(kernels, p, s, t, d),
                )


def cases(setup: Setup) -> list[tuple[str, PagedAttention, torch.dtype, torch.dtype]]:
    """Names, operators, dtypes of queries and caches."""
    llama = operator_of(4, 2, 16) if setup.quick else operator_of(32, 8, 128)
    pairs = [(BF16, F16), (BF16, BF16), (BF16, INT8), (BF16, FP8), (F16, F16), (F32, F16)]
    pairs += [] if setup.quick else [(F16, INT8), (F16, FP8), (F32, INT8), (F32, F32)]
    found = [(f"{NAMES[d]}, cache {NAMES[c]}", llama, d, c) for d, c in pairs]
    shapes = [(9, 3, 64)] if setup.quick else [(32, 32, 128), (64, 8, 128), (14, 2, 64), (9, 3, 64)]
    shapes += [] if setup.quick else [(8, 4, 256), (4, 1, 256), (6, 2, 40), (71, 1, 64)]
    for shape in shapes:
        name = f"{shape[0]}/{shape[1]} heads of {shape[2]}"
        found.append((name, operator_of(*shape), BF16, F16))
    for window, soft_cap in ((20, None), (100, 2.0), (1000, 2.0)):
        name = f"window {window}" + (f", soft cap {soft_cap}" if soft_cap else "")
        changed = replace(llama, window=window, soft_cap=soft_cap)
        found.append((name, changed, BF16, F16))
    return found


def error(
    kernels: Kernels, pool: Pool, parts: Parts, dtype: torch.dtype, deterministic: bool
) -> float:
    """Of a step; rows that pad it must be finite."""
    q, arrays = pool.step(parts, query_dtype(dtype, pool.cache.values.dtype))
    actual = kernels.attention(q, pool.cache, arrays, pool.operator, dtype, deterministic)
    exact = LayerCache(dequantized(pool.cache), None)
    expected = PLAIN.attention(q.float(), exact, arrays, pool.operator, F32, True)
    if not bool(actual.isfinite().all()) or actual.dtype != dtype:
        return torch.inf
    real = (arrays.seq_lens > 0).repeat_interleave(arrays.starts.diff())
    peak = max(1.0, float(expected[real].abs().max()))
    return error_of(actual[real], expected[real], TOLERANCE[dtype] * peak)

"""Part C: the attention kernel alone, against bytes over bandwidth or operations over rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from octavo.backends.torch.cache import DTYPES, KVCache
from octavo.backends.torch.kernels import StepArrays, query_dtype
from octavo.backends.torch.tables import choose_kernels
from octavo.graph.ops import PagedAttention
from octavo.graph.trace import CacheDtype, CacheGroup
from parts.dummy import BLOCK_SIZE
from parts.machine import Limits, Setup, captured_seconds, free_bytes, measure_limits
from parts.record import Recorder
from parts.speed import percent, report_limits
from parts.steps import shuffled_tables

SHARE = 0.70
LEAST_SECONDS = 20e-6
"""A floor below it is less than launching and merging take: such cases have no target."""
BEYOND_CACHES = 400 << 20
"""Bytes of K and V that are read in turn, so that none are left in the device's caches."""


@dataclass(frozen=True, slots=True)
class Case:
    """A launch: `count` queries of each sequence at the end of its context."""

    name: str
    heads: int
    kv_heads: int
    batch: int
    context: int
    count: int = 1
    cache_dtype: CacheDtype = "fp16"

    @property
    def operator(self) -> PagedAttention:
        """Of layer 0; heads have 128 features."""
        return PagedAttention(0, self.heads, self.kv_heads, 128, 128**-0.5)

    @property
    def cache_bytes(self) -> int:
        """K and V of the contexts."""
        group = CacheGroup("all", (0,), self.kv_heads, 128)
        return self.batch * self.context * group.bytes_per_token(self.cache_dtype)

    @property
    def operations(self) -> int:
        """Of the products of all pairs of a query and a key that it sees."""
        pairs = self.count * self.context - self.count * (self.count - 1) // 2
        return 4 * self.heads * 128 * self.batch * pairs


DECODES = ((1, 512), (1, 4096), (1, 32768), (8, 4096), (32, 1024), (32, 8192), (128, 1024))
LARGE = ((256, 512), (256, 2048))


def cases(setup: Setup) -> list[Case]:
    """All that are measured."""
    if setup.quick:
        return [Case("8B decode", 4, 2, 2, 40), Case("8B prefill", 4, 2, 1, 40, 30)]
    models = (("7B", 32, 32), ("8B", 32, 8), ("70B", 64, 8))
    found = [Case(f"{n} decode", h, k, *size) for n, h, k in models for size in DECODES + LARGE]
    for dtype in ("int8", "fp8"):
        name = f"8B decode, {dtype} cache"
        sizes = ((1, 32768), (32, 8192), (128, 1024), (256, 2048))
        found += [Case(name, 32, 8, *size, 1, dtype) for size in sizes]
    for name, heads, kv_heads in models:
        for size in ((1, 2048, 2048), (1, 8192, 8192), (4, 2048, 2048), (1, 32768, 2048)):
            found.append(Case(f"{name} prefill", heads, kv_heads, *size))
    return found


def run(setup: Setup, recorder: Recorder) -> None:
    """Measure each case that fits."""
    limits = measure_limits(setup)
    report_limits(recorder, limits)
    for case in cases(setup):
        recorder.attempt("Attention", _title(case), partial(measure, setup, recorder, case, limits))


def measure(setup: Setup, recorder: Recorder, case: Case, limits: Limits) -> None:
    """One row."""
    if setup.is_gpu and 2 * case.cache_bytes + (2 << 30) > free_bytes(setup.device):
        recorder.add("Attention", _title(case), {"left out": "no room for its cache"})
        return
    with torch.inference_mode():
        seconds = captured_seconds(calls_of(setup, case), setup.device)
    floor = max(case.cache_bytes / limits.bandwidth, case.operations / limits.bf16)
    share = floor / seconds
    cells = {
        "queries": case.count,
        "us": seconds * 1e6,
        "floor us": floor * 1e6,
        "TB/s": case.cache_bytes / seconds / 1e12,
        "TFLOP/s": case.operations / seconds / 1e12,
        "floor / time": percent(share),
    }
    has_target = floor >= LEAST_SECONDS
    recorder.add(
        "Attention",
        _title(case),
        cells,
        ok=setup.met(share >= SHARE) if has_target else None,
        target=f"at least {percent(SHARE)} of the floor" if has_target else "",
    )


def _title(case: Case) -> str:
    return f"{case.name}, batch {case.batch}, context {case.context}"


def calls_of(setup: Setup, case: Case) -> list[Callable[[], torch.Tensor]]:
    """The same launch over the caches of several layers."""
    device = setup.device
    layers = 1 if setup.quick or setup.warm else min(32, max(2, BEYOND_CACHES // case.cache_bytes))
    group = CacheGroup("all", tuple(range(layers)), case.kv_heads, 128)
    cache = KVCache(group, BLOCK_SIZE, case.cache_dtype, device)
    width = -(-case.context // BLOCK_SIZE)
    cache.allocate(1 + case.batch * width)
    for layer in cache.layers.values():
        if layer.scales is None:
            layer.values.normal_()
        else:
            layer.values.copy_(torch.randn_like(layer.values[:1], dtype=torch.float32) * 20)
            layer.scales.fill_(0.05)
    tokens = case.batch * case.count
    dtype = torch.bfloat16 if setup.is_gpu else torch.float32
    q = torch.randn((tokens, case.heads * 128), device=device)
    q = q.to(query_dtype(dtype, DTYPES[case.cache_dtype]))
    kernels = choose_kernels(setup.table, device)
    arrays = _arrays(case, width, device)
    return [
        partial(kernels.attention, q, layer, arrays, case.operator, dtype, False)
        for layer in cache.layers.values()
    ]


def _arrays(case: Case, width: int, device: torch.device) -> StepArrays:
    tables = shuffled_tables(case.batch, width)
    starts = np.arange(case.batch + 1, dtype=np.int32) * np.int32(case.count)
    tokens = case.batch * case.count

    def put(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)

    return StepArrays(
        positions=put(np.zeros(tokens)),
        slots=put(np.zeros(tokens)),
        starts=put(starts),
        seq_lens=put(np.full(case.batch, case.context)),
        block_tables=put(tables),
        max_query_len=case.count,
        max_seq_len=case.context,
        max_decode_len=case.context if case.count == 1 else 0,
    )

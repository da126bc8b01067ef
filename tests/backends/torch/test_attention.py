"""Attention of both tables against the reference, and the bytes of its deterministic form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from octavo.backends.reference import operators
from octavo.backends.torch.kernels import LayerCache, StepArrays, query_dtype
from octavo.backends.torch.plain import attention as plain
from octavo.backends.torch.triton import attention as ragged
from octavo.backends.torch.triton import attention_shapes, attention_split
from octavo.graph.ops import PagedAttention

Attention = Callable[
    [torch.Tensor, LayerCache, StepArrays, PagedAttention, torch.dtype, bool], torch.Tensor
]
F32, F16, BF16, INT8, FP8 = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.float8_e4m3fn,
)
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}
"""Of the greatest value: a rounding of the weights and one of the result."""


@pytest.fixture(params=["plain", "triton"])
def attention(request: pytest.FixtureRequest) -> Attention:
    modules: dict[str, Any] = {"plain": plain, "triton": ragged}
    function: Attention = modules[request.param].attention
    return function


def _exact_dot(builder: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
    product = a.data.astype(np.float64) @ b.data.astype(np.float64) + acc.data
    return interpreter.TensorHandle(product.astype(np.float32), acc.dtype.scalar)


@pytest.fixture(autouse=True)
def exact_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The BLAS of the interpreter's products sums by the place of a row; a device's does not."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _exact_dot)


@pytest.fixture(autouse=True)
def patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patching Triton anew for each function that a kernel calls takes a third of the time."""
    original = interpreter.InterpretedFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__.startswith("octavo."):
            return function.rewrite()(*args, **kwargs)
        return original(function, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several segments in short sequences; and less that a program does at once, for speed."""
    attention_shapes.choose_shape.cache_clear()
    monkeypatch.setattr(attention_shapes, "SEGMENT", 64)
    monkeypatch.setattr(attention_split, "MERGED_AT_ONCE", tl.constexpr(1))
    yield
    attention_shapes.choose_shape.cache_clear()


@dataclass
class Pool:
    """A cache whose sequences lie in blocks out of order; what nobody owns is NaN."""

    cache: LayerCache
    tables: torch.Tensor
    operator: PagedAttention

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        dtype: torch.dtype,
        operator: PagedAttention,
        block_size: int = 16,
        spread: int = 1,
    ) -> Pool:
        """Sequences of random K and V; `spread` blocks of other layers lie between two blocks."""
        random = torch.Generator().manual_seed(5)
        counts = [-(-length // block_size) for length in lengths]
        num_blocks = sum(counts) + 2
        order = 1 + torch.randperm(num_blocks - 1, generator=random).to(torch.int32)
        tables = torch.zeros((len(lengths), max(counts) + 1), dtype=torch.int32)
        shape = (num_blocks, spread, 2, operator.num_kv_heads, block_size, operator.head_dim)
        values = torch.full(shape, torch.nan)
        scales = torch.full(shape[:-1], torch.nan)
        for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            tables[b, :count], order = order[:count], order[count:]
            for position in range(length):
                block, offset = tables[b, position // block_size], position % block_size
                own = values[block, 0, :, :, offset]
                own.copy_(torch.randn(own.shape, generator=random))
                own = scales[block, 0, :, :, offset]
                own.copy_(torch.rand(own.shape, generator=random) * 0.03 + 0.01)
        codes = dtype.itemsize == 1
        if codes:
            values = (values * 40).nan_to_num(100).clamp(-127, 127)
        cache = LayerCache(values.to(dtype)[:, 0], scales[:, 0] if codes else None)
        return cls(cache, tables, operator)

    def step(
        self, parts: Sequence[tuple[int, int, int]], dtype: torch.dtype
    ) -> tuple[torch.Tensor, StepArrays]:
        """Queries of (sequence, start, count) in this order; a sequence of -1 pads the step.

        A query is a function of its sequence and position. Rows are strided.
        """
        operator = self.operator
        features = operator.num_heads * operator.head_dim
        rows, tables, seq_lens = [], [], []
        for sequence, start, count in parts:
            for position in range(start, start + count):
                random = torch.Generator().manual_seed(sequence * 10_000 + position + 20_000)
                rows.append(torch.randn(features + 16, generator=random))
            tables.append(self.tables[sequence])
            seq_lens.append(start + count if sequence >= 0 else 0)
        counts = [count for _, _, count in parts]
        arrays = StepArrays(
            positions=torch.zeros(len(rows), dtype=torch.int32),
            slots=torch.zeros(len(rows), dtype=torch.int32),
            starts=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_tables=torch.stack(tables),
            max_query_len=max(counts),
            max_seq_len=max(seq_lens),
            max_decode_len=max(
                (n for n, c in zip(seq_lens, counts, strict=True) if c == 1), default=0
            ),
        )
        return torch.stack(rows).to(dtype)[:, :features], arrays

    def expected(self, q: torch.Tensor, arrays: StepArrays) -> np.ndarray[Any, Any]:
        """What the reference makes of a step, zeros for rows that pad it."""
        operator, block_size = self.operator, self.cache.values.shape[3]
        out = np.zeros((len(q), operator.num_heads, operator.head_dim), np.float32)
        heads = q.float().numpy().reshape(out.shape)
        values = self.cache.values.float()
        if self.cache.scales is not None:
            values = values * self.cache.scales[..., None]
        for b, length in enumerate(arrays.seq_lens.tolist()):
            rows = slice(int(arrays.starts[b]), int(arrays.starts[b + 1]))
            first = length - (rows.stop - rows.start)
            if length:
                low = 0 if operator.window is None else max(0, first - operator.window + 1)
                at = torch.arange(low, length)
                blocks = arrays.block_tables[b][at // block_size].long()
                keys, mixed = values[blocks, :, :, at % block_size].transpose(0, 1).numpy()
                positions = np.arange(first - low, length - low, dtype=np.int32)
                out[rows] = operators.attend(heads[rows], keys, mixed, positions, operator)
        return out.reshape(q.shape)


def operator_of(heads: int = 4, kv_heads: int = 2, dim: int = 32, **changes: Any) -> PagedAttention:
    return PagedAttention(0, heads, kv_heads, dim, dim**-0.5, **changes)


def check(
    attention: Attention,
    pool: Pool,
    parts: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    deterministic: bool = False,
) -> None:
    q, arrays = pool.step(parts, query_dtype(dtype, pool.cache.values.dtype))
    actual = attention(q, pool.cache, arrays, pool.operator, dtype, deterministic)
    expected = pool.expected(q, arrays)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    real = np.repeat(arrays.seq_lens.numpy() > 0, np.diff(arrays.starts.numpy()))
    assert np.isfinite(actual.float().numpy()).all(), "rows that pad it too"
    error = np.abs(actual.float().numpy() - expected)[real].max()
    assert error <= TOLERANCE[dtype] * max(1.0, np.abs(expected).max())


MIXED = [(1, 20, 1), (0, 0, 9), (-1, 0, 1), (2, 75, 8), (1, 21, 2)]
MIXED_LENGTHS = [9, 23, 83]
DECODE = [(0, 36, 1), (1, 269, 1), (-1, 0, 1), (2, 0, 1), (3, 60, 2)]
DECODE_LENGTHS = [37, 270, 1, 62]


@pytest.mark.parametrize(
    ("dtype", "cached", "deterministic"),
    [
        (F32, F32, False),
        (F16, F16, True),
        (BF16, BF16, False),
        (F32, F16, True),
        (F16, BF16, False),
        (BF16, F32, False),
        (F32, INT8, False),
        (F16, INT8, False),
        (BF16, INT8, True),
        (F16, FP8, False),
    ],
)
def test_dtypes(
    attention: Attention, dtype: torch.dtype, cached: torch.dtype, deterministic: bool
) -> None:
    operator = operator_of(9, 1, 16)
    check(attention, Pool.of(MIXED_LENGTHS, cached, operator), MIXED, dtype, deterministic)
    operator = operator_of(1, 1, 16)
    check(attention, Pool.of(DECODE_LENGTHS, cached, operator), DECODE, dtype, deterministic)


def test_fp8_by_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As devices read it that have no instruction for it."""
    old = attention_shapes.Device(2, capability=80, reads_fp8=False, interpreted=True)
    monkeypatch.setattr(ragged, "device_of", lambda device: old)
    pool = Pool.of(DECODE_LENGTHS, FP8, operator_of(1, 1, 16))
    codes = torch.arange(256).to(torch.uint8).view(FP8)
    codes = codes[torch.isfinite(codes.float())]
    flat = pool.cache.values.view(-1)
    flat.copy_(codes[torch.arange(len(flat)) % len(codes)])
    check(ragged.attention, pool, DECODE, F16)


@pytest.mark.parametrize(
    ("window", "soft_cap", "deterministic"),
    [(1, None, False), (20, 2.0, False), (20, None, True), (100, 2.0, True), (1000, 2.0, False)],
)
def test_windows_and_soft_caps(
    attention: Attention, window: int, soft_cap: float | None, deterministic: bool
) -> None:
    operator = replace(operator_of(9, 1, 16, window=window, soft_cap=soft_cap), scale=0.7)
    lengths, parts = [9, 21, 150], [(1, 20, 1), (0, 0, 9), (2, 137, 13)]
    check(attention, Pool.of(lengths, F32, operator), parts, F32, deterministic)
    operator = replace(operator, num_heads=1)
    check(attention, Pool.of(DECODE_LENGTHS, F32, operator), DECODE, F32, deterministic)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "deterministic"),
    [
        (3, 3, 16, 8, True),
        (7, 1, 64, 64, False),
        (71, 1, 8, 32, False),
        (6, 2, 40, 16, True),
        (2, 1, 256, 8, False),
        (8, 1, 128, 16, False),
    ],
)
def test_shapes(
    attention: Attention, heads: int, kv_heads: int, dim: int, block_size: int, deterministic: bool
) -> None:
    operator = operator_of(heads, kv_heads, dim)
    pool = Pool.of([70, 21], F16, operator, block_size, spread=3)
    tokens = 64 * kv_heads // heads + 1
    check(attention, pool, [(0, 70 - tokens, tokens), (1, 20, 1)], F16, deterministic)
    check(attention, pool, [(0, 69, 1), (1, 20, 1)], F16, deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_more_sequences_than_are_counted_at_a_time(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    for module in (ragged, attention_split):
        monkeypatch.setattr(module, "LANES", tl.constexpr(4))
    operator = operator_of(1, 1, 16)
    lengths = [1, 130, 3, 7, 2, 150, 9]
    pool = Pool.of(lengths, F32, operator)
    parts = [(b, length - 1, 1) for b, length in enumerate(lengths)]
    check(ragged.attention, pool, parts, F32, deterministic)
    parts = [(b, 0, min(length, 35 * (b % 3 + 1))) for b, length in enumerate(lengths)]
    check(ragged.attention, pool, parts, F32, deterministic)


@pytest.mark.parametrize(("cached", "window"), [(F16, None), (INT8, 70)])
def test_bytes_depend_on_no_other_row(
    attention: Attention, cached: torch.dtype, window: int | None
) -> None:
    """A row alone, in a chunk and in a prefill, beside any other, in any order."""
    operator = operator_of(2, 1, 16, window=window)
    pool = Pool.of([150, 40], cached, operator)
    q, arrays = pool.step([(0, 0, 150)], F32)
    whole = attention(q, pool.cache, arrays, operator, q.dtype, True)
    steps: list[list[tuple[int, int, int]]] = [
        [(0, 149, 1)],
        [(1, 39, 1), (0, 128, 1), (-1, 0, 1)],
        [(1, 3, 2), (0, 126, 3)],
        [(1, 0, 20), (0, 111, 25), (1, 20, 9)],
    ]
    for parts in steps:
        q, arrays = pool.step(parts, F32)
        actual = attention(q, pool.cache, arrays, operator, q.dtype, True)
        row = 0
        for sequence, start, count in parts:
            if sequence == 0:
                assert torch.equal(actual[row : row + count], whole[start : start + count])
            row += count


@pytest.mark.parametrize(
    ("cached", "window", "deterministic"), [(F16, None, False), (INT8, None, True), (F16, 90, True)]
)
def test_long_contexts_of_single_tokens_are_split_beside_prompts(
    monkeypatch: pytest.MonkeyPatch, cached: torch.dtype, window: int | None, deterministic: bool
) -> None:
    """The prompt's rows and those of the others are each written by one kernel, with its bytes."""
    monkeypatch.setattr(attention_split, "LANES", tl.constexpr(4))
    operator = operator_of(4, 1, 16, window=window)
    pool = Pool.of([300, 90, 1, 171, 20], cached, operator)
    parts = [(1, 50, 40), (-1, 0, 1), (0, 299, 1), (4, 18, 2), (2, 0, 1), (3, 170, 1)]
    q, arrays = pool.step(parts, F16)
    alone = ragged.attention(q, pool.cache, arrays, operator, F16, deterministic)
    launched = []

    def launch(*args: Any) -> None:
        launched.append(args)
        attention_split.launch_split(*args)

    monkeypatch.setattr(ragged, "launch_split", launch)
    most = window or 300
    for least, is_split in ((most, False), (most - 1, True)):
        monkeypatch.setattr(ragged, "LEAST_SPLIT_LEN", least)
        check(ragged.attention, pool, parts, F16, deterministic)
        assert bool(launched) == is_split
    if deterministic:
        together = ragged.attention(q, pool.cache, arrays, operator, F16, True)
        assert torch.equal(together, alone)


@pytest.mark.parametrize(("tokens", "fits"), [(1, True), (2, True), (16, False)])
def test_parts_take_little_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, fits: bool) -> None:
    """A long context beside a short prompt; what is too much for parts has the same bytes."""
    operator = operator_of(4, 1, 16)
    pool = Pool.of([300, 20], F16, operator)
    q, arrays = pool.step([(0, 299, 1), (1, 20 - tokens, tokens)], F16)
    expected = ragged.attention(q, pool.cache, arrays, operator, q.dtype, True)
    launched = []

    def launch(*args: Any) -> None:
        launched.append(args)
        attention_split.launch_split(*args)

    monkeypatch.setattr(ragged, "launch_split", launch)
    # 5 segments of each of 2 sequences, 4 heads of 16 numbers.
    monkeypatch.setattr(attention_split, "MOST_PARTIAL_BYTES", 2 * 10 * 4 * 16 * 4)
    actual = ragged.attention(q, pool.cache, arrays, operator, q.dtype, True)
    assert bool(launched) == fits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cached", [F16, INT8])
@pytest.mark.parametrize("part", [(0, 130, 40), (0, 169, 1)])
def test_nothing_before_the_window_is_read(
    attention: Attention,
    cached: torch.dtype,
    part: tuple[int, int, int],
    deterministic: bool,
) -> None:
    operator = operator_of(2, 1, 16, window=50)
    pool = Pool.of([170], cached, operator)
    q, arrays = pool.step([part], F16)
    expected = attention(q, pool.cache, arrays, operator, q.dtype, deterministic)
    assert torch.isfinite(expected).all()
    below = part[1] - operator.window + 1
    faulty = pool.cache.values if pool.cache.scales is None else pool.cache.scales
    for position in range(below):
        faulty[pool.tables[0, position // 16], :, :, position % 16] = torch.nan
    # Blocks that lie before it as a whole may have been given away.
    pool.tables[0, : below // 16] = 0
    q, arrays = pool.step([part], F16)
    actual = attention(q, pool.cache, arrays, operator, q.dtype, deterministic)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_a_fault_of_codes_is_seen_by_what_sees_it(attention: Attention, which: int) -> None:
    """A scale of K, and of V, that is NaN makes NaN of its kv head at and after it."""
    operator = operator_of(4, 2, 16)
    pool = Pool.of([40], INT8, operator)
    assert pool.cache.scales is not None
    pool.cache.scales[pool.tables[0, 1], which, 0, 4] = torch.nan  # position 20
    q, arrays = pool.step([(0, 0, 40)], F32)
    for deterministic in (False, True):
        actual = attention(q, pool.cache, arrays, operator, q.dtype, deterministic).view(40, 4, 16)
        assert actual[20:, :2].isnan().all()
        assert torch.isfinite(actual[:20]).all()
        assert torch.isfinite(actual[:, 2:]).all(), "the other kv head"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 64, 65, 66])
def test_where_masks_begin_and_end(window: int | None, deterministic: bool) -> None:
    """Rows next to the edges of tiles of keys, of 64: what all rows see whole has no masks."""
    operator = operator_of(30, 1, 16, window=window)
    pool = Pool.of([132], F16, operator)
    for start in (125, 126, 127, 128):
        check(ragged.attention, pool, [(0, start, 3)], F16, deterministic)

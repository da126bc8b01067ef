"""Rotation and the writes to the paged cache against the reference backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.backends.reference import operators
from octavo.backends.reference.cache import PagedCache
from octavo.backends.torch.kernels import LayerCache, StepArrays
from octavo.backends.torch.plain import cache as plain
from octavo.backends.torch.triton.rope_write import rope_write as rope_write_triton
from octavo.graph import ops as op
from octavo.graph.trace import CacheGroup

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "plain": plain.rope_write,
    "triton": rope_write_triton,
}
BLOCK_SIZE = 4
NUM_BLOCKS = 6
SLOTS = (9, 10, 11, 20, -1, 0, -1)
"""Of two sequences whose blocks are out of order, and of two rows that pad."""
POSITIONS = (5, 6, 7, 8, 0, 31, 0)

# Triton's interpreter computes with numpy, which warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(params=IMPLEMENTATIONS)
def rope_write(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return IMPLEMENTATIONS[request.param]


@dataclass(frozen=True)
class Case:
    """Shapes of a model and its q, k and v, slices of one matrix."""

    heads: int
    kv_heads: int
    head_dim: int
    inv_freq: tuple[float, ...]
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(
        cls,
        dtype: torch.dtype = torch.float32,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
    ) -> Case:
        rng = np.random.default_rng(5)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        joined = torch.from_numpy(rng.normal(size=(len(SLOTS), sum(sizes)))).to(dtype)
        q, k, v = joined.split(sizes, dim=1)
        inv_freq = tuple(10000.0 ** (-i / (head_dim // 2)) for i in range(head_dim // 2))
        return cls(heads, kv_heads, head_dim, inv_freq, q, k, v)

    def table(self) -> Tensor:
        angles = np.arange(40, dtype=np.float32)[:, None] * np.array(self.inv_freq, np.float32)
        both = np.concatenate([np.cos(angles, dtype=float), np.sin(angles, dtype=float)], axis=1)
        return torch.from_numpy(both.astype(np.float32))

    def factors(self) -> Tensor:
        rng = np.random.default_rng(6)
        pairs = rng.uniform(0.1, 1, (self.kv_heads, self.head_dim // 2)).astype(np.float32)
        return torch.from_numpy(np.concatenate([pairs, pairs], axis=1))

    def cache(self, dtype: torch.dtype) -> LayerCache:
        """A layer whose blocks lie apart, every byte of it 0x55."""
        shape = (NUM_BLOCKS, 3, self.kv_heads, BLOCK_SIZE, self.head_dim)
        memory = torch.full(shape, 0x55, dtype=torch.uint8).repeat_interleave(dtype.itemsize, dim=4)
        scales = None
        if dtype.itemsize == 1:
            scales = torch.full(shape[:-1], -7.0)[:, 1:]
        return LayerCache(memory.view(dtype)[:, 1:], scales)

    def rotated(self, x: Tensor, heads: int) -> np.ndarray:
        rope = op.Rope(num_heads=heads, head_dim=self.head_dim, inv_freq=self.inv_freq)
        return operators.rope(x.float().numpy(), rope, np.array(POSITIONS, np.int32))


def arrays() -> StepArrays:
    none = torch.zeros(0, dtype=torch.int32)
    return StepArrays(
        torch.tensor(POSITIONS, dtype=torch.int32),
        torch.tensor(SLOTS, dtype=torch.int32),
        none,
        none,
        none.reshape(0, 0),
        4,
        32,
        0,
    )


def read(cache: LayerCache) -> np.ndarray:
    """[2, tokens written, kv_heads, head_dim] float32, and that nothing else was written."""
    values = cache.values.transpose(2, 3)  # [blocks, 2, block_size, heads, D]
    by_slot = values.transpose(1, 2).flatten(0, 1).transpose(0, 1)
    out = by_slot.float()
    used = [s for s in SLOTS if s >= 0]
    others = [s for s in range(NUM_BLOCKS * BLOCK_SIZE) if s not in used]
    assert (by_slot.contiguous().view(torch.uint8)[:, others] == 0x55).all()
    if cache.scales is not None:
        scales = cache.scales.transpose(2, 3).transpose(1, 2).flatten(0, 1).transpose(0, 1)
        assert (scales[:, others] == -7).all()
        out = out * scales[..., None]
    return out[:, used].numpy()


WRITTEN = [row for row, slot in enumerate(SLOTS) if slot >= 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 24), (7, 1, 6), (10, 5, 160)]
)
def test_rotates_and_writes(
    rope_write: Callable[..., Tensor],
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    case = Case.random(dtype, heads, kv_heads, head_dim)
    cache = case.cache(dtype)

    out = rope_write(case.q, case.k, case.v, case.table(), arrays(), cache, None)

    close = {"rtol": torch.finfo(dtype).eps / 2 + 1e-6, "atol": 1e-6}
    assert out.is_contiguous() and out.dtype == dtype
    np.testing.assert_allclose(out.float().numpy(), case.rotated(case.q, heads), **close)
    keys, values = read(cache)
    expected = case.rotated(case.k, kv_heads)[WRITTEN]
    np.testing.assert_allclose(keys.reshape(len(WRITTEN), -1), expected, **close)
    np.testing.assert_array_equal(values.reshape(len(WRITTEN), -1), case.v[WRITTEN].float().numpy())


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "query_dtype"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.int8, torch.bfloat16),
        (torch.float16, torch.float8_e4m3fn, torch.float16),
    ],
)
def test_queries_are_rounded_once_to_what_scores_are_computed_in(
    rope_write: Callable[..., Tensor],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    query_dtype: torch.dtype,
) -> None:
    case = Case.random(dtype)

    out = rope_write(case.q, case.k, case.v, case.table(), arrays(), case.cache(cache_dtype), None)

    assert out.is_contiguous() and out.dtype == query_dtype
    close = {"rtol": torch.finfo(query_dtype).eps / 2 + 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(out.float().numpy(), case.rotated(case.q, case.heads), **close)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_a_cache_of_another_dtype(
    rope_write: Callable[..., Tensor], cache_dtype: torch.dtype
) -> None:
    case = Case.random()
    cache = case.cache(cache_dtype)

    out = rope_write(case.q, case.k.contiguous(), case.v, None, arrays(), cache, None)

    assert out.is_contiguous() and torch.equal(out, case.q)
    keys, values = read(cache)
    for got, given in ((keys, case.k), (values, case.v)):
        expected = given[WRITTEN].to(cache_dtype).float().numpy()
        np.testing.assert_array_equal(got.reshape(len(WRITTEN), -1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_factors", [False, True])
def test_int8_as_the_reference(
    rope_write: Callable[..., Tensor], dtype: torch.dtype, with_factors: bool
) -> None:
    case = Case.random(dtype, head_dim=24)
    factors = case.factors() if with_factors else None
    cache = case.cache(torch.int8)

    out = rope_write(case.q, case.k, case.v, case.table(), arrays(), cache, factors)

    ones = np.ones((case.kv_heads, 24), np.float32)
    scale = ones if factors is None else factors.numpy()
    expected_q = case.rotated(case.q, 4).reshape(-1, 2, 2, 24) * scale[:, None]
    close = {"rtol": torch.finfo(dtype).eps / 2 + 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(out.float().numpy(), expected_q.reshape(-1, 96), **close)
    oracle = PagedCache(CacheGroup("all", (0,), 2, 24), NUM_BLOCKS, BLOCK_SIZE, "int8")
    keys = case.rotated(case.k, 2).reshape(-1, 2, 24) * (1 / scale)
    slots = np.array([s for s in SLOTS if s >= 0], np.int32)
    oracle.write(0, slots, keys.reshape(-1, 48)[WRITTEN], case.v.float().numpy()[WRITTEN])
    blocks = np.arange(NUM_BLOCKS, dtype=np.int32)
    for got, expected in zip(
        read(cache), oracle.read(0, blocks, NUM_BLOCKS * BLOCK_SIZE), strict=True
    ):
        step = np.abs(expected[slots]).max(axis=2, keepdims=True) / 127
        off = np.abs(got - expected[slots]) / step
        assert off.max() < 1.01  # the last bit of a rotation may turn a half
        assert (off > 1e-3).mean() < 0.02


def test_fp8_is_one_group_a_head(rope_write: Callable[..., Tensor]) -> None:
    case = Case.random(torch.bfloat16)
    cache = case.cache(torch.float8_e4m3fn)

    rope_write(case.q, case.k, case.v.contiguous(), None, arrays(), cache, None)

    for got, given in zip(read(cache), (case.k, case.v), strict=True):
        heads = given[WRITTEN].float().unflatten(1, (2, 16))
        peak = heads.abs().amax(dim=2, keepdim=True)
        codes = (heads * (448 / peak)).to(torch.float8_e4m3fn).float()
        np.testing.assert_array_equal(got, (codes * (peak / 448)).numpy())


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_is_not_finite_spoils_its_head(
    rope_write: Callable[..., Tensor], cache_dtype: torch.dtype
) -> None:
    case = Case.random()
    case.k[0, 3] = math.nan
    case.v[1, 20] = math.inf
    case.v[3, :16] = 2.0**-121
    cache = case.cache(cache_dtype)

    rope_write(case.q, case.k, case.v, case.table(), arrays(), cache, None)

    keys, values = read(cache)
    spoilt = np.isnan(np.stack([keys, values]))
    assert spoilt[0, 0, 0].all() and spoilt[1, 1, 1].all() and spoilt.sum() == 32
    assert (values[3, 0] == 0).all() and (values[3, 1] != 0).any()


def test_a_token_depends_on_no_other(rope_write: Callable[..., Tensor]) -> None:
    case = Case.random(head_dim=24)
    whole, single = case.cache(torch.int8), case.cache(torch.int8)
    step = arrays()
    out = rope_write(case.q, case.k, case.v, case.table(), step, whole, case.factors())

    for t in range(len(SLOTS)):
        row = slice(t, t + 1)
        one = replace(step, positions=step.positions[row], slots=step.slots[row])
        args = case.q[row], case.k[row], case.v[row], case.table(), one, single, case.factors()
        assert torch.equal(rope_write(*args)[0], out[t])

    assert torch.equal(whole.values, single.values)
    assert whole.scales is not None and single.scales is not None
    assert torch.equal(whole.scales, single.scales)

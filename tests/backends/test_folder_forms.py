"""Stored forms of quantized folders on the cpu backend: large groups, zero points, FP8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo.backends.key_scaling import key_factors
from octavo.graph.tensors import BlockFloatTensor, BlockScales, GroupedTensor
from octavo.weights.formats.packed_words import read_awq, read_gptq


def random_packed(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group: int
) -> GroupedTensor:
    """Random words as GPTQ packs them."""
    words = 1 << 32
    return read_gptq(
        rng.integers(0, words, (columns * bits // 32, rows), dtype=np.uint32),
        rng.integers(0, words, (columns // group, rows * bits // 32), dtype=np.uint32),
        (rng.uniform(0.5, 1.5, (columns // group, rows)) / 2**bits).astype(np.float32),
        stores_less_1=True,
    )


def compare(kit: Any, graph: Any, weights: Any, columns: int, isa: str, bound: float) -> None:
    x = np.random.default_rng(2).normal(0, 1, (5, columns)).astype(np.float32)
    batch = kit.batch([kit.Part(range(8), 0, 5)], inputs={"x": x}, token_ids=[0, 31, 7, 16, 7])
    actual, expected = kit.both(graph, weights, kit.options(isa=isa), [batch])
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 64), (4, 128), (8, 128), (4, 384)])
def test_linear_in_groups_of_any_size(
    kit: Any, rng: np.random.Generator, isa: str, bits: int, group: int
) -> None:
    graph = kit.graph(lambda ops: ops.linear(ops.input("x", 384), "w", 64))
    weights = {"w.weight": random_packed(rng, 64, 384, bits, group)}
    compare(kit, graph, weights, 384, isa, 4e-6)


def test_embedding_in_large_groups(kit: Any, rng: np.random.Generator, isa: str) -> None:
    """A row that is looked up has the minimums of the cpu's form, rounded to float16."""
    graph = kit.graph(lambda ops: ops.embed("e", 32, 256))
    weights = {"e.weight": random_packed(rng, 32, 256, 4, 128)}
    compare(kit, graph, weights, 256, isa, 2e-4)


@pytest.mark.parametrize("block", [(32, 192), (1, 192), (16, 128)])
def test_float8_becomes_dense(
    kit: Any, rng: np.random.Generator, isa: str, block: tuple[int, int]
) -> None:
    codes = rng.integers(0, 126, (32, 192), dtype=np.uint8)
    grid = -(-32 // block[0]), -(-192 // block[1])
    scales = rng.uniform(1e-3, 2e-3, grid).astype(np.float32)
    weight = BlockFloatTensor(codes, scales, block)
    linear = kit.graph(lambda ops: ops.linear(ops.input("x", 192), "w", 32))
    compare(kit, linear, {"w.weight": weight}, 192, isa, 1e-3)
    embed = kit.graph(lambda ops: ops.embed("e", 32, 192))
    compare(kit, embed, {"e.weight": weight}, 192, isa, 1e-3)


def test_small_groups_of_two_level_scales_are_exact(kit: Any, rng: np.random.Generator) -> None:
    weight = kit.grouped(rng, 6, 512, 4, 64, minimums=True, two_level=True)
    small = weight.in_small_groups()
    assert isinstance(small.minimums, BlockScales)
    assert small.group == 32
    np.testing.assert_array_equal(small.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8"])
def test_key_factors_of_these_forms_are_those_of_their_values(
    kit: Any, rng: np.random.Generator, name: str
) -> None:
    """Estimated from some blocks of the columns of integers, from all of FP8's."""
    columns = 1024
    scales = np.exp(rng.normal(-4, 1, (8, 64))[:1].repeat(8, axis=0)).astype(np.float32)
    if name == "gptq":
        words = rng.integers(0, 1 << 32, (columns // 8, 64), dtype=np.uint32)
        zeros = np.full((8, 8), 0x66666666, np.uint32)
        weight: Any = read_gptq(words, zeros, scales, stores_less_1=True)
    elif name == "awq":
        words = rng.integers(0, 1 << 32, (columns, 8), dtype=np.uint32)
        weight = read_awq(words, np.full((8, 8), 0x77777777, np.uint32), scales)
    else:
        codes = rng.integers(0, 126, (64, columns), dtype=np.uint8)
        weight = BlockFloatTensor(codes, scales.T.copy(), (1, 128))

    def build(ops: Any) -> Any:
        x = ops.input("x", columns)
        k = ops.linear(x, "k", 64)
        return ops.paged_attention(k, k, k, 0, head_dim=32, scale=1.0)

    graph = kit.graph(build)
    [found] = key_factors(graph, {"k.weight": weight}).values()
    [expected] = key_factors(graph, {"k.weight": kit.dense(weight.dequantize())}).values()
    assert expected.min() < 0.1, "rows alike would show nothing"
    np.testing.assert_allclose(found, expected, rtol=1e-5 if name == "fp8" else 0.25)

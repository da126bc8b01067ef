"""Tracing: shapes, weights, printing, cache groups, and the stored forms of weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.graph import ops as op
from octavo.graph.tensors import Codes, DenseTensor, GroupedTensor, GroupScales, Plane
from octavo.graph.trace import Graph, Ops


def small_graph() -> Graph:
    ops = Ops()
    x = ops.embed("embed", 10, 8)
    for layer in ops.layers("layers", 2):
        h = ops.rms_norm(x, layer / "norm", 1e-5)
        q = ops.rope(ops.linear(h, layer / "q", 8), 4, (1.0, 0.5))
        k, v = (ops.linear(h, layer / n, 4, bias=True) for n in "kv")
        a = ops.paged_attention(q, k, v, layer.index, head_dim=4, scale=0.5)
        x = ops.add(x, ops.silu_mul(a, h))
    logits = ops.linear(ops.select_rows(x), "embed", 10)
    return ops.finish(logits=logits, hidden=x)


def test_weights_and_their_shapes() -> None:
    layer = {"norm.weight": (8,), "q.weight": (8, 8)}
    layer |= {f"{n}.weight": (4, 8) for n in "kv"} | {f"{n}.bias": (4,) for n in "kv"}
    expected = {f"layers.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}
    assert small_graph().weights == {"embed.weight": (10, 8), **expected}


def test_nodes_come_after_their_inputs() -> None:
    graph = small_graph()
    for index, node in enumerate(graph.nodes):
        assert node.output == index
        assert all(i < index for i in node.inputs)
    logits = graph.nodes[graph.outputs["logits"]]
    assert isinstance(logits.operator, op.Linear)
    assert (logits.operator.in_features, logits.operator.out_features) == (8, 10)
    attention = [n.operator for n in graph.nodes if isinstance(n.operator, op.PagedAttention)]
    assert [(a.layer, a.num_heads, a.num_kv_heads, a.head_dim) for a in attention] == [
        (0, 2, 1, 4),
        (1, 2, 1, 4),
    ]


def test_prints_a_line_a_node() -> None:
    graph = small_graph()
    lines = str(graph).splitlines()
    assert len(lines) == len(graph.nodes)
    assert lines[0].startswith("%0 [8] = Embed(weight='embed.weight'")
    assert lines[-1].endswith("-> logits")
    assert any(line.endswith("-> hidden") for line in lines)
    assert lines[7] == "%7 [8] = SiluMul() %6 %1"
    assert lines[8] == "%8 [8] = Add() %0 %7"


def test_cache_group_tells_what_a_token_costs() -> None:
    (group,) = small_graph().cache_groups
    assert (group.name, group.layers, group.num_kv_heads, group.head_dim) == ("full", (0, 1), 1, 4)
    assert group.bytes_per_token("fp16") == 2 * 2 * 1 * 4 * 2
    assert group.bytes_per_token("int8") == 2 * 2 * 1 * (4 + 4)
    ops = Ops()
    assert ops.finish(y=ops.input("x", 4)).cache_groups == ()


def test_a_weight_has_one_shape() -> None:
    ops = Ops()
    x = ops.embed("embed", 10, 8)
    with pytest.raises(AssertionError, match=r"embed\.weight is declared with two shapes"):
        ops.linear(x, "embed", 11)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_grouped_tensor(rows: int, blocks: int, seed: int) -> None:
    """Codes of 5 bits in two planes, the upper one flipped, against the formula written out."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 32, (rows, blocks, 32))
    low, high = codes & 15, (codes >> 4) ^ 1
    data = np.zeros((rows, blocks, 20), np.uint8)
    data[..., :16] = low[..., :16] | low[..., 16:] << 4
    for e in range(32):
        data[..., 16 + e // 8] |= (high[..., e] << (e % 8)).astype(np.uint8)
    e = np.arange(32)
    planes = (
        Plane(data[..., :16], (e % 16).astype(np.uint16), (e // 16 * 4).astype(np.uint8), 4),
        Plane(
            data[..., 16:],
            (e // 8).astype(np.uint16),
            (e % 8).astype(np.uint8),
            1,
            lift=4,
            flip=255,
        ),
    )
    scales = random.normal(size=(rows, blocks)).astype(np.float16)
    minimums = random.normal(size=(rows, blocks)).astype(np.float16)
    tensor = GroupedTensor(
        Codes(planes, 3), 5, 32, GroupScales(scales), GroupScales(minimums), "test"
    )
    assert tensor.shape == (rows, blocks * 32)
    assert tensor.nbytes == data.size + 4 * rows * blocks
    assert np.array_equal(tensor.codes.values(), codes.reshape(rows, -1))
    wide = np.float32(scales)[..., None] * (codes - 3).astype(np.float32)
    expected = (wide + np.float32(minimums)[..., None]).reshape(rows, -1)
    assert np.array_equal(tensor.dequantize(), expected)
    order = random.permutation(rows)
    assert np.array_equal(tensor.take_rows(order).dequantize(), expected[order])


def test_dense_tensor() -> None:
    values = np.array([[1.0, -2.5], [3.0, 0.15625]], np.float32)
    bf16 = DenseTensor((values.view(np.uint32) >> 16).astype(np.uint16), "bf16")
    for tensor in (DenseTensor(values, "f32"), DenseTensor(values.astype(np.float16), "f16"), bf16):
        assert tensor.shape == (2, 2)
        assert tensor.dequantize().dtype == np.float32
        assert np.array_equal(tensor.dequantize(), values)
        assert np.array_equal(tensor.take_rows(np.array([1])).dequantize(), values[1:])

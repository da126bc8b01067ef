"""The reference operators against formulas written out, one number at a time where it can be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.backends import reference
from octavo.backends.program import CompileOptions
from octavo.errors import ConfigError, KernelError
from octavo.graph import ops as op
from octavo.graph.batch import Batch
from octavo.graph.tensors import (
    Codes,
    DenseTensor,
    GroupedTensor,
    GroupScales,
    Plane,
    StoredTensor,
)
from octavo.graph.trace import CacheGroup, Graph, Node, Ops


def options(**changes: Any) -> CompileOptions:
    settings: dict[str, Any] = {
        "num_threads": 1,
        "block_size": 8,
        "max_num_tokens": 64,
        "max_num_rows": 64,
        "max_model_len": 64,
    }
    return CompileOptions(**(settings | changes))


def one_sequence(num_tokens: int, **changes: Any) -> Batch:
    fields: dict[str, Any] = {
        "token_ids": np.zeros(num_tokens, np.int32),
        "positions": np.arange(num_tokens, dtype=np.int32)[None],
        "query_start_loc": np.array([0, num_tokens], np.int32),
        "seq_lens": np.array([num_tokens], np.int32),
        "block_tables": (),
        "slot_mapping": (),
        "logits_rows": np.zeros(0, np.int32),
    }
    return Batch(**(fields | changes))


def run(graph: Graph, weights: dict[str, StoredTensor], batch: Batch, **changes: Any) -> np.ndarray:
    program = reference.compile(graph, weights, options(**changes))
    program.allocate_cache(64)
    return program.run(batch, None, ["y"]).values["y"]


def dense(*shape: int, seed: int = 0) -> DenseTensor:
    data = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return DenseTensor(data, "f32")


def random_rows(rows: int, features: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, features)).astype(np.float32)


def test_embed_norm_silu_add_and_selected_rows() -> None:
    ops = Ops()
    e = ops.embed("e", 5, 6)
    n = ops.rms_norm(e, "n", 0.01)
    graph = ops.finish(y=ops.select_rows(ops.add(ops.silu_mul(e, n), n)))
    weights: dict[str, StoredTensor] = {"e.weight": dense(5, 6), "n.weight": dense(6, seed=2)}
    batch = one_sequence(
        4,
        token_ids=np.array([3, 0, 4, 3], np.int32),
        logits_rows=np.array([2, 2, 0], np.int32),
    )
    y = run(graph, weights, batch)
    table, norm = (w.dequantize().astype(float) for w in weights.values())
    for out, token in zip(y, (4, 4, 3), strict=True):
        x = table[token]
        normed = x / math.sqrt(sum(x * x) / 6 + 0.01) * norm
        expected = [a / (1 + math.exp(-a)) * b + b for a, b in zip(x, normed, strict=True)]
        np.testing.assert_allclose(out, expected, rtol=2e-6)


def test_silu_of_huge_numbers() -> None:
    ops = Ops()
    x = ops.input("x", 3)
    graph = ops.finish(y=ops.silu_mul(x, x))
    rows = np.array([[-1e5, 0.0, 1e5]], np.float32)
    y = run(graph, {}, one_sequence(1, inputs={"x": rows}))
    assert np.array_equal(y, np.array([[0.0, 0.0, 1e10]], np.float32))


def test_gelu_of_huge_numbers_and_the_formula() -> None:
    ops = Ops()
    x, up = ops.input("x", 5), ops.input("up", 5)
    graph = ops.finish(y=ops.gelu_mul(x, up))
    rows = np.array([[-1e5, 0.0, 1e5, -1.7, 0.6]], np.float32)
    ups = np.full((1, 5), 3.0, np.float32)
    y = run(graph, {}, one_sequence(1, inputs={"x": rows, "up": ups}))
    assert np.array_equal(y[0, :3], np.array([0.0, 0.0, 3e5], np.float32))
    for value, out in zip((-1.7, 0.6), y[0, 3:], strict=True):
        tanh = math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))
        assert out == pytest.approx(3 * value / 2 * (1 + tanh), rel=1e-5)


def test_a_norm_of_heads_is_the_norm_of_each_head() -> None:
    ops = Ops()
    graph = ops.finish(y=ops.rms_norm(ops.input("x", 12), "n", 0.01, num_heads=3))
    weight, x = dense(4), random_rows(2, 12)
    y = run(graph, {"n.weight": weight}, one_sequence(2, inputs={"x": x}))
    for t in range(2):
        for head in range(3):
            h = slice(4 * head, 4 * head + 4)
            root = math.sqrt(sum(x[t, h].astype(float) ** 2) / 4 + 0.01)
            np.testing.assert_allclose(y[t, h], x[t, h] / root * weight.data, rtol=2e-6)


def test_an_embedding_may_be_scaled() -> None:
    ops = Ops()
    graph = ops.finish(y=ops.embed("e", 5, 4, scale=1.5))
    table = dense(5, 4)
    batch = one_sequence(2, token_ids=np.array([3, 0], np.int32))
    y = run(graph, {"e.weight": table}, batch)
    assert np.array_equal(y, table.data[[3, 0]] * np.float32(1.5))


def test_rope_turns_pairs_of_a_half_apart() -> None:
    ops = Ops()
    inv_freq = tuple(float(np.float32(f)) for f in (1.0, 0.1, 0.01))
    graph = ops.finish(y=ops.rope(ops.input("x", 12), 6, inv_freq))
    x = random_rows(3, 12)
    batch = one_sequence(
        3,
        positions=np.array([[20, 21, 22]], np.int32),
        seq_lens=np.array([23], np.int32),
        inputs={"x": x},
    )
    y = run(graph, {}, batch)
    for t, position in enumerate((20, 21, 22)):
        for head in range(2):
            for i, freq in enumerate(inv_freq):
                a, b = 6 * head + i, 6 * head + i + 3
                turned = complex(x[t, a], x[t, b]) * np.exp(1j * np.float32(position * freq))
                assert y[t, a] == pytest.approx(turned.real, abs=1e-6)
                assert y[t, b] == pytest.approx(turned.imag, abs=1e-6)


def grouped(rows: int, columns: int, group: int, seed: int, *, minimums: bool) -> GroupedTensor:
    """Whole bytes as codes, one block a row."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (rows, 1, columns)).astype(np.uint8)
    plane = Plane(codes, np.arange(columns, dtype=np.uint16), np.zeros(columns, np.uint8), 8)
    scales = random.normal(0, 0.01, (rows, columns // group)).astype(np.float16)
    least = GroupScales(random.normal(0, 0.1, scales.shape).astype(np.float16))
    return GroupedTensor(
        Codes((plane,), 128), 8, group, GroupScales(scales), least if minimums else None, "test"
    )


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("minimums", [False, True])
def test_linear_rounds_activations_as_its_contract_says(group: int, minimums: bool) -> None:
    """Every step of the contract in plain Python, with float32 roundings where it has them."""
    ops = Ops()
    graph = ops.finish(y=ops.linear(ops.input("x", 96), "w", 5, bias=True))
    w, bias = grouped(5, 96, group, 3, minimums=minimums), dense(5)
    x = random_rows(3, 96)
    x[1, :group] = 0  # a group of zeros
    x[2, group : 2 * group] = 2.0**-125  # so small that it counts as zeros
    y = run(graph, {"w.weight": w, "w.bias": bias}, one_sequence(3, inputs={"x": x}))

    f = np.float32
    codes = w.codes.values().astype(int)
    for t in range(3):
        for n in range(5):
            total = f(0)
            for g in range(96 // group):
                k = slice(g * group, (g + 1) * group)
                peak = f(max(abs(x[t, k])))
                small = peak < f(2.0**-120)
                scale = f(0) if small else peak / f(127)
                factor = f(0) if small else f(127) / peak
                rounded = [round(float(value * factor)) for value in x[t, k]]
                exact = sum((int(c) - 128) * r for c, r in zip(codes[n, k], rounded, strict=True))
                product = w.scales.values()[n, g] * scale * f(exact)
                if w.minimums is not None:
                    product = product + w.minimums.values()[n, g] * scale * f(sum(rounded))
                total = total + product
            assert y[t, n] == total + bias.data[n]


@given(st.integers(0, 2**32 - 1))
def test_rounded_linear_is_close_to_the_exact_one(seed: int) -> None:
    ops = Ops()
    graph = ops.finish(y=ops.linear(ops.input("x", 64), "w", 7))
    w = grouped(7, 64, 32, seed, minimums=True)
    batch = one_sequence(2, inputs={"x": random_rows(2, 64, seed)})
    rounded, exact = (
        run(graph, {"w.weight": w}, batch, round_activations=r) for r in (True, False)
    )
    expected = batch.inputs["x"].astype(float) @ w.dequantize().astype(float).T
    np.testing.assert_allclose(exact, expected, atol=1e-4)
    bound = np.abs(batch.inputs["x"]).max() / 127 * np.abs(w.dequantize()).sum(axis=1)
    assert (np.abs(rounded - expected) <= bound).all()


def attention_graph(heads: int, kv_heads: int, head_dim: int, scale: float) -> Graph:
    ops = Ops()
    q, k, v = (
        ops.input(name, n * head_dim)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    return ops.finish(y=ops.paged_attention(q, k, v, 0, head_dim=head_dim, scale=scale))


def naive_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, kv_heads: int, scale: float
) -> np.ndarray:
    """Dense causal softmax of one whole sequence in float64, head by head."""
    length = len(q)
    qh = q.reshape(length, heads, -1).astype(float)
    kh, vh = (a.reshape(length, kv_heads, -1).astype(float) for a in (k, v))
    out = np.empty_like(qh)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        for t in range(length):
            weights = np.exp(scale * kh[: t + 1, shared] @ qh[t, head])
            out[t, head] = weights @ vh[: t + 1, shared] / weights.sum()
    return out.reshape(length, -1)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 16]),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_over_scattered_blocks_equals_dense_softmax(
    lengths: list[int], kv_heads: int, share: int, head_dim: int, chunk: int, seed: int
) -> None:
    """Several sequences, whole or in chunks, in shuffled blocks, against each alone."""
    random = np.random.default_rng(seed)
    heads, block_size = kv_heads * share, 8
    graph = attention_graph(heads, kv_heads, head_dim, 0.3)
    program = reference.compile(
        graph, {}, options(cache_dtype="fp32", max_num_tokens=200, block_size=block_size)
    )
    program.allocate_cache(40)
    table = random.permutation(40)[: len(lengths) * 5].reshape(len(lengths), 5)
    inputs = {
        name: [random.normal(size=(n, h * head_dim)).astype(np.float32) for n in lengths]
        for name, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    got: list[list[np.ndarray]] = [[] for _ in lengths]
    for start in range(0, max(lengths), chunk):
        rows = [b for b, n in enumerate(lengths) if n > start]
        ends = [min(lengths[b], start + chunk) for b in rows]
        sizes = [end - start for end in ends]
        owner = np.repeat(np.arange(len(rows)), sizes)
        positions = np.concatenate([np.arange(start, end) for end in ends])
        tables = table[rows]
        slots = tables[owner, positions // block_size] * block_size + positions % block_size
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        batch = one_sequence(
            int(bounds[-1]),
            positions=positions.astype(np.int32)[None],
            query_start_loc=bounds.astype(np.int32),
            seq_lens=np.array(ends, np.int32),
            block_tables=(tables.astype(np.int32),),
            slot_mapping=(slots.astype(np.int32),),
            inputs={
                name: np.concatenate([a[b][start:e] for b, e in zip(rows, ends, strict=True)])
                for name, a in inputs.items()
            },
        )
        y = program.run(batch, None, ["y"]).values["y"]
        for b, part in zip(rows, np.split(y, bounds[1:-1]), strict=True):
            got[b].append(part)
    for b in range(len(lengths)):
        q, k, v = (inputs[name][b] for name in "qkv")
        expected = naive_attention(q, k, v, heads, kv_heads, 0.3)
        np.testing.assert_allclose(np.concatenate(got[b]), expected, atol=2e-5)


@pytest.mark.parametrize(("window", "soft_cap"), [(1, None), (3, None), (None, 0.7), (4, 0.7)])
def test_window_and_soft_cap_written_out(window: int | None, soft_cap: float | None) -> None:
    """One head, one number at a time, on the same values as the graph's cache holds."""
    ops = Ops()
    q, k, v = (ops.input(name, 4) for name in "qkv")
    y = ops.paged_attention(q, k, v, 0, head_dim=4, scale=0.8, window=window, soft_cap=soft_cap)
    inputs = {n: random_rows(8, 4, seed) for seed, n in enumerate("qkv")}
    batch = one_sequence(
        8,
        block_tables=(np.zeros((1, 1), np.int32),),
        slot_mapping=(np.arange(8, dtype=np.int32),),
        inputs=inputs,
    )
    got = run(ops.finish(y=y), {}, batch, cache_dtype="fp32")
    for t in range(8):
        total, sums = 0.0, np.zeros(4)
        for at in range(0 if window is None else max(0, t - window + 1), t + 1):
            score = 0.8 * float(inputs["q"][t].astype(float) @ inputs["k"][at])
            if soft_cap is not None:
                score = soft_cap * math.tanh(score / soft_cap)
            total += math.exp(score)
            sums += math.exp(score) * inputs["v"][at]
        np.testing.assert_allclose(got[t], sums / total, atol=1e-5)


def test_keys_and_values_are_rounded_to_the_cache_also_within_a_step() -> None:
    graph = attention_graph(1, 1, 4, 1.0)
    q, k, v = (random_rows(5, 4, seed) for seed in (1, 2, 3))
    batch = one_sequence(
        5,
        block_tables=(np.zeros((1, 1), np.int32),),
        slot_mapping=(np.arange(5, dtype=np.int32),),
        inputs={"q": q, "k": k, "v": v},
    )
    y = run(graph, {}, batch)
    k16, v16 = (a.astype(np.float16).astype(np.float32) for a in (k, v))
    np.testing.assert_allclose(y, naive_attention(q, k16, v16, 1, 1, 1.0), atol=1e-6)
    assert np.array_equal(y[0], v16[0])


def with_attention(**changes: Any) -> Batch:
    fields: dict[str, Any] = {
        "block_tables": (np.array([[2, 5]], np.int32),),
        "slot_mapping": (np.array([16, 17, 18], np.int32),),
        "inputs": {n: random_rows(3, 4) for n in "qkv"},
    }
    return one_sequence(3, **(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_mapping": (np.array([16, 17, 19], np.int32),)}, "slot_mapping contradicts"),
        ({"positions": np.array([[0, 1, 3]], np.int32)}, "positions do not lead up to"),
        ({"seq_lens": np.array([4], np.int32)}, "positions do not lead up to"),
        ({"query_start_loc": np.array([0, 2], np.int32)}, "query_start_loc"),
        (
            {
                "block_tables": (np.array([[9000, 5]], np.int32),),
                "slot_mapping": (np.array([72000, 72001, 72002], np.int32),),
            },
            "outside the cache",
        ),
        ({"logits_rows": np.zeros(100, np.int32)}, "larger than the program"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    graph = attention_graph(1, 1, 4, 1.0)
    run(graph, {}, with_attention())
    with pytest.raises(KernelError, match=message):
        run(graph, {}, with_attention(**changes))


def test_what_compile_refuses() -> None:
    class Unknown:
        pass

    strange = Node(Unknown(), (), 0, 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no operator Unknown"):
        reference.compile(Graph((strange,), {"y": 0}, {}, ()), {}, options())
    ops = Ops()
    graph = ops.finish(y=ops.linear(ops.input("x", 4), "w", 5))
    with pytest.raises(KernelError, match=r"w\.weight is missing"):
        reference.compile(graph, {}, options())
    with pytest.raises(KernelError, match=r"w\.weight .* not of shape \[5, 4\]"):
        reference.compile(graph, {"w.weight": dense(4, 5)}, options())


def test_a_program_tells_its_sizes_and_closes() -> None:
    ops = Ops()
    x = ops.linear(ops.input("x", 32), "w", 32)
    graph = ops.finish(y=ops.paged_attention(x, x, x, 0, head_dim=16, scale=1.0))
    assert graph.cache_groups == (CacheGroup("full", (0,), 2, 16),)
    seen: list[float] = []
    weight = {"w.weight": dense(32, 32)}
    program = reference.compile(graph, weight, options(), progress=seen.append)
    assert seen[-1] == 1.0 and seen == sorted(seen)
    assert program.weights_bytes == 4 * 32 * 32
    assert program.block_bytes() == 2 * 2 * 16 * 2 * 8
    program.allocate_cache(4)
    with pytest.raises(KernelError, match="once"):
        program.allocate_cache(4)
    with pytest.raises(KernelError, match="no output 'z'"):
        program.run(one_batch_of_zeros(), None, ["z"])
    program.close()
    with pytest.raises(KernelError, match="closed"):
        program.run(one_batch_of_zeros(), None, ["y"])


def one_batch_of_zeros() -> Batch:
    return one_sequence(
        1,
        block_tables=(np.zeros((1, 1), np.int32),),
        slot_mapping=(np.zeros(1, np.int32),),
        inputs={"x": np.zeros((1, 32), np.float32)},
    )


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    ops = Ops()
    graph = ops.finish(y=ops.embed("e", 5, 4))
    for token in (-1, 5):
        batch = one_sequence(1, token_ids=np.array([token], np.int32))
        with pytest.raises(KernelError, match="vocabulary"):
            run(graph, {"e.weight": dense(5, 4)}, batch)


def test_known_operators_are_all_operators() -> None:
    """A new operator in graph/ops must come to the reference backend first."""
    kinds = op.Operator.__args__  # type: ignore[attr-defined]
    from_source = set(reference.program._KNOWN)
    assert set(kinds) == from_source

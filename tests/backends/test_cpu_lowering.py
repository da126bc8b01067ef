"""Lowering: what stages a model becomes, and random graphs against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.backends import cpu, reference
from octavo.backends.cpu.lowering import lower
from octavo.backends.cpu.plan import AttentionStage, LinearStage, Plan, RowsStage, value_bytes
from octavo.backends.program import CompileOptions
from octavo.graph.trace import Graph, Ops, Value

FEATURES = 32
INV_FREQ = tuple(1.0 / (i + 1) for i in range(FEATURES // 4))  # two heads


def layer_graph() -> Graph:
    """One layer of a Llama."""
    ops = Ops()
    x = ops.embed("e", 40, 64)
    h = ops.rms_norm(x, "n1", 1e-5)
    q, k, v = (ops.linear(h, name, 64) for name in "qkv")
    inv_freq = (1.0,) * 16
    a = ops.paged_attention(
        ops.rope(q, 32, inv_freq), ops.rope(k, 32, inv_freq), v, 0, head_dim=32, scale=1.0
    )
    x = ops.add(x, ops.linear(a, "o", 64))
    h = ops.rms_norm(x, "n2", 1e-5)
    gated = ops.silu_mul(ops.linear(h, "gate", 96), ops.linear(h, "up", 96))
    x = ops.add(x, ops.linear(gated, "down", 64))
    logits = ops.linear(ops.select_rows(ops.rms_norm(x, "n3", 1e-5)), "e", 40)
    return ops.finish(logits=logits)


def test_stages_of_a_layer(kit: Any) -> None:
    """Projections that share an input share a stage; sums are residuals; row operators join."""
    graph = layer_graph()
    groups = {name: 32 for name, shape in graph.weights.items() if len(shape) == 2}
    plan = lower(graph, groups, kit.options())
    described = []
    for stage in plan.stages:
        if isinstance(stage, LinearStage):
            names = [part.operator.weight.removesuffix(".weight") for part in stage.parts]
            names += ["residual"] * sum(part.residual is not None for part in stage.parts)
            described.append(" ".join(names))
        elif isinstance(stage, AttentionStage):
            described.append("attention")
        else:
            described.append(", ".join(o.kind for o in stage.ops))
    assert described == [
        "embed, norm, quantize",
        "q k v",
        "rope, rope, write_kv",
        "attention",
        "quantize",
        "o residual",
        "norm, quantize",
        "gate up",
        "silu_mul, quantize",
        "down residual",
        "norm",
        "select, quantize",
        "e",
    ]


def check_places(plan: Plan, options: CompileOptions) -> None:
    """Values that live in one stage share no byte, unless one became the other in place."""
    taken_over = {
        o.out: o.reads[0]
        for stage in plan.stages
        if isinstance(stage, RowsStage)
        for o in stage.ops
        if o.in_place
    }
    for number, stage in enumerate(plan.stages):
        written = {key for s in plan.stages[: number + 1] for key in s.writes()}
        needed = {key for s in plan.stages[number:] for key in [*s.reads(), *s.writes()]}
        alive = (written & needed) - {taken_over[key] for key in written & taken_over.keys()}
        end = 0
        for key in sorted(alive, key=lambda k: plan.places[k]):
            shape = plan.shapes[key]
            rows = options.max_num_rows if shape.selected else options.max_num_tokens
            assert plan.places[key] >= end, f"{key} overlaps another value in {stage}"
            end = plan.places[key] + value_bytes(key, shape.features, rows)
        assert end <= plan.arena_bytes


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, int]:
    """A random graph of values with FEATURES columns, and a seed for its weights."""
    ops = Ops()
    values = [ops.input("x", FEATURES), ops.input("y", FEATURES)]
    for index in range(draw(st.integers(1, 12))):
        kinds = ("norm", "linear", "rope", "silu_mul", "add")
        kind = draw(st.sampled_from(kinds))
        a, b = (values[draw(st.integers(0, len(values) - 1))] for _ in range(2))
        values.append(_apply(ops, kind, a, b, f"w{index}"))
    selected = [ops.select_rows(v) for v in draw(st.lists(st.sampled_from(values), min_size=1))]
    logits = ops.linear(ops.add(selected[0], selected[-1]), "head", 40)
    outputs = {f"v{i}": v for i, v in enumerate(draw(st.lists(st.sampled_from(values))))}
    return ops.finish(logits=logits, **outputs), draw(st.integers(0, 2**32 - 1))


def _apply(ops: Ops, kind: str, a: Value, b: Value, name: str) -> Value:
    if kind == "norm":
        return ops.rms_norm(a, name, 1e-3)
    if kind == "linear":
        return ops.linear(a, name, FEATURES, bias=True)
    if kind == "rope":
        return ops.rope(a, FEATURES // 2, INV_FREQ)
    return ops.silu_mul(a, b) if kind == "silu_mul" else ops.add(a, b)


@settings(max_examples=120, deadline=None)
@given(graphs())
def test_random_graphs(kit: Any, case: tuple[Graph, int]) -> None:
    """Whatever is fused, reused or done in place: the same values as node by node.

    Weights are dense, so that no rounding to int8 magnifies a difference in the last bit.
    """
    graph, seed = case
    rng = np.random.default_rng(seed)
    weights = {
        name: kit.dense(rng.normal(0, 0.2, shape).astype(np.float32))
        for name, shape in graph.weights.items()
    }
    options = kit.options(max_num_tokens=8)
    inputs = {n: rng.normal(0, 1, (5, FEATURES)).astype(np.float32) for n in "xy"}
    batch = kit.batch([kit.Part([0], 2, 5)], logits_rows=[4, 1], inputs=inputs)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference.compile(graph, weights, options).run(batch, None, graph.outputs)
        actual = cpu.compile(graph, weights, options).run(batch, None, graph.outputs)
    for name, value in expected.values.items():
        if np.abs(value).max() < 1e6:
            np.testing.assert_allclose(actual.values[name], value, rtol=1e-3, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sets(st.integers(0, 12)))
def test_places_of_random_graphs(kit: Any, case: tuple[Graph, int], grouped: set[int]) -> None:
    graph, _ = case
    groups = {f"w{i}.weight": 16 for i in grouped}
    check_places(lower(graph, groups, kit.options()), kit.options())


@pytest.mark.parametrize("grouped", [False, True])
def test_value_needed_twice_survives_rope(
    kit: Any, rng: np.random.Generator, grouped: bool
) -> None:
    """Rope works in place only where nobody else reads its input."""
    ops = Ops()
    x = ops.linear(ops.input("x", 32), "w", 32)
    graph = ops.finish(logits=ops.rope(x, 32, (0.5,) * 16), plain=x)
    weight = (
        kit.grouped(rng, 32, 32, 4, 32, minimums=False)
        if grouped
        else kit.dense(rng.normal(0, 1, (32, 32)))
    )
    inputs = {"x": rng.normal(0, 1, (3, 32)).astype(np.float32)}
    batch = kit.batch([kit.Part([0], 5, 3)], inputs=inputs)
    outputs = [
        backend.compile(graph, {"w.weight": weight}, kit.options()).run(
            batch, None, ("plain", "logits")
        )
        for backend in (cpu, reference)
    ]
    for name in ("plain", "logits"):
        np.testing.assert_allclose(outputs[0].values[name], outputs[1].values[name], rtol=1e-5)

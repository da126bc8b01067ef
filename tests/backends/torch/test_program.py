"""Whole graphs in torch: with its own kernels and with Triton's, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from octavo.backends import reference
from octavo.backends import torch as backend
from octavo.backends.program import CompileOptions, DeviceOptions, Program
from octavo.backends.torch.arrays import Staging, put_step
from octavo.backends.torch.graphs import pad_decode
from octavo.backends.torch.kernels import QuantizeMode, StaticScale
from octavo.backends.torch.lowering import Form, GatedCall, LinearCall, NormCall, lower
from octavo.backends.torch.memory import steps_to_load
from octavo.backends.torch.products import form_of
from octavo.backends.torch.program import TorchProgram
from octavo.errors import ConfigError, KernelError
from octavo.graph.batch import Batch
from octavo.graph.tensors import BlockFloatTensor, StoredTensor
from octavo.graph.trace import CacheDtype, Graph, Ops
from octavo.models.rope import RopeConfig

Table = Literal["plain", "triton"]


def options(cache_dtype: CacheDtype = "fp16", **device: Any) -> CompileOptions:
    return CompileOptions(
        num_threads=1,
        block_size=8,
        max_num_tokens=64,
        max_num_rows=16,
        max_model_len=64,
        cache_dtype=cache_dtype,
        device=DeviceOptions(**device),
    )


def steps(kit: Any) -> list[Batch]:
    """A prompt and a chunk of another; then both go on, one by one token, and a third begins."""
    rng = np.random.default_rng(4)
    first, second, third = [3, 1], [4, 2, 6], [5]
    ids = rng.integers(0, 70, 40).tolist()
    return [
        kit.batch([kit.Part(first, 0, 9), kit.Part(second, 0, 11)], 8, token_ids=ids[:20]),
        kit.batch(
            [kit.Part(first, 9, 1), kit.Part(second, 11, 6), kit.Part(third, 0, 3)],
            8,
            token_ids=ids[20:30],
        ),
        kit.batch(
            [kit.Part(first, 10, 1), kit.Part(second, 17, 1), kit.Part(third, 3, 1)],
            8,
            token_ids=ids[30:33],
        ),
    ]


def logits_of(program: Program, batches: list[Batch]) -> list[np.ndarray]:
    program.allocate_cache(8)
    try:
        return [program.run(batch, None, ("logits",)).values["logits"] for batch in batches]
    finally:
        program.close()


@pytest.mark.parametrize(
    ("table", "cache_dtype", "deterministic"),
    [
        ("plain", "fp16", False),
        ("plain", "fp16", True),
        ("plain", "int8", False),
        ("plain", "fp8", False),
        ("triton", "fp16", False),
        ("triton", "int8", True),
    ],
)
def test_a_model_as_the_reference_computes_it(
    kit: Any,
    graph: Graph,
    weights: dict[str, StoredTensor],
    table: Table,
    cache_dtype: CacheDtype,
    deterministic: bool,
) -> None:
    chosen = options(cache_dtype, kernels=table, deterministic=deterministic)
    exact = options("fp32" if cache_dtype == "fp8" else cache_dtype)
    ours = logits_of(backend.compile(graph, weights, chosen), steps(kit))
    theirs = logits_of(reference.compile(graph, weights, exact), steps(kit))
    bound = {"fp16": 2e-3, "int8": 8e-2, "fp8": 1.2}[cache_dtype]
    for actual, expected in zip(ours, theirs, strict=True):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(actual, expected, atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("table", "dtype", "bound"),
    [
        ("plain", "bf16", 0.03),
        ("plain", "fp16", 0.004),
        ("triton", "bf16", 0.03),
        pytest.param("triton", "fp16", 0.004, marks=pytest.mark.slow),
    ],
)
def test_half_precision(
    kit: Any, graph: Graph, weights: dict[str, StoredTensor], table: Table, dtype: str, bound: float
) -> None:
    ours = logits_of(
        backend.compile(graph, weights, options(kernels=table, dtype=dtype)), steps(kit)
    )
    theirs = logits_of(reference.compile(graph, weights, options()), steps(kit))
    for actual, expected in zip(ours, theirs, strict=True):
        error = np.square(actual - expected).mean() / np.square(expected).mean()
        assert (bound / 20) ** 2 < error < bound**2


@pytest.mark.parametrize(
    ("table", "quantization"),
    [("plain", "int8"), ("plain", "int4"), ("plain", "fp8"), ("triton", "int4"), ("triton", "fp8")],
)
def test_weights_rounded_while_loading(
    kit: Any, graph: Graph, weights: dict[str, StoredTensor], table: Table, quantization: str
) -> None:
    dense = backend.compile(graph, weights, options())
    rounded = backend.compile(graph, weights, options(kernels=table, quantization=quantization))
    matrices = sum(
        np.prod(shape) for name, shape in graph.weights.items() if name.endswith("proj.weight")
    )
    saved = {"int8": 3, "fp8": 3, "int4": 2.5}[quantization]  # bytes of 4, as float32
    assert dense.weights_bytes - rounded.weights_bytes > saved * 0.9 * matrices
    ours, exact = logits_of(rounded, steps(kit)), logits_of(dense, steps(kit))
    bound = {"int8": 0.1, "fp8": 0.3, "int4": 0.6}[quantization]
    for actual, expected in zip(ours, exact, strict=True):
        error = np.square(actual - expected).mean() / np.square(expected).mean()
        assert bound**2 / 50 < error < bound**2


def in_fp8(weights: dict[str, StoredTensor], scales: dict[str, float]) -> dict[str, StoredTensor]:
    """With layers in FP8 by rows, and input scales by the last part of a module's name."""
    stored = dict(weights)
    for name, weight in weights.items():
        module = name.split(".")[-2]
        if module.endswith("_proj") and name.endswith(".weight"):
            values = torch.from_numpy(weight.dequantize())
            by_row = values.abs().amax(1, keepdim=True) / 448
            codes = (values / by_row).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            block = (1, values.shape[1])
            scale = scales.get(module)
            stored[name] = BlockFloatTensor(codes, by_row.numpy(), block, scale)
    return stored


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_static_scales_in_both_tables(
    kit: Any, graph: Graph, weights: dict[str, StoredTensor], deterministic: bool
) -> None:
    """Whether the plain one is right, tests/oracle/test_quantized_folders.py knows."""
    names = {name.split(".")[-2] for name in graph.weights if name.endswith("_proj.weight")}
    scales = {name: 0.01 + 0.002 * number for number, name in enumerate(sorted(names))}

    def logits(scales: dict[str, float], table: Table) -> np.ndarray:
        chosen = options(kernels=table, deterministic=deterministic)
        program = backend.compile(graph, in_fp8(weights, scales), chosen)
        return np.concatenate(logits_of(program, steps(kit)))

    plain, triton, rounded_by_token = (
        logits(scales, "plain"),
        logits(scales, "triton"),
        logits({}, "plain"),
    )
    size = np.square(plain).mean()
    assert np.square(triton - plain).mean() < 0.05**2 * size
    assert np.square(rounded_by_token - plain).mean() > 0.15**2 * size


@pytest.mark.parametrize("table", ["plain", "triton"])
def test_rows_that_pad_a_step_change_nothing(
    kit: Any, graph: Graph, weights: dict[str, StoredTensor], table: Table
) -> None:
    program = backend.compile(graph, weights, options(kernels=table, deterministic=True))
    *before, batch = steps(kit)
    program.allocate_cache(8)
    for step in before:
        program.run(step, None)
    blocks = np.arange(8, dtype=np.int32)
    start = np.stack(program.read_blocks(blocks).result())
    expected = program.run(batch, None, ("logits",)).values["logits"]
    after = np.stack(program.read_blocks(blocks).result())
    program.write_blocks(blocks, start)
    padded = pad_decode(batch)
    assert (len(padded.token_ids), len(padded.block_tables[0])) == (4, 4)
    logits = run_padded(program, padded)
    assert logits[:3].tobytes() == expected.tobytes()
    assert np.isfinite(logits).all()
    assert np.stack(program.read_blocks(blocks).result()).tobytes() == after.tobytes()


def run_padded(program: TorchProgram, batch: Batch) -> np.ndarray:
    """As captured graphs are computed."""
    executor = program._alive()
    step, ids, rows = put_step(Staging(torch.device("cpu")), batch, torch.zeros(0), 128)
    assert step.block_tables.shape == (4, 128)
    step = replace(step, max_seq_len=128 * 8)
    values = executor.run(step, ids, rows, {}, {"logits"})
    return np.array(values["logits"].float().numpy())


def test_the_largest_steps_need_a_pool_of_one_block(
    graph: Graph, weights: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = backend.compile(graph, weights, options())
    run, steps = program.run, []

    def note(batch: Batch, rows: Any) -> Any:
        width = batch.block_tables[0].shape[1]
        steps.append((len(batch.token_ids), width, len(batch.logits_rows)))
        return run(batch, rows)

    monkeypatch.setattr(program, "run", note)
    program._run_largest()
    assert steps == [(64, 8, 16), (16, 8, 16), (64, 8, 16)]
    assert program.spare_bytes() is None, "torch's CPU device has no memory of its own"


def test_loading_kernels_leaves_no_trace(
    graph: Graph, weights: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = backend.compile(graph, weights, options())
    run, steps = program.run, []

    def note(batch: Batch, rows: Any) -> Any:
        output = run(batch, rows)
        assert (output.tokens >= 0).all()
        steps.append((len(batch.token_ids), output.top_ids.shape[1]))
        return output

    monkeypatch.setattr(program, "run", note)
    program.allocate_cache(3)
    program._run_all(steps_to_load(program._options))
    assert [tokens for tokens, _ in steps] == [1, 2, 8, 17], "a step has 64 tokens"
    assert [wanted for _, wanted in steps] == [0, 0, 20, 20]
    assert not np.stack(program.read_blocks(np.arange(3, dtype=np.int32)).result()).any()


def test_operators_run_together(graph: Graph) -> None:
    calls = lower(graph, lambda name: Form(("dense",)))
    # In the one layer qkv, o, gate and up, down; and the head.
    assert len([c for c in calls if isinstance(c, LinearCall)]) == 4 + 1
    norms = [c for c in calls if isinstance(c, NormCall)]
    assert [norm.residual is not None for norm in norms] == [False, True, True]
    # Embedding, head and the choice of rows; five kinds of calls a layer beside the last norm.
    assert len(calls) == 3 + 1 + 8


def test_norms_round_for_the_products_that_follow(graph: Graph) -> None:
    def form(name: str) -> Form:
        return Form(("dense",)) if "lm_head" in name else Form(("codes",), "fp8 token")

    norms = [call for call in lower(graph, form) if isinstance(call, NormCall)]
    assert [norm.quantize for norm in norms[:-1]] == ["fp8 token"] * 2
    assert norms[-1].quantize is None, "the head, and the output named hidden, want numbers"


def test_what_is_joined_is_rounded_by_the_greatest_scale(graph: Graph) -> None:
    scales = {"q_proj": 0.1, "k_proj": 0.3, "v_proj": 0.2, "gate_proj": 0.5, "up_proj": 0.4}

    def form(name: str) -> Form:
        scale = scales.get(name.split(".")[-2], 0.6)
        return Form(("dense",)) if "lm_head" in name else Form(("codes",), StaticScale(scale))

    calls = lower(graph, form)
    products = [call.quantize for call in calls if isinstance(call, LinearCall)]
    norms = [call.quantize for call in calls if isinstance(call, NormCall)]
    gates = [call.quantize for call in calls if isinstance(call, GatedCall)]
    assert products == [*map(StaticScale, (0.3, 0.6, 0.5, 0.6)), None]
    assert norms == [StaticScale(0.3), StaticScale(0.5), None]
    assert gates == [StaticScale(0.6)]


@pytest.mark.parametrize("other", ["fp8 token", StaticScale(0.2)])
def test_a_norm_rounds_in_one_way_only(graph: Graph, other: QuantizeMode) -> None:
    def form(name: str) -> Form:
        if "v_proj" in name:
            return Form(("other",), other)
        return Form(("codes",), StaticScale(0.1))

    calls = lower(graph, form)
    products = [call.quantize for call in calls if isinstance(call, LinearCall)]
    norms = [call.quantize for call in calls if isinstance(call, NormCall)]
    assert products[:3] == [StaticScale(0.1), other, StaticScale(0.1)]
    assert norms[:2] == [None, StaticScale(0.1)]


def test_which_weights_have_static_scales() -> None:
    def form(block: tuple[int, int], scale: float | None, has_fp8: bool = True) -> Form:
        grid = (-(-256 // block[0]), -(-384 // block[1]))
        codes, scales = np.zeros((256, 384), np.uint8), np.ones(grid, np.float32)
        return form_of("a", BlockFloatTensor(codes, scales, block, scale), None, has_fp8)

    for block in ((256, 384), (1, 384)):
        assert form(block, 0.5).quantize == StaticScale(0.5)
        assert form(block, 0.5).kind == form(block, 0.25).kind != form(block, None).kind
        assert form(block, None).quantize == "fp8 token"
        assert form(block, 0.5, has_fp8=False).quantize is None
    assert form((128, 128), 0.5).quantize == "fp8 group"


def test_weights_of_two_kinds_are_not_joined(graph: Graph) -> None:
    calls = lower(graph, lambda name: Form(("k" if "k_proj" in name else "other",)))
    joined = [[o.weight for o in c.operators] for c in calls if isinstance(c, LinearCall)]
    assert [len(names) for names in joined[:2]] == [2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.array([1, 70, 3], np.int32)}, "a token id"),
        ({"slot_mapping": (np.array([1, 2, 64], np.int32),)}, "a slot"),
        ({"block_tables": (np.array([[3, 1, 0], [4, 2, 6], [8, 0, 0]], np.int32),)}, "a block"),
        ({"block_tables": (np.array([[3, 1], [4, 2], [5, 0]], np.int32),)}, "too short"),
        ({"logits_rows": np.array([0, 3], np.int32)}, "a row of logits"),
        ({"seq_lens": np.array([11, 65, 4], np.int32)}, "max_model_len"),
        ({"query_start_loc": np.array([0, 1, 1, 3], np.int32)}, "query_start_loc"),
    ],
)
def test_a_batch_that_would_read_elsewhere_is_refused(
    kit: Any, graph: Graph, weights: dict[str, StoredTensor], change: dict[str, Any], message: str
) -> None:
    program = backend.compile(graph, weights, options())
    program.allocate_cache(8)
    with pytest.raises(KernelError, match=message):
        program.run(replace(steps(kit)[2], **change), None)


def test_what_this_backend_lacks_is_named(weights: dict[str, StoredTensor]) -> None:
    ops = Ops()
    rotated = ops.rope(ops.input("x", 16), 16, RopeConfig().inv_freq(16))
    with pytest.raises(ConfigError, match="rotates queries and keys of attention alone"):
        backend.compile(ops.finish(out=ops.add(rotated, rotated)), {}, options())

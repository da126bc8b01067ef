"""Calls outside the contract are KernelErrors that say what is wrong, and change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from octavo.backends import cpu
from octavo.backends.program import Program
from octavo.errors import KernelError
from octavo.graph.batch import Batch
from octavo.graph.trace import Ops, Value

VOCAB, HEAD_DIM = 50, 16


def attend(ops: Ops) -> Value:
    x = ops.embed("e", VOCAB, HEAD_DIM)
    rotated = ops.rope(x, HEAD_DIM, tuple(1.0 / (i + 1) for i in range(HEAD_DIM // 2)))
    a = ops.paged_attention(rotated, rotated, x, 0, head_dim=HEAD_DIM, scale=0.25)
    return ops.linear(ops.select_rows(a), "e", VOCAB)


@pytest.fixture
def program(kit: Any, rng: np.random.Generator) -> Program:
    """Embedding, rope, attention and logits, with ten blocks."""
    weights = {"e.weight": kit.dense(rng.normal(0, 1, (VOCAB, HEAD_DIM)))}
    made: Program = kit.compile(kit.graph(attend), weights, kit.options(max_num_tokens=32))
    made.allocate_cache(10)
    return made


def good_batch(kit: Any) -> Batch:
    parts = [kit.Part([3, 4], 16, 8), kit.Part([9], 0, 1)]
    batch: Batch = kit.batch(parts, token_ids=range(9))
    return batch


def i32(*values: int) -> Any:
    return np.array(values, np.int32)


def edited(field: str, at: Any, value: int) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        whole = getattr(batch, field)
        array = (whole[0] if isinstance(whole, tuple) else whole).copy()
        array[at] = value
        return dataclasses.replace(
            batch, **{field: (array,) if isinstance(whole, tuple) else array}
        )

    return change


BAD_BATCHES: dict[str, tuple[Callable[[Batch], Batch], str]] = {
    "token id": (edited("token_ids", 2, VOCAB), "token id"),
    "negative token id": (edited("token_ids", 2, -1), "token id"),
    "position": (edited("positions", (0, 8), 512), "max_model_len"),
    "negative position": (edited("positions", (0, 8), -1), "max_model_len"),
    "position past the end": (edited("positions", (0, 8), 1), "past the end"),
    "gap in positions": (edited("positions", (0, 3), 20), "follow each other"),
    "block id": (edited("block_tables", (0, 1), 10), "block id"),
    "negative block id": (edited("block_tables", (0, 0), -1), "block id"),
    "slot": (edited("slot_mapping", 0, 160), "slot"),
    "negative slot": (edited("slot_mapping", 0, -5), "slot"),
    "logits row": (edited("logits_rows", 0, 9), "logits_rows"),
    "sequence without blocks": (edited("seq_lens", 1, 40), "too short"),
    "sequence shorter than its tokens": (edited("seq_lens", 0, 7), "too short"),
    "starts": (edited("query_start_loc", 1, 20), "query_start_loc"),
    "ends": (edited("query_start_loc", 2, 8), "query_start_loc"),
    "dtype": (
        lambda b: dataclasses.replace(b, token_ids=b.token_ids.astype(np.int64)),
        "token_ids",
    ),
    "rank": (lambda b: dataclasses.replace(b, positions=b.positions[0]), "positions"),
    "length": (lambda b: dataclasses.replace(b, slot_mapping=(i32(1, 2),)), "slot_mapping"),
    "strides": (
        lambda b: dataclasses.replace(b, token_ids=np.repeat(b.token_ids, 2)[::2]),
        "token_ids",
    ),
    "no tokens": (
        lambda b: dataclasses.replace(
            b, token_ids=i32(), positions=np.zeros((1, 0), np.int32), slot_mapping=(i32(),)
        ),
        "max_num_tokens",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(kit: Any, program: Program, case: str) -> None:
    change, words = BAD_BATCHES[case]
    good = good_batch(kit)
    before = program.run(good, None, ("out",)).values["out"]
    with pytest.raises(KernelError, match=words):
        program.run(change(good), None)
    assert program.run(good, None, ("out",)).values["out"].tobytes() == before.tobytes()


def test_too_many_tokens(kit: Any, program: Program) -> None:
    batch = kit.batch([kit.Part(range(3), 0, 33)])
    with pytest.raises(KernelError, match="max_num_tokens"):
        program.run(batch, None)


def test_read_only_arrays_are_welcome(kit: Any, program: Program) -> None:
    batch = good_batch(kit)
    for array in (batch.token_ids, batch.positions, batch.slot_mapping[0], batch.block_tables[0]):
        array.flags.writeable = False
    assert len(program.run(batch, kit.rows(2)).tokens) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": np.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition": 0.0}, "repetition"),
        ({"seen": [{VOCAB: 1}, {}]}, "penalties"),
        ({"bias": [{}, {-1: 1.0}]}, "bias"),
        ({"num_logprobs": VOCAB + 1}, "num_logprobs"),
    ],
)
def test_bad_sampling_rows(kit: Any, program: Program, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        program.run(good_batch(kit), kit.rows(2, **changes))


def test_rows_of_another_number(kit: Any, program: Program) -> None:
    with pytest.raises(KernelError, match="temperature has 3 elements, not 2"):
        program.run(good_batch(kit), kit.rows(3))


def test_life_of_a_program(kit: Any, program: Program) -> None:
    with pytest.raises(KernelError, match="allocated already"):
        program.allocate_cache(3)
    assert program.block_bytes() == 2 * 16 * HEAD_DIM * 2
    assert program.weights_bytes == 64 * HEAD_DIM * 4  # rows padded to panels of 32
    assert program.description.startswith("cpu ")
    with pytest.raises(KernelError, match="no output spam"):
        program.run(good_batch(kit), None, ("spam",))
    program.close()
    with pytest.raises(KernelError, match="closed"):
        program.run(good_batch(kit), None)


def test_no_cache_yet(kit: Any, rng: np.random.Generator) -> None:
    weights = {"e.weight": kit.dense(rng.normal(0, 1, (VOCAB, HEAD_DIM)))}
    program = kit.compile(kit.graph(attend), weights, kit.options())
    with pytest.raises(KernelError, match="allocate_cache"):
        program.run(good_batch(kit), None)


def test_blocks_begin_as_zeros(kit: Any) -> None:
    """A sequence may be told to lie in blocks that nobody wrote: K and V of zeros."""
    graph = kit.graph(
        lambda ops: ops.paged_attention(
            *(ops.input(n, 16) for n in "qkv"), 0, head_dim=16, scale=1.0
        )
    )
    program = kit.compile(graph, {}, kit.options())
    program.allocate_cache(2)
    ones = {n: np.ones((1, 16), np.float32) for n in "qkv"}
    batch = kit.batch([kit.Part([0, 1], 19, 1)], inputs=ones)
    out = program.run(batch, None, ("out",)).values["out"]
    weight = np.exp(16.0) / (np.exp(16.0) + 19)  # one token of ones among nineteen of zeros
    np.testing.assert_allclose(out, weight, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda ops: ops.paged_attention(
                *(ops.input(n, 24) for n in "qkv"), 3, head_dim=24, scale=1.0
            ),
            "PagedAttention of layer 3: head_dim 24",
        ),
        (
            lambda ops: ops.paged_attention(
                ops.input("q", 48), ops.input("k", 32), ops.input("v", 32), 0, head_dim=16, scale=1
            ),
            "3 heads do not share 2",
        ),
        (lambda ops: ops.rope(ops.input("x", 32), 32, (1.0,)), "Rope: head_dim 32"),
        (lambda ops: ops.rms_norm(ops.input("x", 32), "missing", 1e-5), "missing.weight"),
    ],
)
def test_graphs_outside_the_contract(kit: Any, build: Callable[[Ops], Value], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        kit.compile(kit.graph(build), {}, kit.options())


def test_unknown_instruction_set(kit: Any) -> None:
    graph = kit.graph(lambda ops: ops.input("x", 16))
    with pytest.raises(KernelError, match="mmx"):
        kit.compile(graph, {}, kit.options(isa="mmx"))


def test_block_size(kit: Any) -> None:
    graph = kit.graph(lambda ops: ops.input("x", 16))
    with pytest.raises(KernelError, match="block_size"):
        kit.compile(graph, {}, kit.options(block_size=48))


def test_inputs_are_checked(kit: Any) -> None:
    program = kit.compile(kit.graph(lambda ops: ops.input("x", 16)), {}, kit.options())
    part = kit.Part([0], 0, 3)
    for bad in ({}, {"x": np.zeros((2, 16), np.float32)}, {"x": np.zeros((3, 16))}):
        with pytest.raises(KernelError, match="input x"):
            program.run(kit.batch([part], inputs=bad), None)


def test_progress_reaches_one(kit: Any, rng: np.random.Generator) -> None:
    graph = kit.graph(lambda ops: ops.linear(ops.embed("e", 40, 32), "w", 8))
    weights = {
        "e.weight": kit.dense(rng.normal(0, 1, (40, 32))),
        "w.weight": kit.dense(rng.normal(0, 1, (8, 32))),
    }
    seen: list[float] = []
    cpu.compile(graph, weights, kit.options(), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_steps_from_two_threads(kit: Any, rng: np.random.Generator) -> None:
    """A step beside another is refused or comes after it; it never disturbs it."""
    graph = kit.graph(lambda ops: ops.linear(ops.input("x", 512), "w", 512))
    weights = {"w.weight": kit.dense(rng.normal(0, 1, (512, 512)))}
    program = kit.compile(graph, weights, kit.options())
    inputs = {"x": rng.normal(0, 1, (64, 512)).astype(np.float32)}
    batch = kit.batch([kit.Part(range(4), 0, 64)], inputs=inputs)
    wanted = program.run(batch, None, ("out",)).values["out"]

    def steps() -> int:
        refused = 0
        for _ in range(50):
            try:
                program.run(batch, None)
            except KernelError as error:
                assert "another thread" in str(error)
                refused += 1
        return refused

    with ThreadPoolExecutor(3) as threads:
        counts = [future.result() for future in [threads.submit(steps) for _ in range(3)]]
    assert sum(counts) < 150
    assert program.run(batch, None, ("out",)).values["out"].tobytes() == wanted.tobytes()

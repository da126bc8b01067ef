"""Part A: captured steps beside eager ones, steps begun ahead, block moves, of whole Programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from octavo.backends import torch as backend
from octavo.backends.program import Bytes, CompileOptions, DeviceOptions
from octavo.backends.torch.program import TorchProgram
from octavo.graph.batch import Int32, StepOutput
from octavo.graph.trace import CacheDtype, Graph, Ops
from octavo.models.llama import llama
from parts.check import Checks
from parts.machine import Setup, release
from parts.record import Recorder
from parts.steps import decode_of, sampled_before, sampling_rows, shuffled_tables, step_of
from parts.text import BLOCK_SIZE, BOUNDS, CONFIG, seeded_weights

PROMPT = 21
WIDTH = 5
EQUAL, OTHER = 0.0, float("inf")


def run(setup: Setup, recorder: Recorder) -> None:
    """For each cache dtype and rounding of weights."""
    checks = Checks(setup, recorder, "Programs")
    graph = llama(Ops(), CONFIG)
    dtypes: tuple[CacheDtype, ...] = ("fp16",) if setup.quick else ("fp16", "int8", "fp8")
    for dtype in dtypes:
        for count in (1, 5) if setup.quick else (1, 3, 9, 17):
            checks.add(
                f"captured steps as eager ones, {count} sequences, cache {dtype}",
                lambda d=dtype, c=count: captured(setup, graph, d, c),
            )
            checks.add(
                f"captured steps near eager ones, default mode, {count} sequences, cache {dtype}",
                lambda d=dtype, c=count: captured_by_default(setup, graph, d, c),
            )
        checks.add(
            f"blocks read, written, copied, cache {dtype}", lambda d=dtype: moves(setup, graph, d)
        )
    for rounding in (None,) if setup.quick else (None, "int8", "int4", "fp8"):
        name = rounding or "bf16"
        checks.add(
            f"steps begun ahead as one by one, weights {name}",
            lambda r=rounding: ahead(setup, graph, r),
        )
    checks.add("blocks out to host memory and back, unwaited for", lambda: tier(setup, graph))
    checks.add("memory is measured", lambda: memory(setup, graph))


@contextmanager
def program_of(
    setup: Setup,
    graph: Graph,
    cache_dtype: CacheDtype = "fp16",
    rounding: Any = None,
    *,
    deterministic: bool = True,
) -> Iterator[TorchProgram]:
    """A Program with a cache of 128 blocks."""
    options = CompileOptions(
        num_threads=1,
        block_size=BLOCK_SIZE,
        max_num_tokens=512,
        max_num_rows=32,
        max_model_len=CONFIG.max_position_embeddings,
        cache_dtype=cache_dtype,
        device=DeviceOptions(
            name=str(setup.device),
            dtype="bf16",
            deterministic=deterministic,
            quantization=rounding,
            kernels=setup.table,
        ),
    )
    program = backend.compile(graph, seeded_weights(graph, "bf16"), options)
    program.allocate_cache(128)
    try:
        yield program
    finally:
        program.close()
        release(setup.device)


def prompt_of(program: TorchProgram, count: int) -> tuple[Int32, Int32]:
    """Compute prompts of other lengths; returns block tables and lengths."""
    tables = shuffled_tables(count, WIDTH)
    lengths = (PROMPT + np.arange(count) % 7).astype(np.int32)
    ids = np.random.default_rng(3).integers(0, CONFIG.vocab_size, int(lengths.sum()))
    batch = step_of(tables, lengths * 0, lengths, ids.astype(np.int32), BLOCK_SIZE)
    program.start(batch, sampling_rows(count)).result()
    return tables, lengths


def captured(setup: Setup, graph: Graph, cache_dtype: CacheDtype, count: int) -> float:
    """Five steps: loaded, captured, replayed; each beside `run`, which computes it eagerly.

    The mode is deterministic, so rows that pad a captured step change no bit.
    """
    rows = sampling_rows(count, num_logprobs=5)
    with program_of(setup, graph, cache_dtype) as program:
        tables, lengths = prompt_of(program, count)
        ids = np.arange(count, dtype=np.int32)
        for number in range(5):
            batch = decode_of(tables, lengths + np.int32(number), ids, BLOCK_SIZE)
            eager = program.run(batch, rows, ("logits",))
            replayed = program.start(batch, rows).result()
            if not same(eager, replayed):
                return OTHER
            ids = replayed.tokens
    return EQUAL


def captured_by_default(setup: Setup, graph: Graph, cache_dtype: CacheDtype, count: int) -> float:
    """The same in default mode, where rows that pad a step may change how sums are cut.

    The token of a captured step must be as good as the eager one's, its log probability near.
    """
    rows, each = sampling_rows(count, num_logprobs=0), np.arange(count)
    worst = 0.0
    with program_of(setup, graph, cache_dtype, deterministic=False) as program:
        tables, lengths = prompt_of(program, count)
        ids = np.arange(count, dtype=np.int32)
        for number in range(5):
            batch = decode_of(tables, lengths + np.int32(number), ids, BLOCK_SIZE)
            logits = program.run(batch, None, ("logits",)).values["logits"].astype(np.float64)
            replayed = program.start(batch, rows).result()
            ids = replayed.tokens
            if ids.min() < 0:
                return OTHER
            expected = logits[each, ids] - np.logaddexp.reduce(logits, axis=1)
            behind = logits.max(axis=1) - logits[each, ids]
            found = max(behind.max(), np.abs(replayed.logprobs - expected).max())
            worst = max(worst, float(found) / BOUNDS["bf16"])
    return worst


def same(one: StepOutput, other: StepOutput) -> bool:
    """To the bit."""
    return (
        one.tokens.tobytes() == other.tokens.tobytes()
        and one.logprobs.tobytes() == other.logprobs.tobytes()
        and one.top_ids.tobytes() == other.top_ids.tobytes()
        and one.top_logprobs.tobytes() == other.top_logprobs.tobytes()
        and int(one.tokens.min()) >= 0
    )


def ahead(setup: Setup, graph: Graph, rounding: str | None, steps: int = 12) -> float:
    """Two steps under way at a time, tokens fed back on the device."""
    count = 5

    def changes(number: int) -> dict[str, Any]:
        return {"temperature": [0, 1, 1, 0, 2], "seed": 7, "position": PROMPT + number}

    def texts(is_ahead: bool) -> Int32:
        with program_of(setup, graph, rounding=rounding) as program:
            tables, lengths = prompt_of(program, count)
            ids, text, pending = np.arange(count, dtype=np.int32), [], []
            for number in range(steps):
                batch = decode_of(tables, lengths + np.int32(number), ids, BLOCK_SIZE)
                pending.append(program.start(batch, sampling_rows(count, **changes(number))))
                if not is_ahead or len(pending) == program.depth:
                    text.append(pending.pop(0).result().tokens)
                ids = sampled_before(count) if is_ahead else text[-1]
            text += [step.result().tokens for step in pending]
            return np.stack(text)

    one, other = texts(False), texts(True)
    return EQUAL if one.tobytes() == other.tobytes() and one.min() >= 0 else OTHER


def moves(setup: Setup, graph: Graph, cache_dtype: CacheDtype) -> float:
    """What is copied, or read and written, reads as it was."""
    with program_of(setup, graph, cache_dtype) as program:
        tables, _ = prompt_of(program, 3)
        source = tables[:, 0].copy()
        before = read(program, source)
        to = np.array([120, 121, 122], np.int32)
        program.copy_blocks(np.stack([source, to], axis=1).astype(np.int32))
        copied = read(program, to)
        program.write_blocks(to, list(before[::-1]))
        written = read(program, to)
        is_right = (
            before.any()
            and np.array_equal(copied, before)
            and np.array_equal(written, before[::-1])
            and np.array_equal(read(program, source), before)
        )
    return EQUAL if is_right else OTHER


def read(program: TorchProgram, blocks: Int32) -> Bytes:
    """The content of blocks, waited for."""
    return np.stack(program.read_blocks(blocks).result())


def tier(setup: Setup, graph: Graph) -> float:
    """Blocks keep their bytes that leave the pool and come back, though the host hardly waits.

    What is read is overwritten at once, and what was just written from host memory is read into
    anew: only the order of the device's streams keeps all of it right.
    """
    dice = np.random.default_rng(5)
    with program_of(setup, graph, "fp16") as program:
        size = program.block_bytes()
        expected = dice.integers(0, 256, (100, size), np.uint8)
        program.write_blocks(np.arange(100, dtype=np.int32), list(expected))
        rooms = [list(program.host_memory(10 * size).reshape(10, size)) for _ in range(2)]
        held = [expected[:0], expected[:0]]
        pending = None
        for number in range(20 if setup.quick else 400):
            turn = number % 2
            leaving, coming = dice.permutation(100).astype(np.int32)[:20].reshape(2, 10)
            held[turn] = expected[leaving]
            reading = program.read_blocks(leaving, rooms[turn])
            program.copy_blocks(np.stack([coming, leaving], axis=1))
            expected[leaving] = expected[coming]
            if pending is not None:
                pending.result()
                program.write_blocks(coming, rooms[1 - turn])
                expected[coming] = held[1 - turn]
            pending = reading
        is_right = np.array_equal(read(program, np.arange(100, dtype=np.int32)), expected)
    return EQUAL if is_right else OTHER


def memory(setup: Setup, graph: Graph) -> float:
    """Some, and less than there is; nothing on a CPU, where it is the host's."""
    options = CompileOptions(
        num_threads=1, block_size=BLOCK_SIZE, max_num_tokens=256, max_num_rows=32,
        max_model_len=256, device=DeviceOptions(name=str(setup.device), kernels=setup.table),
    )  # fmt: skip
    program = backend.compile(graph, seeded_weights(graph, "bf16"), options)
    spare = program.spare_bytes()
    program.close()
    if not setup.is_gpu:
        return EQUAL if spare is None else OTHER
    assert spare is not None
    return EQUAL if 0 < spare < torch.cuda.mem_get_info(setup.device)[1] else OTHER

"""Part C: prefill and decode with dummy weights, against what the device can do at most."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from octavo.backends.program import PendingOutput
from octavo.graph.batch import Int32
from parts import dummy
from parts.dummy import BLOCK_SIZE, Dummy, Precision
from parts.machine import (
    MILLISECOND,
    Limits,
    Setup,
    device_seconds,
    free_bytes,
    measure_limits,
    wall_seconds,
)
from parts.record import Recorder
from parts.steps import decode_of, sampled_before, sampling_rows, shuffled_tables, step_of

PROMPT = 2048
CONTEXT = 512
BATCHES = (1, 8, 32, 128, 256)
STEPS = 24
QUEUED = 8
"""Steps that are timed on the device without the host."""
HEAD_START = 150 * MILLISECOND
"""In which the host begins them all."""
ROOM = 4 << 30
"""Bytes that a step takes beside weights and cache."""
DECODE_SHARE: dict[Precision, float] = {"bf16": 0.75, "fp8": 0.75, "int4": 0.55}
PREFILL_SHARE = 0.60
HOST_GAP = 0.05


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode steps of one batch size.

    Attributes:
        wall: seconds a step, the host preparing the next one meanwhile.
        device: seconds of the device's work in a step.
    """

    wall: float
    device: float

    @property
    def gap(self) -> float:
        """The part of a step in which the device waits for the host."""
        return max(0.0, 1 - self.device / self.wall)


def run(setup: Setup, recorder: Recorder, name: str, precision: Precision) -> None:
    """Measure a model; what it holds is freed with the process."""
    limits = measure_limits(setup)
    report_limits(recorder, limits)
    config = dummy.shape_of(name, setup)
    title = f"{name} {precision}"
    if not dummy.fits(setup, config, precision):
        needed = dummy.estimated_bytes(config, precision) / 2**30
        recorder.add("Prefill", title, {"left out": f"needs {needed:.0f} GiB for weights"})
        return
    model = dummy.make(setup, config, precision)
    measure(setup, recorder, model, (title, precision), limits)


def report_limits(recorder: Recorder, limits: Limits) -> None:
    """What the shares are of."""
    cells = {
        "TB/s copied": limits.bandwidth / 1e12,
        "TFLOP/s bf16": limits.bf16 / 1e12,
        "TFLOP/s fp8": limits.fp8 / 1e12,
    }
    recorder.add("Limits, measured first", "device", cells)


def measure(
    setup: Setup,
    recorder: Recorder,
    model: Dummy,
    case: tuple[str, Precision],
    limits: Limits,
) -> None:
    """Prefill, then decode in each batch size, each if the cache has room for it."""
    title, precision = case
    batches, context, prompt, steps = sizes_of(setup)
    width = width_of(context, steps)
    wanted = 1 + max(-(-prompt // BLOCK_SIZE), width * max(batches))
    room = free_bytes(setup.device) - ROOM
    num_blocks = min(wanted, room // model.program.block_bytes()) if setup.is_gpu else wanted
    model.program.allocate_cache(num_blocks)
    dummy.fill_cache(model.program)
    if 1 + -(-prompt // BLOCK_SIZE) > num_blocks:
        recorder.add("Prefill", title, {"left out": "no room for its cache"})
    else:
        prefill = partial(report_prefill, setup, recorder, model, title, limits)
        recorder.attempt("Prefill", title, prefill)
    for batch in batches:
        name = f"{title}, batch {batch}"
        if 1 + width * batch > num_blocks:
            recorder.add("Decode", name, {"left out": "no room for its cache"})
            continue
        decode = partial(report_decode, setup, recorder, model, (title, precision, batch), limits)
        recorder.attempt("Decode", name, decode)


def report_prefill(
    setup: Setup, recorder: Recorder, model: Dummy, title: str, limits: Limits
) -> None:
    """One row: rate, share of the device's."""
    _, _, prompt, _ = sizes_of(setup)
    seconds = prefill_seconds(setup, model, prompt)
    operations = prompt * model.linear_operations + model.head_operations
    operations += model.attention_operations(prompt * (prompt + 1) // 2)
    share = operations / seconds / limits.bf16
    recorder.add(
        "Prefill",
        title,
        {"tok/s": prompt / seconds, "ms": seconds * 1e3, "of the bf16 rate": percent(share)},
        ok=setup.met(share >= PREFILL_SHARE),
        target=f"at least {percent(PREFILL_SHARE)} of the bf16 rate",
    )


def sizes_of(setup: Setup) -> tuple[tuple[int, ...], int, int, int]:
    """Batches, context, prompt and steps."""
    if setup.quick:
        return (1, 3), 20, 40, 3
    return BATCHES, CONTEXT, PROMPT, 3 if setup.warm else STEPS


def width_of(context: int, steps: int) -> int:
    """Blocks that a sequence needs while its decode steps are timed."""
    return -(-(context + steps + 1) // BLOCK_SIZE)


def report_decode(
    setup: Setup,
    recorder: Recorder,
    model: Dummy,
    case: tuple[str, Precision, int],
    limits: Limits,
) -> None:
    """One row: rate, share of the floor, gap."""
    title, precision, batch = case
    _, context, _, steps = sizes_of(setup)
    decode = decode_seconds(setup, model, batch, context, steps)
    tokens = context + steps // 2
    moved = model.read_bytes + batch * tokens * model.token_bytes()
    operations = batch * (model.linear_operations + model.head_operations)
    rate = limits.fp8 if precision == "fp8" and limits.fp8 else limits.bf16
    floor = max(moved / limits.bandwidth, operations / rate)
    share = floor / decode.wall
    least = DECODE_SHARE[precision]
    targets = [f"gap at most {percent(HOST_GAP)}"]
    holds = decode.gap <= HOST_GAP
    if batch == 1:
        targets.insert(0, f"at least {percent(least)} of the floor")
        holds = holds and share >= least
    recorder.add(
        "Decode",
        f"{title}, batch {batch}",
        {
            "tok/s": batch / decode.wall,
            "ms a step": decode.wall * 1e3,
            "of it device": decode.device * 1e3,
            "floor ms": floor * 1e3,
            "floor / step": percent(share),
            "host gap": percent(decode.gap),
        },
        ok=setup.met(holds),
        target=", ".join(targets),
    )


def percent(share: float) -> str:
    """For people."""
    return f"{100 * share:.1f} %"


def prefill_seconds(setup: Setup, model: Dummy, prompt: int, count: int = 4) -> float:
    """A prompt computed at once; its first token is sampled."""
    width = -(-prompt // BLOCK_SIZE)
    counts = np.array([prompt], np.int32)
    ids = np.arange(prompt, dtype=np.int32) % model.config.vocab_size
    batch = step_of(shuffled_tables(1, width), counts * 0, counts, ids, BLOCK_SIZE)
    rows = sampling_rows(1)
    for _ in range(2):
        model.program.start(batch, rows).result()

    def several() -> None:
        pending = [model.program.start(batch, rows) for _ in range(count)]
        pending[-1].result()

    return min(wall_seconds(several, setup.device) for _ in range(2)) / count


def decode_seconds(setup: Setup, model: Dummy, batch: int, context: int, steps: int) -> Decode:
    """Steps of one token a sequence, two of them under way at a time."""
    width = width_of(context, steps)
    tables = shuffled_tables(batch, width)
    lengths = np.full(batch, context, np.int32)
    loop(model, tables, lengths, 4)  # loads, captures and replays
    first, last = min(3, steps - 3), steps - 2  # while two steps are under way

    def step_seconds() -> float:
        times = loop(model, tables, lengths, steps)
        return (times[last] - times[first]) / (last - first)

    wall = min(step_seconds() for _ in range(1 if setup.warm else 2))
    rows = sampling_rows(batch)
    fixed = decode_of(tables, lengths, sampled_before(batch), BLOCK_SIZE)

    def queue() -> None:
        # The same step each time: the arrays of steps so far ahead lie in the same memory.
        for _ in range(QUEUED):
            model.program.start(fixed, rows)

    # The first time takes the host's memory that is needed for so many results.
    head_start = 0 if setup.warm else HEAD_START
    device = min(device_seconds(queue, setup.device, head_start) for _ in range(2)) / QUEUED
    return Decode(wall, min(device, wall) if not setup.is_gpu else device)


def loop(model: Dummy, tables: Int32, lengths: Int32, steps: int) -> list[float]:
    """Decode with the next step prepared while one is computed, as the runner does.

    Returns when each step's result was there.
    """
    count = len(lengths)
    rows = sampling_rows(count)
    pending: PendingOutput | None = None
    times = []
    ids = np.zeros(count, np.int32)
    for number in range(steps):
        batch = decode_of(tables, lengths + np.int32(number), ids, BLOCK_SIZE)
        following = model.program.start(batch, rows)
        if pending is not None:
            pending.result()
            times.append(time.perf_counter())
        pending, ids = following, sampled_before(count)
    if pending is not None:
        pending.result()
        times.append(time.perf_counter())
    return times

"""Part D: continuous batching over KV blocks beside static batches of contiguous reservations.

Both run the same Program, with the same memory, on the same requests. What differs is who owns the
memory: static batches give each sequence a contiguous run of blocks for the longest context and
decode until the last of a batch has ended; continuous batching follows the rule of
octavo/scheduler (which cannot be imported here: its records need msgspec): decoding first, then
prompts in chunks under one budget of tokens, blocks as they are needed, the last one preempted to
be computed again where they run out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from octavo.backends.program import PendingOutput
from octavo.backends.torch.program import TorchProgram
from octavo.graph.batch import Batch, Int32
from parts.dummy import BLOCK_SIZE
from parts.steps import decode_of, sampled_before, sampling_rows, step_of

SAMPLED = 8
"""Steps of a static batch of which one is computed, once the time is over."""


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens of a prompt and of its answer."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Limits of both ways.

    Attributes:
        num_blocks: of the cache.
        max_len: the longest context.
        max_running: sequences of a step.
        budget: tokens of a step.
        seconds: after which a run ends; static batches then end theirs by samples.
    """

    num_blocks: int
    max_len: int
    max_running: int
    budget: int
    seconds: float

    @property
    def width(self) -> int:
        """Blocks of the longest context."""
        return -(-self.max_len // BLOCK_SIZE)


@dataclass(slots=True)
class Served:
    """What a run has done.

    Attributes:
        tokens: of answers.
        steps: computed, or stood for by one that was.
        sequences: of all steps.
        preempted: how often a sequence was.
        seconds: of all steps.
        measured: of them, those that passed.
    """

    tokens: int = 0
    steps: int = 0
    sequences: int = 0
    preempted: int = 0
    seconds: float = 0.0
    measured: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens of answers a second."""
        return self.tokens / self.seconds


class Pipeline:
    """Starts steps, two at a time, and counts what has come back."""

    def __init__(self, program: TorchProgram, seconds: float) -> None:
        """The time begins now."""
        self.served = Served()
        self._program = program
        self._began = time.perf_counter()
        self._end = self._began + seconds
        self._last = self._began
        self._pending: tuple[PendingOutput, int, int] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the time is."""
        return time.perf_counter() >= self._end

    def start(self, batch: Batch, useful: int, times: int = 1) -> None:
        """Begin a step that stands for so many alike; wait for the one before.

        Args:
            batch: the step.
            useful: tokens of answers that all of them sample.
            times: their number.
        """
        rows = sampling_rows(len(batch.logits_rows)) if len(batch.logits_rows) else None
        pending = self._program.start(batch, rows)
        self.served.steps += times
        self.served.sequences += times * len(batch.seq_lens)
        self.finish()
        self._pending = pending, useful, times

    def finish(self) -> None:
        """Wait for the step that is under way."""
        if self._pending is None:
            return
        pending, useful, times = self._pending
        self._pending = None
        pending.result()
        now = time.perf_counter()
        self.served.tokens += useful
        self.served.seconds += times * (now - self._last)
        self.served.measured = now - self._began
        self._last = now


def static(program: TorchProgram, requests: Iterable[Request], sizes: Sizes) -> Served:
    """One batch after another, each as large as reservations fit.

    The last one is not cut, or the steps of which few are left would be missing: once the time is
    over, one step of SAMPLED is computed and stands for the others.
    """
    pipeline = Pipeline(program, sizes.seconds)
    waiting = iter(requests)
    count = min(sizes.num_blocks // sizes.width, sizes.max_running)
    tables = np.arange(count * sizes.width, dtype=np.int32).reshape(count, -1)
    while not pipeline.is_over:
        batch = [request for _, request in zip(range(count), waiting, strict=False)]
        if not batch:
            break
        _static_batch(pipeline, batch, tables[: len(batch)], sizes)
    pipeline.finish()
    return pipeline.served


def _static_batch(pipeline: Pipeline, batch: list[Request], tables: Int32, sizes: Sizes) -> None:
    prompts = np.array([request.prompt for request in batch], np.int32)
    outputs = np.array([request.output for request in batch], np.int32)
    first = 0
    while first < len(batch):
        fitting = np.searchsorted(np.cumsum(prompts[first:]), sizes.budget, "right")
        last = first + max(1, int(fitting))
        counts = prompts[first:last]
        ids = np.ones(int(counts.sum()), np.int32)
        pipeline.start(
            step_of(tables[first:last], counts * 0, counts, ids, BLOCK_SIZE), len(counts)
        )
        first = last
    pipeline.finish()
    ids = np.ones(len(batch), np.int32)
    number, most = 1, int(outputs.max())
    while number < most:
        times = min(SAMPLED, most - number) if pipeline.is_over else 1
        at = np.minimum(prompts + number - 1 + times // 2, sizes.max_len - 1).astype(np.int32)
        useful = int(np.clip(outputs - number, 0, times).sum())
        pipeline.start(decode_of(tables, at, ids, BLOCK_SIZE), useful, times)
        ids = sampled_before(len(batch))
        number += times


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in a row of the tables.

    Attributes:
        known: tokens of the prompt and those sampled.
        computed: of them, those whose K and V are in the cache.
        place: among the tokens that the step before has sampled, or None.
    """

    request: Request
    known: int
    computed: int = 0
    place: int | None = None
    blocks: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens to be computed before the next is sampled."""
        return self.known - self.computed

    @property
    def is_done(self) -> bool:
        """Whether the whole answer was sampled."""
        return self.known - self.request.prompt >= self.request.output


class Continuous:
    """The plan of each step over one pool of blocks."""

    def __init__(self, requests: Iterable[Request], sizes: Sizes) -> None:
        """Let all requests wait."""
        self.waiting = deque(Sequence(request, request.prompt) for request in requests)
        self.running: list[Sequence] = []
        self.preempted = 0
        self._sizes = sizes
        self._free = list(range(sizes.num_blocks - 1, -1, -1))

    def plan(self) -> list[tuple[Sequence, int]]:
        """Which sequences compute how many tokens."""
        planned = []
        for sequence in [s for s in self.running if s.left == 1]:
            if sequence.blocks and self._grow(sequence):
                planned.append((sequence, 1))
        planned = [(s, n) for s, n in planned if s.blocks]  # Those of others may be gone by now.
        left = self._sizes.budget - len(planned)
        for sequence in [s for s in self.running if s.left > 1]:
            if left <= 0:
                break
            planned.append((sequence, min(left, sequence.left)))
            left -= planned[-1][1]
        while left > 0 and self._admit():
            sequence = self.running[-1]
            planned.append((sequence, min(left, sequence.left)))
            left -= planned[-1][1]
        return planned

    def _grow(self, sequence: Sequence) -> bool:
        """A block for its next token; False if it was preempted itself."""
        if sequence.computed < len(sequence.blocks) * BLOCK_SIZE:
            return True
        while not self._free:
            last = self.running[-1]
            self._leave(last)
            last.computed, last.place = 0, None
            self.waiting.appendleft(last)
            self.preempted += 1
            if last is sequence:
                return False
        sequence.blocks.append(self._free.pop())
        return True

    def _admit(self) -> bool:
        if not self.waiting or len(self.running) >= self._sizes.max_running:
            return False
        needed = -(-self.waiting[0].known // BLOCK_SIZE)
        if needed + len(self.running) > len(self._free):
            return False
        sequence = self.waiting.popleft()
        sequence.blocks = [self._free.pop() for _ in range(needed)]
        self.running.append(sequence)
        return True

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free += sequence.blocks
        sequence.blocks = []

    def advance(self, planned: list[tuple[Sequence, int]]) -> int:
        """What each sequence has once the step is under way; returns how many are sampled."""
        place = 0
        for sequence, count in planned:
            sequence.computed += count
            sequence.place = None
            if sequence.left == 0:
                sequence.known += 1
                sequence.place = place
                place += 1
                if sequence.is_done:
                    self._leave(sequence)
        return place

    def batch(self, planned: list[tuple[Sequence, int]]) -> Batch:
        """The arrays of a plan."""
        tables = np.zeros((len(planned), self._sizes.width), np.int32)
        for row, (sequence, _) in zip(tables, planned, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        width = max(len(sequence.blocks) for sequence, _ in planned)
        counts = np.array([count for _, count in planned], np.int32)
        starts = np.array([sequence.computed for sequence, _ in planned], np.int32)
        ids = np.ones(int(counts.sum()), np.int32)
        ends = np.cumsum(counts) - 1
        places = [-1 if s.place is None else s.place for s, _ in planned]
        fed_back = np.array(places, np.int32)
        ids[ends[fed_back >= 0]] = -1 - fed_back[fed_back >= 0]
        whole = step_of(np.ascontiguousarray(tables[:, :width]), starts, counts, ids, BLOCK_SIZE)
        is_sampled = [sequence.left == count for sequence, count in planned]
        return replace(whole, logits_rows=whole.logits_rows[np.array(is_sampled)])


def continuous(program: TorchProgram, requests: Iterable[Request], sizes: Sizes) -> Served:
    """Serve until the time is over, or all is done."""
    plans = Continuous(requests, sizes)
    pipeline = Pipeline(program, sizes.seconds)
    while not pipeline.is_over:
        planned = plans.plan()
        if not planned:
            break
        batch = plans.batch(planned)
        pipeline.start(batch, plans.advance(planned))
    pipeline.finish()
    pipeline.served.preempted = plans.preempted
    return pipeline.served


Way = Callable[[TorchProgram, Iterable[Request], Sizes], Served]
WAYS: dict[str, Way] = {"static": static, "continuous": continuous}

"""Runner: what it gives to a Program, and what it makes of the answer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from octavo.backends.program import Done
from octavo.graph.batch import Batch, SamplingRows, StepOutput
from octavo.runner.runner import Runner
from octavo.types import (
    ModelOutput,
    NewSequence,
    SampledTokens,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
    TokenLogprob,
)


class CountingProgram:
    """Samples, for each row, the sum of the row's last token and 1; keeps what it was given."""

    def __init__(self) -> None:
        self.steps: list[tuple[Batch, SamplingRows | None]] = []
        self.next_token: int | None = None

    depth = 1
    description = "fake"
    weights_bytes = 0

    def block_bytes(self) -> int:
        return 1

    def allocate_cache(self, num_blocks: int) -> None: ...

    def close(self) -> None: ...

    def start(self, batch: Batch, rows: SamplingRows | None) -> Done:
        return Done(self.run(batch, rows))

    def run(self, batch: Batch, rows: SamplingRows | None, wants: Iterable[str] = ()) -> StepOutput:
        self.steps.append((batch, rows))
        last = batch.token_ids[batch.logits_rows]
        tokens = last + 1 if self.next_token is None else np.full_like(last, self.next_token)
        top = np.stack([tokens, tokens + 1], axis=1)
        return StepOutput(
            tokens=tokens,
            logprobs=np.full(len(tokens), -0.5, np.float32),
            top_ids=top,
            top_logprobs=np.tile(np.array([-0.5, -1.5], np.float32), (len(tokens), 1)),
        )


def make_runner() -> tuple[Runner, CountingProgram]:
    program = CountingProgram()
    runner = Runner(program, num_rows=4, max_model_len=64, block_size=8, eos_token_ids=[99])
    return runner, program


def sequence(row: int, tokens: list[int], params: SamplingParams) -> NewSequence:
    return NewSequence(
        row=row, index=0, token_ids=tokens, num_prompt_tokens=len(tokens), params=params
    )


def test_sampled_tokens_are_the_input_of_the_next_step() -> None:
    runner, program = make_runner()
    first = SchedulerOutput(
        new_sequences=(sequence(1, [10, 20, 30], SamplingParams()),),
        scheduled=(ScheduledSequence(1, 0, 3, (5,), True),),
    )
    assert runner.step(first) == ModelOutput(sampled=(SampledTokens(1, (31,)),))
    second = SchedulerOutput(scheduled=(ScheduledSequence(1, 3, 1, (), True),))
    assert runner.step(second) == ModelOutput(sampled=(SampledTokens(1, (32,)),))
    batch = program.steps[1][0]
    assert batch.token_ids.tolist() == [31]
    assert batch.slot_mapping[0].tolist() == [5 * 8 + 3]


def test_a_token_that_is_not_known_yet_is_named_by_its_place() -> None:
    """Two steps on their way: the second one reads what the first one samples."""
    program = CountingProgram()
    program.depth = 2
    runner = Runner(program, num_rows=4, max_model_len=64, block_size=8, eos_token_ids=[99])
    first = SchedulerOutput(
        new_sequences=(
            sequence(3, [10, 20], SamplingParams()),
            sequence(1, [5, 6, 7], SamplingParams()),
            sequence(0, [1, 2, 3, 4], SamplingParams()),
        ),
        scheduled=(
            ScheduledSequence(3, 0, 2, (5,), True),
            ScheduledSequence(1, 0, 2, (6,), False),
            ScheduledSequence(0, 0, 4, (7,), True),
        ),
    )
    # One goes on with a token of its prompt, the others with what is sampled.
    second = SchedulerOutput(
        scheduled=tuple(
            ScheduledSequence(*one, (), True) for one in ((0, 4, 1), (1, 2, 1), (3, 2, 1))
        )
    )
    pending = runner.start(first), runner.start(second)
    assert program.steps[1][0].token_ids.tolist() == [-2, 7, -1]
    assert pending[0].result().sampled == (SampledTokens(3, (21,)), SampledTokens(0, (5,)))
    third = SchedulerOutput(scheduled=(ScheduledSequence(3, 3, 1, (), True),))
    runner.start(third)
    assert program.steps[2][0].token_ids.tolist() == [-3]
    pending[1].result()
    again = SchedulerOutput(
        finished_rows=(3,),
        new_sequences=(sequence(3, [40, 41, 42, 43], SamplingParams()),),
        scheduled=(ScheduledSequence(3, 0, 4, (2,), True), ScheduledSequence(1, 3, 1, (), True)),
    )
    runner.start(again)
    assert program.steps[3][0].token_ids.tolist() == [40, 41, 42, 43, 8]


class RecordingTier:
    """Notes in which order it is called."""

    def __init__(self, program: CountingProgram) -> None:
        self.program = program
        self.calls: list[object] = []

    def save(self, stores: object) -> None:
        self.calls.append(("save", stores, len(self.program.steps)))

    def load(self, loads: object) -> None:
        self.calls.append(("load", loads, len(self.program.steps)))

    def begin(self, num_tokens: int) -> None:
        self.calls.append(("begin", num_tokens, len(self.program.steps)))

    def end(self) -> None:
        self.calls.append(("end", len(self.program.steps)))


def test_blocks_are_saved_then_loaded_then_the_step_is_computed() -> None:
    program = CountingProgram()
    tier = RecordingTier(program)
    runner = Runner(
        program,  # type: ignore[arg-type]
        num_rows=4, max_model_len=64, block_size=8, eos_token_ids=[99],
        tier=tier,  # type: ignore[arg-type]
    )  # fmt: skip
    stores, loads = ((b"old", 5),), ((b"new", 5),)
    runner.step(
        SchedulerOutput(
            new_sequences=(sequence(1, [10, 20, 30], SamplingParams()),),
            stores=stores,
            loads=loads,
            scheduled=(ScheduledSequence(1, 0, 3, (5,), True),),
        )
    )
    begin, end = ("begin", 3, 0), ("end", 1)
    assert tier.calls == [("save", stores, 0), ("load", loads, 0), begin, end]


def test_a_step_that_samples_nothing_asks_for_nothing() -> None:
    runner, program = make_runner()
    plan = SchedulerOutput(
        new_sequences=(sequence(0, [1, 2, 3], SamplingParams()),),
        scheduled=(ScheduledSequence(0, 0, 2, (0,), False),),
    )
    assert runner.step(plan) == ModelOutput()
    assert program.steps[0][1] is None


def test_an_empty_plan_runs_nothing() -> None:
    runner, program = make_runner()
    assert runner.step(SchedulerOutput()) == ModelOutput()
    assert not program.steps


def test_each_row_gets_the_logprobs_it_asked_for() -> None:
    runner, _ = make_runner()
    wishes = [None, 0, 2, 1]
    plan = SchedulerOutput(
        new_sequences=tuple(
            sequence(row, [10 * row], SamplingParams(logprobs=k)) for row, k in enumerate(wishes)
        ),
        scheduled=tuple(ScheduledSequence(row, 0, 1, (row,), True) for row in range(4)),
    )
    output = runner.step(plan)
    assert [s.logprobs for s in output.sampled] == [
        (),
        (TokenLogprob(11, -0.5),),
        (TokenLogprob(21, -0.5, ((21, -0.5), (22, -1.5))),),
        (TokenLogprob(31, -0.5, ((31, -0.5),)),),
    ]


def test_logits_that_are_not_finite_are_passed_on_as_minus_one() -> None:
    runner, program = make_runner()
    program.next_token = -1
    params = SamplingParams(logprobs=1, frequency_penalty=1.0)
    plan = SchedulerOutput(
        new_sequences=(sequence(0, [1], params),),
        scheduled=(ScheduledSequence(0, 0, 1, (0,), True),),
    )
    assert runner.step(plan) == ModelOutput(sampled=(SampledTokens(0, (-1,)),))

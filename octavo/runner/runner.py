"""Runner: a Program and the rows it serves. A step is: update rows, build, run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from octavo.backends.program import PendingOutput, Program
from octavo.graph.batch import Batch, SamplingRows, StepOutput
from octavo.runner.batch import RowTable, SampledRows
from octavo.runner.disk_tier import DiskTier
from octavo.runner.sampler import SamplerTable
from octavo.types import ModelOutput, SampledTokens, SchedulerOutput, TokenLogprob


class PendingStep:
    """A step on its way."""

    def __init__(self, finish: Callable[[], ModelOutput]) -> None:
        """`finish` waits for it."""
        self._finish = finish

    def result(self) -> ModelOutput:
        """Wait for it; to be called once."""
        return self._finish()


class Runner:
    """Runs the steps that a scheduler planned.

    Rows are numbered below `num_rows`; a plan is applied in the order of its fields.
    """

    def __init__(
        self,
        program: Program,
        *,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        eos_token_ids: Iterable[int],
        tier: DiskTier | None = None,
    ) -> None:
        """Serve `program`, whose cache is allocated, with `tier` below it."""
        self._program = program
        self._tier = tier
        self._rows = RowTable(num_rows, max_model_len, block_size, looks_ahead=program.depth > 1)
        self._sampler = SamplerTable(num_rows, eos_token_ids)

    def step(self, plan: SchedulerOutput) -> ModelOutput:
        """Compute a step; one entry for each scheduled row that is_sampling, in order."""
        return self.start(plan).result()

    def start(self, plan: SchedulerOutput) -> PendingStep:
        """Begin a step; results must be taken in the order of the beginnings."""
        if self._tier is not None:
            self._tier.save(plan.stores)
        self._update_rows(plan)
        if self._tier is not None:
            self._tier.load(plan.loads)
        if not plan.scheduled:
            return PendingStep(ModelOutput)
        batch, sampled, rows = self._build(plan)
        if self._tier is not None:
            self._tier.begin(len(batch.token_ids))
        pending = self._program.start(batch, rows)
        if rows is None:
            return PendingStep(lambda: self._finish(pending))
        return PendingStep(lambda: self._finish_sampling(pending, sampled, rows))

    def _finish(self, pending: PendingOutput) -> ModelOutput:
        pending.result()
        if self._tier is not None:
            self._tier.end()
        return ModelOutput()

    def _finish_sampling(
        self, pending: PendingOutput, sampled: SampledRows, rows: SamplingRows
    ) -> ModelOutput:
        output = pending.result()
        if self._tier is not None:
            self._tier.end()
        self._rows.append_tokens(sampled, output.tokens)
        self._sampler.append_tokens(sampled, output.tokens)
        return _model_output(sampled, rows, output)

    def _update_rows(self, plan: SchedulerOutput) -> None:
        for row in plan.finished_rows:
            self._sampler.remove(row)
        if plan.forks:
            self._rows.fork(plan.forks)
            self._sampler.fork([fork for fork in plan.forks if fork.row != fork.parent_row])
        for sequence in plan.new_sequences:
            self._rows.insert(sequence)
            self._sampler.insert(sequence)
        if plan.copies:
            self._rows.replace_blocks(plan.copies)
            pairs = [(copy.source, copy.destination) for copy in plan.copies]
            self._program.copy_blocks(np.array(pairs, np.int32))

    def _build(self, plan: SchedulerOutput) -> tuple[Batch, SampledRows, SamplingRows | None]:
        batch, sampled = self._rows.build(plan)
        rows = self._sampler.build(sampled) if len(sampled.rows) else None
        return batch, sampled, rows


def _model_output(sampled: SampledRows, rows: SamplingRows, output: StepOutput) -> ModelOutput:
    row_ids = sampled.rows.tolist()
    tokens = output.tokens.tolist()
    num_logprobs = rows.num_logprobs.tolist()
    if max(num_logprobs) < 0:
        pairs = zip(row_ids, tokens, strict=True)
        return ModelOutput(sampled=tuple([SampledTokens(row, (token,)) for row, token in pairs]))
    items = []
    for place, (row, token, count) in enumerate(zip(row_ids, tokens, num_logprobs, strict=True)):
        logprobs: tuple[TokenLogprob, ...] = ()
        if count >= 0 and token >= 0:
            logprobs = (_token_logprob(output, place, token, count),)
        items.append(SampledTokens(row, (token,), logprobs))
    return ModelOutput(sampled=tuple(items))


def _token_logprob(output: StepOutput, place: int, token: int, count: int) -> TokenLogprob:
    top = zip(
        output.top_ids[place, :count].tolist(),
        output.top_logprobs[place, :count].tolist(),
        strict=True,
    )
    return TokenLogprob(token, float(output.logprobs[place]), tuple(top))

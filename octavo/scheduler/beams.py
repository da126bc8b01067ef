"""Beam search over one prompt: which beams go on, and which are the best that have ended.

Knows tokens and log probabilities: no blocks, no rows, no steps. Each round every live beam brings
its most probable next tokens, and the `width` best continuations of them all become the beams.
Ranking and the three rules of stopping are those of transformers (`num_beams`, `length_penalty`,
`early_stopping`), so that the same log probabilities give the same beams.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import NamedTuple

from octavo.types import FinishReason, SamplingParams, TokenLogprob


@dataclass(slots=True, eq=False)
class Beam:
    """One path through the search.

    Attributes:
        score: the sum of its tokens' log probabilities.
        logprobs: of its tokens, if the user wants them.
        next: the candidates of its next token, once its last one has been computed.
    """

    score: float = 0.0
    logprobs: tuple[TokenLogprob, ...] = ()
    next: TokenLogprob | None = None


class Continuation(NamedTuple):
    """A beam with one token more."""

    score: float
    parent: int
    """Place of the beam that it continues."""
    token_id: int
    logprobs: tuple[TokenLogprob, ...]


class Hypothesis(NamedTuple):
    """A beam that has ended."""

    score: float
    """With the length penalty."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason


@dataclass(slots=True, eq=False)
class BeamSearch:
    """The search of one request.

    Attributes:
        params: its n, best_of, length_penalty, early_stopping and logprobs count here.
        stop_ids: tokens that end a beam.
        max_num_output_tokens: a beam ends when it has so many.
        finished: the best that have ended, at most `width`, best first.
    """

    params: SamplingParams
    stop_ids: frozenset[int]
    max_num_output_tokens: int
    finished: list[Hypothesis] = field(default_factory=list)

    @property
    def width(self) -> int:
        """How many beams live at a time."""
        return self.params.num_sequences

    @property
    def num_candidates(self) -> int:
        """How many tokens each beam must bring: one a beam may go on with and all that end it."""
        return max(self.width + len(self.stop_ids), self.params.logprobs or 0)

    def advance(self, beams: list[Beam], outputs: list[array[int]]) -> list[Continuation]:
        """One round.

        Args:
            beams: the live ones, best first, each with its `next`.
            outputs: the tokens of each so far, without the prompt.

        Returns:
            The beams of the next round, best first; none if the search has ended.
        """
        num_tokens = len(outputs[0]) + 1
        is_last = num_tokens >= self.max_num_output_tokens
        is_closed = len(self.finished) == self.width and self.params.early_stopping is True
        going: list[Continuation] = []
        for rank, (negative, parent, token_id, logprob) in enumerate(self._best(beams)):
            has_ended = token_id in self.stop_ids
            if has_ended or is_last:
                if rank < self.width and not is_closed:
                    score = -negative / num_tokens**self.params.length_penalty
                    tokens = (*outputs[parent], token_id)
                    logprobs = self._logprobs(beams[parent], token_id, logprob)
                    reason: FinishReason = "stop" if has_ended else "length"
                    self.finished.append(Hypothesis(score, tokens, logprobs, reason))
            elif len(going) < self.width:
                logprobs = self._logprobs(beams[parent], token_id, logprob)
                going.append(Continuation(-negative, parent, token_id, logprobs))
        self.finished.sort(key=lambda h: -h.score)  # Stable: of equals the earlier one stays first.
        del self.finished[self.width :]
        return going if going and self._may_improve(going[0].score, num_tokens) else []

    def _best(self, beams: list[Beam]) -> list[tuple[float, int, int, float]]:
        """(-score, parent, token id, log probability) of the best continuations, in order.

        Of equals the one of the better beam comes first, then the lower token id.
        """
        # Enough for `width` that go on; an end counts only among the best `width` of all.
        most = self.width * (1 + len(self.stop_ids))
        return nsmallest(most, self._continuations(beams))

    def _continuations(self, beams: list[Beam]) -> Iterator[tuple[float, int, int, float]]:
        for parent, beam in enumerate(beams):
            assert beam.next is not None, "a beam has not been computed"
            for token_id, logprob in beam.next.top:
                yield -(beam.score + logprob), parent, token_id, logprob

    def _logprobs(self, beam: Beam, token_id: int, logprob: float) -> tuple[TokenLogprob, ...]:
        count = self.params.logprobs
        if count is None:
            return ()
        assert beam.next is not None
        return (*beam.logprobs, TokenLogprob(token_id, logprob, beam.next.top[:count]))

    def _may_improve(self, best_score: float, num_tokens: int) -> bool:
        """Whether a beam that goes on could still rank among the finished ones."""
        if len(self.finished) < self.width:
            return True
        early_stopping, penalty = self.params.early_stopping, self.params.length_penalty
        if early_stopping is True:
            return False
        reaches_end = early_stopping == "never" and penalty > 0
        length = self.max_num_output_tokens if reaches_end else num_tokens
        return bool(best_score / length**penalty > self.finished[-1].score)

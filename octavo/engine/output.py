"""OutputProcessor: what the engine sampled becomes text, ids and logprobs that a client may see.

Holds back half characters and half stop strings, so that the concatenated text of a stream is the
text of the whole. Knows text and ids, no process, no HTTP. Imports no numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.engine.best_of import BestOf
from octavo.engine.stop_strings import StopMatch, StopStringFinder
from octavo.tokenizer.detokenizer import Detokenizer
from octavo.types import FinishReason, OutputDelta, PromptUsage, SamplingParams, TokenUpdate

if TYPE_CHECKING:  # an engine is launched before the tokenizers library is imported
    from octavo.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ProcessedUpdate:
    """What follows from one TokenUpdate.

    Attributes:
        deltas: what is new for the client.
        is_stopped_here: a stop string ended the sequence: the engine does not know yet and must be
            told to abort it.
        is_request_finished: every sequence of the request has ended.
    """

    deltas: tuple[OutputDelta, ...]
    is_stopped_here: bool
    is_request_finished: bool


@dataclass(slots=True)
class SequenceText:
    """The text of one sequence so far, as much of it as is still undecided."""

    detokenizer: Detokenizer
    finder: StopStringFinder | None
    num_tokens: int = 0
    usage: PromptUsage | None = None


class RequestText:
    """All sequences of one request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request_id: str,
        num_prompt_tokens: int,
        params: SamplingParams,
    ) -> None:
        """Begin a request whose deltas will carry `request_id`."""
        self._request_id = request_id
        self._num_prompt_tokens = num_prompt_tokens
        self._params = params
        # The beams of a search are chosen by the engine; samples are here, by their text's tokens.
        is_choice = params.num_sequences > params.n and not params.use_beam_search
        self._best_of = (
            BestOf(params.n, params.num_sequences, has_logprobs=params.logprobs is not None)
            if is_choice
            else None
        )
        self._sequences = {
            index: SequenceText(
                Detokenizer(tokenizer, params.skip_special_tokens, is_continuation=True),
                StopStringFinder(params.stop, is_included=params.include_stop_str_in_output)
                if params.stop
                else None,
            )
            for index in range(params.num_sequences if is_choice else params.n)
        }

    def process(self, update: TokenUpdate) -> ProcessedUpdate:
        """Take in what one step brought to one sequence; updates after its end are ignored."""
        sequence = self._sequences.get(update.index)
        if sequence is None:
            return ProcessedUpdate((), False, not self._sequences)
        if sequence.usage is None:
            sequence.usage = PromptUsage(
                num_prompt_tokens=self._num_prompt_tokens,
                num_cached_tokens=update.num_cached_tokens,
            )
        text, taken, match = self._decode(sequence, update)
        finish_reason: FinishReason | None = update.finish_reason
        stop_reason: str | int | None = update.stop_token_id
        if match is not None:
            finish_reason, stop_reason = "stop", match.stop
        if finish_reason is not None:
            del self._sequences[update.index]
        delta = OutputDelta(
            request_id=self._request_id,
            index=update.index,
            text=text,
            token_ids=update.token_ids[:taken],
            logprobs=update.logprobs[:taken],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            usage=sequence.usage,
        )
        is_stopped_here = match is not None and update.finish_reason is None
        deltas = (delta,) if self._best_of is None else self._best_of.add(delta)
        return ProcessedUpdate(deltas, is_stopped_here, not self._sequences)

    def _decode(
        self, sequence: SequenceText, update: TokenUpdate
    ) -> tuple[str, int, StopMatch | None]:
        """The text to show, how many tokens belong to it, and the stop string that ended it."""
        params = self._params
        shown = len(update.token_ids)
        if update.finish_reason == "stop" and not params.include_stop_str_in_output:
            shown -= 1  # the token that ended the sequence is no text
        if sequence.finder is None:
            text = sequence.detokenizer.push(update.token_ids[:shown])
            sequence.num_tokens += len(update.token_ids)
            if update.finish_reason is not None:
                text += sequence.detokenizer.finish()
            return text, len(update.token_ids), None
        return self._search(sequence, sequence.finder, update, shown)

    def _search(
        self, sequence: SequenceText, finder: StopStringFinder, update: TokenUpdate, shown: int
    ) -> tuple[str, int, StopMatch | None]:
        parts: list[str] = []
        for place in range(shown):
            sequence.num_tokens += 1
            piece = finder.push(
                sequence.detokenizer.push(update.token_ids[place : place + 1]),
                may_match=sequence.num_tokens > self._params.min_tokens,
            )
            if isinstance(piece, StopMatch):
                return "".join((*parts, piece.text)), place + 1, piece
            parts.append(piece)
        if update.finish_reason is not None:
            piece = finder.push(sequence.detokenizer.finish())
            if isinstance(piece, StopMatch):
                return "".join((*parts, piece.text)), len(update.token_ids), piece
            parts += (piece, finder.finish())
        return "".join(parts), len(update.token_ids), None


class OutputProcessor:
    """The requests alive on the client's side of an engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decode with this tokenizer."""
        self._tokenizer = tokenizer
        self._requests: dict[str, RequestText] = {}

    def add(
        self,
        request_id: str,
        num_prompt_tokens: int,
        params: SamplingParams,
        *,
        shown_id: str | None = None,
    ) -> None:
        """Expect updates of `request_id`; deltas carry `shown_id` instead, if given."""
        self._requests[request_id] = RequestText(
            self._tokenizer, shown_id or request_id, num_prompt_tokens, params
        )

    def remove(self, request_id: str) -> None:
        """Forget a request; later updates of it are ignored."""
        self._requests.pop(request_id, None)

    def process(self, update: TokenUpdate) -> ProcessedUpdate:
        """Take in one update; a request is forgotten with the end of its last sequence."""
        request = self._requests.get(update.request_id)
        if request is None:
            return ProcessedUpdate((), False, True)
        result = request.process(update)
        if result.is_request_finished:
            del self._requests[update.request_id]
        return result

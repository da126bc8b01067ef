"""What the scheduler tells the runner and the client of a sequence."""

from __future__ import annotations

import msgspec

from octavo.scheduler.beams import Hypothesis
from octavo.scheduler.request import Request, Sequence
from octavo.types import NewSequence, TokenUpdate


def new_sequence(seq: Sequence) -> NewSequence:
    """What the runner has to know of a sequence that gets a row."""
    params, search = seq.request.params, seq.request.search
    if search is not None:
        params = msgspec.structs.replace(params, temperature=0.0, logprobs=search.num_candidates)
    elif params.num_sequences > params.n:  # They are compared by their log probabilities.
        params = msgspec.structs.replace(params, logprobs=params.logprobs or 0)
    return NewSequence(
        row=seq.row,
        index=seq.index,
        token_ids=seq.token_ids.tolist(),
        num_prompt_tokens=seq.request.num_prompt_tokens,
        params=params,
    )


def beam_update(request: Request, index: int, beam: Hypothesis) -> TokenUpdate:
    """The whole of a beam that is returned."""
    last = beam.token_ids[-1]
    is_users_stop = beam.finish_reason == "stop" and last not in request.eos_ids
    return TokenUpdate(
        request.request_id,
        index,
        beam.token_ids,
        beam.logprobs,
        beam.finish_reason,
        last if is_users_stop else None,
        request.num_cached_tokens,
    )

"""Who goes first: the order of the waiting queue, and how prompts share what a step has for them.

Two orders meet here. The *rank* says who is admitted first and who is preempted last: by arrival
("fcfs"), or by the request's priority and then by arrival ("priority"), where waiting counts too:
`AGEING_S` seconds are worth one priority, so nobody waits for ever. Under the policy "fair" the
clients take turns by the service that they have had (see `fairness`), and both orders hold within
a client. The order *by what remains*
says who gets tokens: the shortest prompt first, so that a short one is never stuck behind a long
one. Alone it would starve the long one, hence `PromptShares`
(docs/decisions/040-fair-chunking.md).
"""

from __future__ import annotations

from typing import Literal

from octavo.scheduler.request import Rank, Sequence
from octavo.types import SamplingParams

Policy = Literal["fcfs", "priority", "fair"]

AGEING_S = 30.0
"""A request goes before those that arrive so much later with a priority better by one."""

GUARANTEED_PART = 4
"""One token in so many goes to the prompt that is first in rank."""


def urgency(policy: Policy, priority: int, now: float) -> int:
    """The first part of the rank of a request that arrives now."""
    return priority + int(now // AGEING_S) if policy == "priority" else 0


def can_look_ahead(params: SamplingParams) -> bool:
    """Whether how a token is sampled does not depend on which tokens came before."""
    return (
        not params.use_beam_search
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
    )


def by_rank(seq: Sequence) -> Rank:
    """Sort key: the first to be admitted, the last to be preempted."""
    return seq.rank


def by_remaining(seq: Sequence) -> tuple[int, int, Rank]:
    """Sort key: within one urgency, who has the fewest tokens left to compute."""
    return seq.rank[0], seq.num_remaining_tokens, seq.rank


class PromptShares:
    """Divides the tokens that a step has for prompts into two parts.

    A quarter goes to prompts in the order of rank, the rest to those with the fewest tokens left;
    what one order cannot use goes to the other. With S tokens a step for prompts it follows that a
    prompt of s tokens is computed

    - within (s + q) / (3/4 S) steps, if q is what the others have left, but at most s of each: how
      long a longer one is does not matter;
    - within (s + q) / (1/4 S) steps, if q is what those before it in rank have left: how many
      shorter ones keep arriving does not matter.
    """

    __slots__ = ("_credit",)

    def __init__(self) -> None:
        """Start without credit."""
        self._credit = 0

    def take_guaranteed(self, num_tokens: int) -> int:
        """How many of this step's `num_tokens` go by rank; fractions are carried over."""
        guaranteed, self._credit = divmod(self._credit + num_tokens, GUARANTEED_PART)
        return guaranteed

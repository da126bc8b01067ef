"""The scheduler's own records: a request and its sequences.

Pure state: the scheduler changes it, nobody else sees it. Token ids stand in `array("i")`: 4 bytes
each instead of 36 in a list, ready to be hashed, and nothing for the garbage collector to visit.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from octavo.kv_cache.manager import BlockTable
from octavo.scheduler.beams import Beam, BeamSearch
from octavo.types import FinishReason, SamplingParams

Rank = tuple[int, int, int]
"""(urgency, order of arrival, index): the smaller one goes first. No two sequences share one."""


class Status(Enum):
    """Where a sequence stands.

        HELD → WAITING ⇄ RUNNING → FINISHED

    HELD waits for a sibling to compute the tokens they share, and may be forked from it; WAITING
    holds neither row nor blocks; RUNNING holds both. A group that is preempted together is held
    again, but for one sequence. An abort leads to FINISHED from everywhere.
    """

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One accepted request.

    Attributes:
        eos_ids: the model's own tokens that end a sequence; none if they are to be ignored.
        stop_ids: every token that ends a sequence: eos_ids and the user's.
        is_group: it has several sequences, which share blocks.
        sequences: `params.num_sequences` of them.
        search: the beam search, if it is one; its beams are `live`, best first.
        can_look_ahead: a token can be planned before the host knows the one before it: sampling
            depends on no more of it than the model does.
        client: whom it is for, for the policy "fair".
        num_unfinished: sequences that have not ended.
        is_started: a sequence of it has run.
        num_cached_tokens: prompt tokens that the prefix cache served when it started.
        pin_names: of the prompt's blocks that are to stay cached; room is reserved until the end.
        pin_s: for how long.
    """

    request_id: str
    params: SamplingParams
    num_prompt_tokens: int
    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    client: str = ""
    search: BeamSearch | None = None
    is_group: bool = False
    can_look_ahead: bool = True
    sequences: list[Sequence] = field(default_factory=list)
    live: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    is_started: bool = False
    num_cached_tokens: int = 0
    pin_names: tuple[bytes, ...] = ()
    pin_s: float = 0.0

    @property
    def held(self) -> list[Sequence]:
        """The sequences that wait for a sibling; a beam that does not live waits for nothing."""
        sequences = self.sequences if self.search is None else self.live
        return [seq for seq in sequences if seq.status is Status.HELD]


@dataclass(slots=True, eq=False)
class Sequence:
    """The unit that is scheduled: 0 ≤ computed ≤ known tokens ≤ max_num_tokens.

    Attributes:
        token_ids: prompt and output so far.
        max_num_tokens: the sequence ends when it has so many.
        table: its KV blocks; empty unless it runs.
        num_known_tokens: tokens that may be computed: those in token_ids and, if the request can
            look ahead, those that steps in flight sample, but for one that ends it.
        num_computed_tokens: tokens whose K and V are in the cache, or will be when the steps in
            flight have returned.
        num_foreseen_tokens: as far as num_known_tokens may run ahead of what is known.
        last_step: the number of the last step that it is part of.
        num_expected_tokens: how many there are to compute, as it looked when it began to wait.
        row: its name towards the runner while it runs.
        beam: its part of a beam search.
    """

    request: Request
    index: int
    rank: Rank
    token_ids: array[int]
    max_num_tokens: int
    table: BlockTable
    num_known_tokens: int = 0
    num_computed_tokens: int = 0
    num_foreseen_tokens: int = 0
    last_step: int = 0
    num_expected_tokens: int = 0
    status: Status = Status.WAITING
    row: int = -1
    beam: Beam = field(default_factory=Beam)

    @property
    def num_output_tokens(self) -> int:
        """How many tokens were sampled."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Append a sampled token; return why the sequence ends with it, if it does."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if num_tokens > self.num_known_tokens:
            self.num_known_tokens = num_tokens
        request = self.request
        num_output = num_tokens - request.num_prompt_tokens
        if token_id in request.stop_ids and num_output > request.params.min_tokens:
            return "stop"
        return "length" if num_tokens >= self.max_num_tokens else None

    @property
    def num_remaining_tokens(self) -> int:
        """How many known tokens are still to be computed; while it waits, how many are expected."""
        if self.status is Status.RUNNING:
            return self.num_known_tokens - self.num_computed_tokens
        return self.num_expected_tokens

    @property
    def is_first_sample(self) -> bool:
        """Whether the token that is sampled next is the first of the output."""
        return self.num_known_tokens == self.request.num_prompt_tokens

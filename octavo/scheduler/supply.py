"""Blocks for the tokens that running sequences write next, at the cost of those last in rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.kv_cache.manager import KVCacheManager
from octavo.scheduler.groups import Groups
from octavo.scheduler.request import Request, Sequence, Status
from octavo.scheduler.rows import Rows
from octavo.scheduler.waiting import WaitingQueue
from octavo.types import BlockCopy, NewSequence, ScheduledSequence


@dataclass(slots=True)
class Step:
    """A step while it is planned and until it has returned.

    Attributes:
        num_left: what is left of the token budget.
        may_admit: nobody has been preempted or turned away in this step yet.
        admitted_blocks: the first blocks of each sequence that was admitted.
        number: steps are numbered from 1.
        may_preempt: no step is in flight; otherwise nobody is preempted.
        unsampled: sequences of which only a part of the prompt is computed, and how many of their
            tokens are then.
        sampling: those that are sampled, in the order of `scheduled`.
    """

    now: float
    num_left: int
    number: int
    may_preempt: bool
    may_admit: bool = True
    new_sequences: list[NewSequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    admitted_blocks: dict[Sequence, tuple[int, ...]] = field(default_factory=dict)
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    unsampled: list[tuple[Sequence, int]] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)
    is_awaited: bool = False

    @property
    def is_stuck(self) -> bool:
        """Whether nothing is planned, and nothing in flight will change that."""
        return self.may_preempt and not self.scheduled

    def begin(self) -> None:
        """The step is on its way: what it samples may be planned with from now on."""
        number = self.number
        for seq, _ in self.unsampled:
            seq.last_step = number
        for seq in self.sampling:
            seq.last_step = number
            if seq.num_known_tokens < seq.num_foreseen_tokens:
                seq.num_known_tokens += 1
            elif not seq.request.can_look_ahead:
                self.is_awaited = True


class BlockSupply:
    """Gives running sequences blocks; preempts where there are none.

    Attributes:
        num_preemptions: sequences that lost their blocks.
    """

    def __init__(
        self,
        cache: KVCacheManager,
        rows: Rows,
        groups: Groups,
        waiting: WaitingQueue,
        wait: Callable[[Sequence], None],
    ) -> None:
        """Work on a scheduler's parts; `wait` puts a sequence into `waiting`."""
        self.num_preemptions = 0
        self._cache = cache
        self._rows = rows
        self._groups = groups
        self._waiting = waiting
        self._wait = wait

    def grow(self, seq: Sequence, step: Step) -> tuple[int, ...] | None:
        """Get the block for a running sequence's next token, at the cost of the last ones in rank.

        Returns:
            The new block ids; None if the sequence was itself the last one and has been preempted,
            or nobody may be.
        """
        while (new_blocks := self._cache.allocate(seq.table, seq.num_known_tokens)) is None:
            if not step.may_preempt:
                step.may_admit = False  # What becomes free is for this one.
                return None
            self.preempt_last(step)
            if seq.status is not Status.RUNNING:
                return None
        return new_blocks

    def make_room(self, group: Request, step: Step) -> bool:
        """See to it that a group's next tokens find blocks; False as `grow` returns None."""
        while True:
            tables = [
                (seq.table, seq.num_computed_tokens)
                for seq in group.sequences
                if seq.status is Status.RUNNING
                and seq.num_known_tokens - seq.num_computed_tokens == 1
            ]
            if self._cache.num_missing_blocks(tables) <= self._cache.num_free_blocks:
                return bool(tables)
            if not step.may_preempt:
                step.may_admit = False
                return False
            self.preempt_last(step)

    def own_block(self, seq: Sequence, index: int, step: Step) -> None:
        """Copy a block before the sequence writes into it, if others hold it too."""
        if self._cache.num_sharers(seq.table, index) > 1:
            blocks = self._cache.own(seq.table, index)
            assert blocks is not None, "room was made for it"
            step.copies.append(BlockCopy(seq.row, index, *blocks))

    def preempt_last(self, step: Step) -> None:
        """Take rows and blocks from the last running group; it waits with the tokens it has.

        If it runs alone, pins make way first.

        All of it but one sequence is held until that one has computed what they share. If samples
        of one request are all that runs, only the last of them goes.
        """
        assert step.may_preempt, "a step in flight writes into its blocks"
        step.may_admit = False
        running = self._rows.running
        request = running[-1].request
        if running[0].request is request and self._cache.drop_pins():
            return  # It runs alone, and has more room now.
        group = [seq for seq in running if seq.request is request]
        if len(group) == len(running) and request.search is None:
            group = group[-1:]
        self.num_preemptions += len(group)
        for seq in group:
            self._groups.retire(seq)
            seq.num_computed_tokens = 0
            seq.beam.next = None
        if len(group) > 1:
            for seq in request.sequences:
                if seq.status is Status.WAITING:
                    self._waiting.remove(seq)
                    seq.status = Status.HELD
        self._wait(group[0])

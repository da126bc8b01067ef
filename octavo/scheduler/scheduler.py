"""The scheduler: which tokens of which sequences are computed in the next step.

There is no prefill phase and no decode phase. A sequence has `num_computed_tokens`, which catches
up with its known tokens under one token budget a step; the step that reaches the last known token
samples the next one. Chunked prefill, prefix caching and preemption follow from that one rule.

1. First come running sequences with one token to compute, which is what decoding is: none of them
   ever waits. Where a block is missing and none is free, the last running one in rank is preempted:
   it loses its blocks and waits, with all its tokens, to be computed again.
2. What is left of the budget is shared by the prompts: running ones and, as far as there are rows
   and blocks, waiting ones; a quarter in order of rank, the rest to the shortest (see `policy`).

A waiting sequence is admitted with blocks for all its known tokens, and only if one block for each
running one stays free: so prompts never preempt each other, and newcomers seldom cause preemption.
The first running one in rank is preempted by nobody and fits into the pool alone, where pinned
prefixes make way for it: it always progresses, hence all do.

The sequences of a request are a group: one of them computes the prompt, the others are forked from
it and share its blocks. A group is preempted together, and held but for one sequence, so that it
comes back as it began. Knows ids only: no text, no tensors, no clock.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import InvalidRequestError
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.tiers import LowerTier, TierMoves
from octavo.scheduler.beams import BeamSearch
from octavo.scheduler.fairness import FairList, TokenCounters
from octavo.scheduler.groups import RESERVED_BLOCKS, Groups
from octavo.scheduler.limits import RequestLimits, reserve_pin
from octavo.scheduler.messages import beam_update, new_sequence
from octavo.scheduler.policy import PromptShares, by_rank, by_remaining, can_look_ahead, urgency
from octavo.scheduler.reports import block_use, prefix_report
from octavo.scheduler.request import Request, Sequence, Status
from octavo.scheduler.rows import Rows
from octavo.scheduler.supply import BlockSupply, Step
from octavo.scheduler.waiting import DrainRate, RankedList, WaitingQueue
from octavo.types import (
    CacheStats,
    Capacity,
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelOutput,
    PrefixReport,
    SampledTokens,
    ScheduledSequence,
    SchedulerOutput,
    TokenUpdate,
)


class Scheduler:
    """Owns the waiting queue, the running list and the KV blocks.

    The engine calls `schedule`, has the plan computed and calls `update` with the result; `add` and
    `abort` may come at any moment. Where steps are computed elsewhere, the next one may be planned
    while one is in flight (docs/decisions/044-steps-in-flight.md): for sequences whose last token
    is not known yet, as far as no block is missing. Results come in the order of the plans.
    """

    def __init__(
        self,
        config: EngineConfig,
        capacity: Capacity,
        eos_token_ids: frozenset[int],
        lower: LowerTier | None = None,
        on_admitted: Callable[[PrefixReport], None] | None = None,
        cache: KVCacheManager | None = None,
    ) -> None:
        """Start without requests.

        Args:
            config: gives the limits of a step and of the queue, the policy and the prefix cache.
            capacity: gives the KV pool and max_model_len.
            eos_token_ids: tokens that end a sequence unless its request ignores them.
            lower: where blocks go that leave the pool.
            on_admitted: is told what the prefix cache did for each admitted sequence, and why not
                more. That takes memory and time; None: neither.
            cache: hands out the pool's blocks; None makes one. Benchmarks put other policies here.
        """
        self._config = config
        pool = capacity.kv_pool
        self._block_size = pool.block_size
        # With no more rows than the budget has tokens, decodes leave one to a prompt that runs.
        num_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._limits = RequestLimits(capacity, num_rows)
        self._eos_token_ids = eos_token_ids
        self._cache = cache or KVCacheManager(
            pool.num_blocks, pool.block_size, config.use_prefix_cache, pool.identity
        )
        self._tiers = TierMoves(self._cache, lower)
        self._on_admitted = on_admitted
        if on_admitted is not None:
            self._cache.remember_misses()
        self._requests: dict[str, Request] = {}
        # Under the policy "fair" alone.
        self._counters = TokenCounters() if config.policy == "fair" else None
        self._waiting: WaitingQueue = (
            RankedList() if self._counters is None else FairList(self._counters)
        )
        self._shares = PromptShares()
        self._drain_rate = DrainRate()
        self._rows = Rows(num_rows)
        self._groups = Groups(self._cache, self._rows, self._wait)
        self._supply = BlockSupply(self._cache, self._rows, self._groups, self._waiting, self._wait)
        self._in_flight: deque[Step] = deque()
        self._num_planned = 0
        self._num_returned = 0
        self._ending: list[Sequence] = []  # They have ended; a step in flight still has them.
        self._now = 0.0
        self._num_arrivals = 0
        self._num_unstarted_requests = 0
        self._num_alive_sequences = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0

    # ---- Requests come and go ------------------------------------------------------------------

    def add(self, request: EngineRequest, now: float) -> None:
        """Accept a request, or raise and change nothing.

        Raises:
            InvalidRequestError: the id is in use, the prompt is empty, a number makes no sense, or
                the prompt is too long to be pinned.
            ContextLengthError: it could never fit, with the numbers.
            OverloadedError: the waiting queue is full, or too much is pinned; says when to come
                back.
        """
        self._limits.check(request)
        self._check_queue(request, now)
        params = request.params
        eos_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        record = Request(
            request_id=request.request_id,
            params=params,
            num_prompt_tokens=len(request.prompt_ids),
            eos_ids=eos_ids,
            stop_ids=eos_ids.union(params.stop_token_ids),
            client=request.client,
            num_unfinished=params.num_sequences,
            is_group=params.num_sequences > 1,
            can_look_ahead=can_look_ahead(params),
        )
        record.sequences = self._make_sequences(record, request, now)
        if request.cache.pin_s:
            record.pin_names = reserve_pin(self._cache, record.sequences[0], now)
            record.pin_s = request.cache.pin_s
        if params.use_beam_search:
            max_num_output_tokens = record.sequences[0].max_num_tokens - record.num_prompt_tokens
            record.search = BeamSearch(params, record.stop_ids, max_num_output_tokens)
            record.live = record.sequences[:1]
        self._requests[request.request_id] = record
        if self._counters is not None:
            self._counters.enter(request.client)
        self._num_arrivals += 1
        self._num_unstarted_requests += 1
        self._num_alive_sequences += params.num_sequences
        self._release(record, 1)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenUpdate]:
        """End a request, or one sequence of it, and return the last update of each that ends.

        Blocks are free at once; those that steps in flight use, when they return. An unknown
        request is no fault: it may just have ended.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        if request.search is not None:  # Its beams have no end of their own.
            return self._end_all(request, "abort")
        updates = []
        for seq in request.sequences:
            if seq.status is not Status.FINISHED and index in (None, seq.index):
                self._end(seq)
                updates.append(TokenUpdate(request_id, seq.index, finish_reason="abort"))
        return updates

    def has_work(self) -> bool:
        """Whether a request is alive, so that `schedule` will plan something in a while."""
        return bool(self._requests)

    def awaits_result(self) -> bool:
        """Whether a sequence can be planned only with what a step in flight samples for it."""
        return any(step.is_awaited for step in self._in_flight)

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes, pinned ones too; return how many blocks they had."""
        return self._tiers.clear()

    def stats(self) -> EngineStats:
        """A snapshot of the scheduler's share of the statistics."""
        num_running = len(self._rows.running) - len(self._ending)
        cache = CacheStats(
            num_blocks=self._cache.num_blocks,
            num_blocks_used=self._cache.num_referenced_blocks,
            num_blocks_cached=self._cache.num_cached_idle_blocks,
            use=block_use(self._cache, self._rows.running),
            num_blocks_pinned=self._cache.num_pinned_blocks,
            num_queries=self._cache.num_queried_tokens,
            num_hits=self._cache.num_hit_tokens,
            lower=self._tiers.stats(),
        )
        return EngineStats(
            num_running=num_running,
            num_waiting=self._num_alive_sequences - num_running,
            cache=cache,
            num_preemptions=self._supply.num_preemptions,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generation_tokens,
        )

    def check_invariants(self) -> None:
        """Assert what must hold between any two calls; slow, for tests."""
        self._cache.check_invariants(seq.table for seq in self._rows.running)
        self._rows.check_invariants()
        for seq in self._rows.running:
            assert seq.num_computed_tokens <= seq.num_known_tokens <= seq.max_num_tokens
            is_in_flight = seq.last_step > self._num_returned
            assert is_in_flight or len(seq.token_ids) == seq.num_known_tokens
            num_slots = len(seq.table.block_ids) * self._block_size
            assert seq.num_computed_tokens <= num_slots, "a computed token has no slot"
        alive = [seq for request in self._requests.values() for seq in request.sequences]
        num_held = sum(seq.status is Status.HELD for seq in alive)
        assert self.stats().num_waiting == len(self._waiting) + num_held
        assert self._num_unstarted_requests == sum(
            not request.is_started for request in self._requests.values()
        )

    # ---- One step ------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Plan the next step; it is empty if all that runs waits for steps in flight.

        Args:
            now: seconds on any clock that only goes forward.
        """
        self._now = now
        self._cache.end_pins(now)
        step = self._plan(now)
        while step.is_stuck and (self._rows.running or not step.may_admit):
            # Beams that wait for one another hold blocks which others of them, or of another
            # search, wait for. If the last group that ran had to go, others may come now.
            if self._rows.running:
                self._supply.preempt_last(step)
            step = self._plan(now)
        if not step.scheduled:
            return SchedulerOutput()
        step.begin()
        self._num_planned = step.number
        self._in_flight.append(step)
        stores, loads = self._tiers.take()
        return SchedulerOutput(
            finished_rows=self._rows.take_finished(),
            forks=self._groups.take_forks(),
            new_sequences=tuple(step.new_sequences),
            stores=stores,
            copies=tuple(step.copies),
            loads=loads,
            scheduled=tuple(step.scheduled),
        )

    def update(self, output: ModelOutput) -> list[TokenUpdate]:
        """Take the first result in flight: append tokens, end sequences, free blocks."""
        if not self._in_flight:
            return []
        step = self._in_flight.popleft()
        self._num_returned = step.number
        for seq, num_computed in step.unsampled:
            if seq.status is Status.RUNNING:
                self._cache.commit(seq.table, seq.token_ids, num_computed)
        updates = []
        for seq, sampled in zip(step.sampling, output.sampled, strict=True):
            if seq.status is not Status.RUNNING:
                continue  # It was aborted meanwhile, or it or its group has ended.
            if seq.request.search is None:
                updates.append(self._accept(seq, sampled))
            else:
                updates += self._accept_beam(seq, seq.request.search, sampled)
        for seq in [one for one in self._ending if one.last_step <= step.number]:
            self._ending.remove(seq)
            self._groups.give_back(seq)
        return updates

    # ---- Planning ------------------------------------------------------------------------------

    def _plan(self, now: float) -> Step:
        """Fill a step."""
        budget, number = self._config.max_num_batched_tokens, self._num_planned + 1
        step = Step(now, budget, number, may_preempt=not self._in_flight)
        prompts = self._schedule_decodes(step)
        if step.num_left:
            self._schedule_prompts(step, prompts)
        return step

    def _schedule_decodes(self, step: Step) -> list[Sequence]:
        """Give a token to every running sequence that has one to compute; return the others."""
        prompts = []
        scheduled, block_size = step.scheduled, self._block_size
        group: Request | None = None
        # NOTE: preemption shortens the list from its end while we walk it, and forks lengthen it
        # behind the one that we stand at; a list allows both.
        for seq in self._rows.running:
            num_tokens = seq.num_known_tokens
            num_computed = seq.num_computed_tokens
            if num_tokens - num_computed != 1:
                if num_tokens > num_computed:
                    prompts.append(seq)
                continue
            request = seq.request
            if request.is_group and request is not group:
                group = request
                if not self._supply.make_room(group, step):
                    break  # It was the last in rank and had to go, or waits for a step in flight.
            new_blocks: tuple[int, ...] = ()
            if num_tokens > len(seq.table.block_ids) * block_size:
                grown = self._supply.grow(seq, step)
                if grown is None:
                    break
                new_blocks = grown
            elif group is request:
                self._supply.own_block(seq, num_computed // block_size, step)
            scheduled.append(ScheduledSequence(seq.row, num_computed, 1, new_blocks, True))
            seq.num_computed_tokens = num_tokens
            step.num_left -= 1
            step.sampling.append(seq)
            if group is request and seq.is_first_sample:
                self._schedule_forks(seq, step)
        return prompts

    def _schedule_prompts(self, step: Step, prompts: list[Sequence]) -> None:
        """Share what is left of the budget between running prompts and waiting sequences."""
        for seq in prompts:
            self._load(seq)
        if step.may_admit:
            prompts += self._waiting.first(self._rows.num_free)
        shares: dict[Sequence, int] = {}
        if len(prompts) > 1:
            guaranteed = self._shares.take_guaranteed(step.num_left)
            self._share_out(step, self._in_turn(prompts, by_rank), guaranteed, shares)
            if not step.may_admit:
                prompts = [seq for seq in prompts if seq.status is Status.RUNNING]
            prompts = self._in_turn(prompts, by_remaining)
        self._share_out(step, prompts, step.num_left, shares)
        for seq, num_new in shares.items():
            self._schedule_chunk(step, seq, num_new)

    def _in_turn(self, prompts: list[Sequence], key: Callable[[Sequence], Any]) -> list[Sequence]:
        """Sort by a key, under the policy "fair" within each client."""
        if self._counters is None:
            return sorted(prompts, key=key)
        return self._counters.sort(prompts, key)

    def _share_out(
        self, step: Step, prompts: list[Sequence], num_tokens: int, shares: dict[Sequence, int]
    ) -> None:
        """Hand out `num_tokens` in the given order; who still waits is admitted at its turn."""
        for seq in prompts:
            if num_tokens == 0:
                return
            if seq.status is Status.WAITING and not self._admit(seq, step):
                continue
            has = shares.get(seq, 0)
            gets = min(num_tokens, seq.num_remaining_tokens - has)
            shares[seq] = has + gets
            step.num_left -= gets
            num_tokens -= gets

    def _schedule_chunk(self, step: Step, seq: Sequence, num_new: int) -> None:
        """Plan the next `num_new` tokens of a prompt."""
        num_computed = seq.num_computed_tokens
        seq.num_computed_tokens = num_computed + num_new
        is_sampling = seq.num_computed_tokens == seq.num_known_tokens
        new_blocks = step.admitted_blocks.get(seq, ())
        step.scheduled.append(
            ScheduledSequence(seq.row, num_computed, num_new, new_blocks, is_sampling)
        )
        if not is_sampling:
            step.unsampled.append((seq, seq.num_computed_tokens))
            return
        step.sampling.append(seq)
        if seq.request.is_group and seq.is_first_sample:
            self._schedule_forks(seq, step)

    def _schedule_forks(self, leader: Sequence, step: Step) -> None:
        """Sample for the siblings of a sequence too, whose prompt is complete with this step."""
        for seq in self._groups.fork_samples(leader):
            num_tokens = len(seq.token_ids)
            block_ids = tuple(seq.table.block_ids)
            step.new_sequences.append(new_sequence(seq))
            step.scheduled.append(ScheduledSequence(seq.row, num_tokens, 0, block_ids, True))
            step.sampling.append(seq)

    def _admit(self, seq: Sequence, step: Step) -> bool:
        """Give a waiting sequence a row, its cached prefix and blocks for all its known tokens.

        When one finds no room, nobody after it is admitted in this step either: smaller ones would
        overtake it for ever.
        """
        if not step.may_admit:
            return False
        prefix = self._groups.find_prefix(seq)
        running = self._rows.running
        num_siblings = sum([one.status is Status.RUNNING for one in seq.request.sequences])
        num_reserved = RESERVED_BLOCKS * (len(running) - num_siblings)
        while (
            new_blocks := self._cache.allocate(seq.table, len(seq.token_ids), prefix, num_reserved)
        ) is None:
            if running or not self._cache.drop_pins():  # No pin keeps all from running.
                step.may_admit = False
                return False
        num_cached = self._tiers.load(seq.table, seq.token_ids, prefix.num_tokens)
        if self._on_admitted is not None:
            self._on_admitted(prefix_report(self._cache, seq, num_cached, running))
        self._waiting.remove(seq)
        self._start(seq, num_cached, step.now)
        step.admitted_blocks[seq] = new_blocks
        step.new_sequences.append(new_sequence(seq))
        return True

    def _start(self, seq: Sequence, num_cached: int, now: float) -> None:
        """Move a sequence, just out of the queue and with its blocks, into a row."""
        request = seq.request
        if not request.is_started:
            request.is_started = True
            request.num_cached_tokens = num_cached
            self._num_unstarted_requests -= 1
            self._num_prompt_tokens += request.num_prompt_tokens
            self._drain_rate.note_start(now)
            if self._counters is not None:
                computed = request.num_prompt_tokens - num_cached
                self._counters.charge(request.client, num_prompt_tokens=computed)
        seq.num_computed_tokens = num_cached
        seq.status = Status.RUNNING
        self._rows.insert(seq)

    def _load(self, seq: Sequence) -> None:
        """Have a running prompt's next blocks loaded, if the tier below the pool has them."""
        request, num_computed = seq.request, seq.num_computed_tokens
        seq.num_computed_tokens = self._tiers.load(seq.table, seq.token_ids, num_computed)
        # Preempted ones may load the same blocks again.
        num_cached = request.num_cached_tokens + seq.num_computed_tokens - num_computed
        request.num_cached_tokens = min(num_cached, request.num_prompt_tokens - 1)

    # ---- Taking results ------------------------------------------------------------------------

    def _accept(self, seq: Sequence, sampled: SampledTokens) -> TokenUpdate:
        """Append what was sampled for a running sequence, and end it if that ends it."""
        (token_id,) = sampled.token_ids
        request, table = seq.request, seq.table
        if token_id < 0:
            self._tiers.discard(table)  # Its K and V may be as broken as its logits.
            self._end(seq)
            return TokenUpdate(request.request_id, seq.index, finish_reason="error")
        num_computed = len(seq.token_ids)  # By this step; a later one may be in flight.
        if num_computed // self._block_size > table.num_committed_blocks:
            self._cache.commit(table, seq.token_ids, num_computed)
        finish_reason = seq.append(token_id)
        self._num_generation_tokens += 1
        if self._counters is not None:
            self._counters.charge(request.client, num_output_tokens=1)
        is_first = seq.num_output_tokens == 1
        if is_first and request.pin_names:
            self._cache.pin(request.pin_names, self._now + request.pin_s)
        if request.is_group:
            self._release(request)
        if finish_reason is not None:
            self._end(seq)
        is_users_stop = finish_reason == "stop" and token_id not in request.eos_ids
        return TokenUpdate(
            request.request_id,
            seq.index,
            sampled.token_ids,
            sampled.logprobs,
            finish_reason,
            token_id if is_users_stop else None,
            request.num_cached_tokens if is_first else 0,
        )

    def _accept_beam(
        self, seq: Sequence, search: BeamSearch, sampled: SampledTokens
    ) -> list[TokenUpdate]:
        """Take a beam's candidates; once all beams have theirs, go on to the next round."""
        request = seq.request
        if sampled.token_ids[0] < 0:
            for one in request.sequences:
                self._tiers.discard(one.table)
            return self._end_all(request, "error")
        self._cache.commit(seq.table, seq.token_ids, seq.num_computed_tokens)
        if seq.num_output_tokens == 0 and request.pin_names:
            self._cache.pin(request.pin_names, self._now + request.pin_s)
        self._num_generation_tokens += 1
        if self._counters is not None:
            self._counters.charge(request.client, num_output_tokens=1)
        (seq.beam.next,) = sampled.logprobs
        self._release(request)
        live = request.live
        if any(one.beam.next is None for one in live):
            return []
        outputs = [one.token_ids[request.num_prompt_tokens :] for one in live]
        beams = search.advance([one.beam for one in live], outputs)
        if beams:
            self._groups.branch(request, beams)
            return []
        self._end_all(request, "stop")
        best = search.finished[: request.params.n]
        return [beam_update(request, place, one) for place, one in enumerate(best)]

    def _end_all(self, request: Request, finish_reason: FinishReason) -> list[TokenUpdate]:
        """Finish every sequence of a request; return an update for each that the user sees."""
        for seq in request.sequences:
            if seq.status is not Status.FINISHED:
                self._end(seq)
        name, cached = request.request_id, request.num_cached_tokens
        return [
            TokenUpdate(name, index, finish_reason=finish_reason, num_cached_tokens=cached)
            for index in range(request.params.n)
        ]

    def _end(self, seq: Sequence) -> None:
        """Finish a sequence, wherever it stands; the request is forgotten with its last one."""
        request, status = seq.request, seq.status
        seq.status = Status.FINISHED
        if status is Status.WAITING:
            self._waiting.remove(seq)
        elif status is Status.RUNNING and seq.last_step > self._num_returned:
            self._ending.append(seq)
            seq.num_known_tokens = seq.num_computed_tokens
        elif status is Status.RUNNING:
            self._groups.give_back(seq)
        if status is not Status.HELD:
            self._release(request, 1)  # If others were held, it was for this one.
        self._num_alive_sequences -= 1
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            self._cache.cancel_pin(request.pin_names)
            del self._requests[request.request_id]
            if self._counters is not None:
                self._counters.leave(request.client)
            self._num_unstarted_requests -= not request.is_started

    # ---- Small things --------------------------------------------------------------------------

    def _check_queue(self, request: EngineRequest, now: float) -> None:
        """Raise if the request's id is in use or the waiting queue is full."""
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"a request with the id {request.request_id!r} is running", param="request_id"
            )
        most = self._config.max_num_waiting
        self._drain_rate.refuse_if_full(self._num_unstarted_requests, most, now)

    def _make_sequences(
        self, record: Request, request: EngineRequest, now: float
    ) -> list[Sequence]:
        """The sequences of a new request, all of them held."""
        rank = urgency(self._config.policy, request.priority, now), self._num_arrivals
        prompt = array("i", request.prompt_ids)
        most = self._limits.max_num_tokens(request)
        return [
            Sequence(
                request=record,
                index=index,
                rank=(*rank, index),
                token_ids=prompt[:],
                num_known_tokens=len(prompt),
                num_foreseen_tokens=most - 1 if record.can_look_ahead else 0,
                max_num_tokens=most,
                table=self._cache.new_table(request.cache.salt, request.cache.scope),
                status=Status.HELD,
            )
            for index in range(request.params.num_sequences)
        ]

    def _release(self, request: Request, count: int | None = None) -> None:
        """Let sequences of a request that are held wait in the queue: the first, or all."""
        for seq in request.held[:count]:
            self._wait(seq)

    def _wait(self, seq: Sequence) -> None:
        """Put a sequence that holds nothing into the queue."""
        prefix = self._cache.match_prefix(seq.table, seq.token_ids)
        seq.num_expected_tokens = len(seq.token_ids) - prefix.num_tokens
        seq.status = Status.WAITING
        self._waiting.add(seq)

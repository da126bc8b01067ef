"""Random histories of requests, aborts and steps through the scheduler and a simulated KV memory.

After every call the invariants hold, and at the end every sequence has given exactly the tokens
that it gives alone: whatever was batched, chunked, shared, preempted or aborted beside it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo.errors import ContextLengthError, InvalidRequestError, OverloadedError
from octavo.types import CacheParams, EngineRequest, PrefixReport, SamplingParams

SMALL_WORLDS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(3, 16),
        "max_model_len": st.integers(8, 60),
        "block_size": st.integers(1, 6),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.one_of(st.integers(1, 4), st.integers(5, 40)),
        "max_num_waiting": st.integers(1, 6),
        "use_prefix_cache": st.booleans(),
        "policy": st.sampled_from(["fcfs", "priority", "fair"]),
        "tier": st.sampled_from([None, None, (1, 1000), (100, 1000), (100, 5)]),
        "depth": st.sampled_from([1, 2, 2, 3]),
    }
)
# Few beginnings and few token ids, so that prompts share prefixes all the time.
PROMPTS = st.builds(
    lambda text, cut, tail: ([text] * 30 + list(range(10)))[:cut] + tail,
    st.integers(1, 2),
    st.integers(0, 40),
    st.lists(st.integers(1, 3), min_size=0, max_size=12),
)
PARAMS = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 4]),
    seed=st.integers(1, 14),
    stop_token_ids=st.sampled_from([(), (), (3, 5)]),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 4),
    max_tokens=st.integers(1, 30),
)
CACHES = st.builds(
    CacheParams,
    salt=st.sampled_from(["", "", "a"]),
    scope=st.sampled_from(["", "", "k"]),
    pin_s=st.sampled_from([0, 0, 0.5, 5, 60]),  # A step takes a second.
)


SEARCHES = st.builds(
    lambda n, more, **values: SamplingParams(
        n=n, best_of=n + more, use_beam_search=True, temperature=0, **values
    ),
    st.integers(1, 2),
    st.integers(0, 3),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
    stop_token_ids=st.sampled_from([(), (3, 5)]),
    ignore_eos=st.booleans(),
    max_tokens=st.integers(1, 12),
)


class Histories(RuleBasedStateMachine):
    """Drives one World; `requests` is everything that was accepted."""

    def __init__(self, simulation: SimpleNamespace) -> None:
        super().__init__()
        self.simulation = simulation
        self.requests: dict[str, EngineRequest] = {}
        self.aborted: set[tuple[str, int]] = set()

    @initialize(options=SMALL_WORLDS, explains=st.booleans())
    def start(self, options: dict[str, Any], explains: bool) -> None:
        tier = options.pop("tier")
        self.tier = None if tier is None else self.simulation.FakeTier(*tier)
        reports: list[PrefixReport] | None = [] if explains else None
        self.world = self.simulation.World(**options, tier=self.tier, reports=reports)
        self.scheduler = self.world.scheduler

    @rule(
        asked=st.lists(
            st.tuples(PROMPTS, st.one_of(PARAMS, PARAMS, SEARCHES), st.integers(-1, 1), CACHES),
            min_size=1,
            max_size=4,
        )
    )
    def add(self, asked: list[tuple[list[int], SamplingParams, int, CacheParams]]) -> None:
        for one in asked:
            self._add(*one)

    def _add(
        self, prompt: list[int], params: SamplingParams, priority: int, cache: CacheParams
    ) -> None:
        request = EngineRequest(
            request_id=str(len(self.requests)),
            prompt_ids=prompt or [1],
            params=params,
            priority=priority,
            client=str(priority),
            cache=cache,
        )
        self.scheduler._cache.end_pins(float(self.world.num_steps))
        before = self.scheduler.stats()
        try:
            self.scheduler.add(request, float(self.world.num_steps))
        except ContextLengthError:
            assert not self._fits(request)
            assert self.scheduler.stats() == before
        except OverloadedError as error:
            if error.code == "cache_pins_full":
                assert cache.pin_s
            else:
                assert before.num_waiting >= self.world.config.max_num_waiting
            assert 1 <= error.retry_after_s <= 61
            assert self.scheduler.stats() == before
        except InvalidRequestError as error:
            if error.param == "cache_pin_s":
                assert cache.pin_s and not self._may_be_pinned(request)
            else:
                assert params.num_sequences > self._num_rows()
            assert self.scheduler.stats() == before
        else:
            assert self._fits(request)
            assert not cache.pin_s or self._may_be_pinned(request)
            self.requests[request.request_id] = request
        self.scheduler.check_invariants()

    @precondition(lambda self: self.scheduler.has_work())
    @rule(num_steps=st.integers(1, 20))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.scheduler.has_work():
                self.world.step()

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data(), is_in_flight=st.booleans())
    def abort(self, data: st.DataObject, is_in_flight: bool) -> None:
        if not is_in_flight:
            self._abort(data)
            return
        if self.world.depth > 1:
            self.world.step()
        else:
            self.world.schedule()
        for _ in range(data.draw(st.integers(1, 3))):
            self._abort(data)
        if self.world.depth == 1:
            updates = self.world.finish_step()
        elif self.scheduler.has_work():
            updates = self.world.step()
        else:
            return
        assert self.aborted.isdisjoint((u.request_id, u.index) for u in updates)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()
        self.scheduler.check_invariants()
        cache = self.scheduler.stats().cache
        assert cache.num_blocks_cached == cache.num_blocks_pinned == 0
        assert self.tier is None or not self.tier.blocks

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        lengths = [r.params.num_sequences * self._max_len(r) for r in self.requests.values()]
        self.world.drain(max_steps=10 + 4 * sum(lengths))
        for request_id, request in self.requests.items():
            if request.params.use_beam_search:
                self._check_beams(request)
                continue
            for index in range(request.params.n):
                output = self.world.output(request_id, index)
                reason = self.world.finish_reason(request_id, index)
                alone, reason_alone = self.simulation.run_alone(
                    request, index, self.world.capacity.max_model_len
                )
                if (request_id, index) in self.aborted:
                    assert reason == "abort"
                    assert output == alone[: len(output)]
                else:
                    assert (output, reason) == (alone, reason_alone)

    def _check_beams(self, request: EngineRequest) -> None:
        world, request_id = self.world, request.request_id
        indexes = range(request.params.n)
        found = [(world.output(request_id, i), world.finish_reason(request_id, i)) for i in indexes]
        if (request_id, 0) in self.aborted:
            assert found == [([], "abort")] * request.params.n
        else:
            max_model_len = world.capacity.max_model_len
            assert found == self.simulation.search_alone(request, max_model_len)

    def _abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        indexes = range(self.requests[request_id].params.n)
        index = data.draw(st.sampled_from([*indexes, None]))
        alive = {
            (request_id, i)
            for i in indexes
            if (index in (None, i) or self.requests[request_id].params.use_beam_search)
            and self.world.finish_reason(request_id, i) is None
        }
        updates = self.world.abort(request_id, index)
        assert {(u.request_id, u.index) for u in updates} == alive
        assert all(u.finish_reason == "abort" and not u.token_ids for u in updates)
        self.aborted |= alive

    def _max_len(self, request: EngineRequest) -> int:
        assert request.params.max_tokens is not None
        asked = len(request.prompt_ids) + request.params.max_tokens
        return min(asked, self.world.capacity.max_model_len)

    def _fits(self, request: EngineRequest) -> bool:
        capacity = self.world.capacity
        num_slots = capacity.kv_pool.num_blocks * capacity.kv_pool.block_size
        has_room = len(request.prompt_ids) < capacity.max_model_len
        num_written = self._max_len(request) - 1
        if request.params.use_beam_search:
            size = capacity.kv_pool.block_size
            shared = len(request.prompt_ids) // size
            own = -(-num_written // size) - shared
            num_written = (shared + own * request.params.num_sequences) * size
        return has_room and num_written <= num_slots

    def _num_rows(self) -> int:
        config = self.world.config
        return min(config.max_num_seqs, config.max_num_batched_tokens)

    def _may_be_pinned(self, request: EngineRequest) -> bool:
        num_blocks = len(request.prompt_ids) // self.world.config.block_size
        most = self.world.capacity.kv_pool.num_blocks // 2
        return self.world.config.use_prefix_cache and num_blocks <= most


def run_histories(simulation: SimpleNamespace, max_examples: int, num_rules: int) -> None:
    run_state_machine_as_test(
        lambda: Histories(simulation),
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_rules,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_histories_keep_every_promise(simulation: SimpleNamespace) -> None:
    run_histories(simulation, max_examples=400, num_rules=30)


@pytest.mark.slow
def test_many_long_random_histories_keep_every_promise(simulation: SimpleNamespace) -> None:
    run_histories(simulation, max_examples=3000, num_rules=80)

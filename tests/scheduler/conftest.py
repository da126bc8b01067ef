"""A scheduler without a model: its executor only remembers what lies in every KV slot."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from octavo.config import EngineConfig
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    OPEN_CACHE,
    CacheParams,
    Capacity,
    EngineRequest,
    KVPool,
    ModelOutput,
    NewSequence,
    PrefixReport,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
    TierStats,
    TokenLogprob,
    TokenUpdate,
)

VOCAB_SIZE = 24
EOS = 0
MASK = 2**61 - 1


def prefix_names(token_ids: list[int], names: list[int] | None = None) -> list[int]:
    """One number for each token that depends on it and on every token before it."""
    names = [] if names is None else names
    for token_id in token_ids[len(names) :]:
        names.append(((names[-1] if names else 17) * 1_000_003 + token_id + 1) * 31 & MASK)
    return names


def fake_sample(name: int, num_output: int, index: int, params: SamplingParams) -> int:
    """The fake model: the next token is a pure function of the prefix, the seed and the index.

    A seed that is a multiple of 7 breaks the logits at its third token. As the real runner does, it
    never samples a token that ends the text before `min_tokens`.
    """
    seed = params.seed or 0
    if seed and seed % 7 == 0 and num_output == 2:
        return -1
    mixed = (name ^ (seed * 0x9E3779B1) ^ (index * 0x85EBCA6B)) * 0xC2B2AE35 & MASK
    token_id = (mixed >> 20) % VOCAB_SIZE
    banned = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    while num_output < params.min_tokens and token_id in banned:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def run_alone(request: EngineRequest, index: int, max_model_len: int) -> tuple[list[int], str]:
    """What one sequence must give, from a plain loop without scheduler, cache or batch."""
    params = request.params
    tokens = list(request.prompt_ids)
    output: list[int] = []
    while True:
        token_id = fake_sample(prefix_names(tokens)[-1], len(output), index, params)
        if token_id < 0:
            return output, "error"
        is_banned = len(output) < params.min_tokens
        tokens.append(token_id)
        output.append(token_id)
        is_eos = token_id == EOS and not params.ignore_eos
        if not is_banned and (is_eos or token_id in params.stop_token_ids):
            return output, "stop"
        if len(output) == params.max_tokens or len(tokens) == max_model_len:
            return output, "length"


def fake_logprobs(name: int) -> list[tuple[int, float]]:
    """(token, log probability) of every token after a prefix; many are equal."""
    return [
        (token, -((name ^ (token * 0x9E3779B1)) * 0xC2B2AE35 & MASK) % 40 / 8 - 0.5)
        for token in range(VOCAB_SIZE)
    ]


def search_alone(request: EngineRequest, max_model_len: int) -> list[tuple[list[int], str]]:
    """The best beams of a request, best first: transformers' algorithm over whole sequences."""
    params, prompt = request.params, list(request.prompt_ids)
    width, penalty = params.num_sequences, params.length_penalty
    enders = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    most = min(params.max_tokens or max_model_len, max_model_len - len(prompt))
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int], str]] = []
    for length in range(1, most + 1):
        longer = [
            (score + logprob, [*tokens, token])
            for score, tokens in beams
            for token, logprob in fake_logprobs(prefix_names(prompt + tokens)[-1])
        ]
        longer.sort(key=lambda one: -one[0])
        ended = [
            (score / length**penalty, tokens, "stop" if tokens[-1] in enders else "length")
            for score, tokens in longer[:width]
            if tokens[-1] in enders or length == most
        ]
        if not (params.early_stopping is True and len(done) == width):
            done = sorted(done + ended, key=lambda one: -one[0])[:width]
        beams = [one for one in longer if one[1][-1] not in enders][:width]
        if len(done) == width:
            reach = most if params.early_stopping == "never" and penalty > 0 else length
            if params.early_stopping is True or beams[0][0] / reach**penalty <= done[-1][0]:
                break
    return [(tokens, reason) for _, tokens, reason in done[: params.n]]


@dataclass
class Row:
    """What the runner knows of a row."""

    new: NewSequence
    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    num_computed: int = 0


Slots = tuple[tuple[int, int], ...]
"""What lies in the slots of a block: (position, name of the prefix) of each."""


class FakeTier:
    """Keeps what is stored below the pool, and checks what is asked of it."""

    def __init__(self, most_blocks: int, capacity: int = 1_000_000) -> None:
        self.most_blocks = most_blocks
        self.capacity = capacity
        self.blocks: dict[bytes, Slots] = {}
        self.staged: set[bytes] = set()
        self.num_loads = 0
        self._meaning: dict[bytes, Slots] = {}

    def fetch(self, hashes: Sequence[bytes]) -> int:
        assert len(set(hashes)) == len(hashes)
        known = list(itertools.takewhile(self.blocks.__contains__, hashes))
        self.staged.update(known[: self.most_blocks])
        return len(known[: self.most_blocks])

    def discard(self, hashes: Sequence[bytes]) -> None:
        for prefix_hash in hashes:
            self.blocks.pop(prefix_hash, None)

    def clear(self) -> None:
        self.blocks.clear()

    def stats(self) -> TierStats:
        return TierStats(num_blocks=len(self.blocks))

    def store(self, prefix_hash: bytes, content: Slots) -> None:
        assert self._meaning.setdefault(prefix_hash, content) == content, "a hash with two meanings"
        self.blocks[prefix_hash] = content
        if len(self.blocks) > self.capacity:
            del self.blocks[next(iter(self.blocks))]

    def load(self, prefix_hash: bytes) -> Slots:
        assert prefix_hash in self.staged, "a load of what was not fetched"
        self.num_loads += 1
        return self._meaning[prefix_hash]


class SimulatedExecutor:
    """Keeps what was last written into each slot, and checks every read against it."""

    def __init__(self, num_blocks: int, block_size: int, tier: FakeTier | None = None) -> None:
        self.tier = tier
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.memory: dict[int, tuple[int, int]] = {}
        self.rows: dict[int, Row] = {}

    def run(self, plan: SchedulerOutput) -> ModelOutput:
        for row in plan.finished_rows:
            self.rows.pop(row, None)
        self._fork(plan)
        for new in plan.new_sequences:
            assert new.row not in self.rows, "a row is reused before it was told to be finished"
            self.rows[new.row] = Row(new, list(new.token_ids))
        self._store(plan)
        for copy in plan.copies:
            row = self.rows[copy.row]
            assert row.block_ids[copy.index] == copy.source
            row.block_ids[copy.index] = copy.destination
            for offset in range(self.block_size):
                source = copy.source * self.block_size + offset
                if source in self.memory:
                    self.memory[copy.destination * self.block_size + offset] = self.memory[source]
        self._load(plan)
        before: Row | None = None
        for entry in plan.scheduled:
            row = self.rows[entry.row]
            row.block_ids += entry.new_block_ids
            assert all(0 <= block_id < self.num_blocks for block_id in entry.new_block_ids)
            end = entry.num_computed_tokens + entry.num_new_tokens
            if entry.num_new_tokens == 0:
                assert before is not None, "there are no logits to sample from"
                assert (entry.is_sampling, row.token_ids) == (True, before.token_ids)
            else:
                before = row
            assert end <= len(row.token_ids)
            assert end <= len(row.block_ids) * self.block_size, "a token has no slot"
            assert entry.is_sampling == (end == len(row.token_ids))
            is_next = row.num_computed in (0, entry.num_computed_tokens)
            assert is_next or plan.loads, "a chunk was skipped"
            row.num_computed = end
            prefix_names(row.token_ids, row.names)
            self._check_writes(row, entry.num_computed_tokens, end)
            for position in range(entry.num_computed_tokens, end):
                self.memory[self._slot(row, position)] = position, row.names[position]
        # All writes come before any read, as in one batch: a write into a shared block shows.
        return ModelOutput(
            sampled=tuple(
                self._sample(entry.row)
                for entry in plan.scheduled
                if self._check_reads(self.rows[entry.row]) and entry.is_sampling
            )
        )

    def _store(self, plan: SchedulerOutput) -> None:
        """Keep blocks in the tier."""
        assert self.tier is not None or not (plan.stores or plan.loads)
        for prefix_hash, block_id in plan.stores:
            assert self.tier is not None
            begin = block_id * self.block_size
            slots = range(begin, begin + self.block_size)
            self.tier.store(prefix_hash, tuple(self.memory[slot] for slot in slots))

    def _load(self, plan: SchedulerOutput) -> None:
        """Fill blocks from the tier."""
        if self.tier is None:
            return
        for prefix_hash, block_id in plan.loads:
            begin = block_id * self.block_size
            for offset, content in enumerate(self.tier.load(prefix_hash)):
                self.memory[begin + offset] = content
        self.tier.staged.clear()

    def _fork(self, plan: SchedulerOutput) -> None:
        """A row is, whole, what its parent was before, up to the last token."""
        old = {row: deepcopy(self.rows[row]) for row in {fork.parent_row for fork in plan.forks}}
        for fork in plan.forks:
            row = deepcopy(old[fork.parent_row])
            assert fork.position == row.num_computed
            row.token_ids = [*row.token_ids[: fork.position], fork.token_id]
            del row.names[fork.position :]
            self.rows[fork.row] = row

    def _slot(self, row: Row, position: int) -> int:
        at, offset = divmod(position, self.block_size)
        return row.block_ids[at] * self.block_size + offset

    def _check_writes(self, row: Row, begin: int, end: int) -> None:
        size = self.block_size
        written = {row.block_ids[position // size] for position in range(begin, end)}
        for other in self.rows.values():
            assert other is row or written.isdisjoint(other.block_ids), "a shared block is written"

    def _check_reads(self, row: Row) -> bool:
        for position in range(row.num_computed):
            found = self.memory.get(self._slot(row, position))
            assert found == (position, row.names[position]), "the cache serves another prefix"
        return True

    def _sample(self, row_id: int) -> SampledTokens:
        row = self.rows[row_id]
        params = row.new.params
        num_output = len(row.token_ids) - row.new.num_prompt_tokens
        if not params.use_beam_search:
            token_id = fake_sample(row.names[-1], num_output, row.new.index, params)
            row.token_ids.append(token_id)
            return SampledTokens(row_id, (token_id,))
        assert params.logprobs is not None and params.temperature == 0
        top = sorted(fake_logprobs(row.names[-1]), key=lambda one: (-one[1], one[0]))
        row.token_ids.append(top[0][0])
        logprobs = TokenLogprob(*top[0], tuple(top[: params.logprobs]))
        return SampledTokens(row_id, (top[0][0],), (logprobs,))


class World:
    """A scheduler and its simulated executor, stepping together."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_model_len: int = 1024,
        tier: FakeTier | None = None,
        reports: list[PrefixReport] | None = None,
        depth: int = 1,
        **options: object,
    ) -> None:
        self.depth = depth  # Steps that are in flight before the first result is taken.
        self.outputs: deque[ModelOutput] = deque()
        self.config = EngineConfig(
            **{  # type: ignore[arg-type]
                "model": "fake",
                "served_name": "fake",
                "memory_bytes": 1,
                "num_threads": 1,
                "block_size": 4,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 32,
                "max_num_waiting": 100,
                **options,
            }
        )
        self.capacity = Capacity(
            model="fake",
            architecture="fake",
            num_parameters=0,
            max_model_len=max_model_len,
            kv_pool=KVPool(num_blocks=num_blocks, block_size=self.config.block_size, num_bytes=0),
            weights_bytes=0,
            vocab_size=VOCAB_SIZE,
            backend="fake",
        )
        on_admitted = None if reports is None else reports.append
        self.scheduler = Scheduler(self.config, self.capacity, frozenset({EOS}), tier, on_admitted)
        self.executor = SimulatedExecutor(num_blocks, self.config.block_size, tier)
        self.num_steps = 0
        self.plan = SchedulerOutput()
        self.updates: list[TokenUpdate] = []
        self._num_requests = 0

    def add(
        self,
        prompt_ids: list[int],
        *,
        priority: int = 0,
        name: str = "",
        cache: CacheParams = OPEN_CACHE,
        client: str = "",
        **params: object,
    ) -> str:
        """Add a request that by default ignores end-of-text; returns its id."""
        self._num_requests += 1
        request_id = name or f"request-{self._num_requests}"
        values = {"ignore_eos": True, "max_tokens": 4, "seed": 1, **params}
        self.scheduler.add(
            EngineRequest(
                request_id=request_id,
                prompt_ids=prompt_ids,
                params=SamplingParams(**values),  # type: ignore[arg-type]
                priority=priority,
                cache=cache,
                client=client,
            ),
            float(self.num_steps),
        )
        return request_id

    def schedule(self) -> SchedulerOutput:
        """Plan a step, and check what is promised of every plan."""
        self.plan = self.scheduler.schedule(float(self.num_steps))
        assert self.plan.scheduled or self.outputs, "work to do and none planned"
        assert self.plan.num_tokens <= self.config.max_num_batched_tokens
        rows = [entry.row for entry in self.plan.scheduled]
        assert len(rows) == len(set(rows)) <= self.config.max_num_seqs
        assert all(0 <= row < self.config.max_num_seqs for row in rows)
        return self.plan

    def finish_step(self) -> list[TokenUpdate]:
        """Compute the planned step and take the result."""
        self.outputs.append(self.executor.run(self.plan))
        return self._take_result()

    def _take_result(self) -> list[TokenUpdate]:
        updates = self.scheduler.update(self.outputs.popleft())
        self.updates += updates
        self.num_steps += 1
        self.scheduler.check_invariants()
        self._check_use()
        return updates

    def _check_use(self) -> None:
        """The accounts are those of the slots themselves."""
        size, cache = self.config.block_size, self.scheduler.stats().cache
        running = self.scheduler._rows.running
        slots = {
            (seq.table.block_ids[position // size], position % size)
            for seq in running
            for position in range(seq.num_computed_tokens)
        }
        held = Counter(block_id for seq in running for block_id in seq.table.block_ids)
        use = cache.use
        assert use.num_tokens == len(slots)
        assert use.num_empty_slots == cache.num_blocks_used * size - len(slots)
        assert use.num_shared_blocks == sum(count > 1 for count in held.values())
        assert use.num_saved_blocks == held.total() - len(held)

    def step(self) -> list[TokenUpdate]:
        """Plan a step, and take the result of the first one in flight if there are enough."""
        plan = self.schedule()
        if plan.scheduled:
            self.outputs.append(self.executor.run(plan))
            if len(self.outputs) < self.depth:
                self.scheduler.check_invariants()
                return []
        return self._take_result()

    def abort(self, request_id: str, index: int | None = None) -> list[TokenUpdate]:
        """End a request or a sequence."""
        updates = self.scheduler.abort(request_id, index)
        self.updates += updates
        self.scheduler.check_invariants()
        return updates

    def drain(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left to do, then check that nothing is left over."""
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                break
            self.step()
        while self.outputs:
            self._take_result()
        assert not self.scheduler.has_work(), f"still at work after {max_steps} steps"
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.cache.num_blocks_used) == (0, 0, 0)

    def output(self, request_id: str, index: int = 0) -> list[int]:
        """All tokens that a sequence was given so far."""
        return [
            token_id
            for update in self.updates
            if (update.request_id, update.index) == (request_id, index)
            for token_id in update.token_ids
        ]

    def finish_reason(self, request_id: str, index: int = 0) -> str | None:
        """The one finish reason of a sequence, or None while it is alive."""
        reasons = [
            update.finish_reason
            for update in self.updates
            if (update.request_id, update.index) == (request_id, index) and update.finish_reason
        ]
        assert len(reasons) <= 1, "a sequence ended twice"
        return reasons[0] if reasons else None


@pytest.fixture(scope="session")
def simulation() -> SimpleNamespace:
    """The names of this file that tests use (test folders are no packages to import from)."""
    return SimpleNamespace(
        World=World,
        FakeTier=FakeTier,
        run_alone=run_alone,
        search_alone=search_alone,
        EOS=EOS,
        VOCAB_SIZE=VOCAB_SIZE,
    )


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    """Makes a World: `make_world(num_blocks=…, max_model_len=…, **options of EngineConfig)`."""
    return World

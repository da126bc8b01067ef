"""Random histories of tables, beside a model that knows what each block holds."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo.kv_cache.manager import BlockTable, KVCacheManager

# Few token ids and a common beginning: prefixes are shared, and differ, all the time.
TOKENS = st.builds(
    lambda length, tail: [1] * length + tail,
    st.integers(0, 12),
    st.lists(st.integers(1, 2), min_size=1, max_size=5),
)


SALTS = st.sampled_from(["", "", "a"])
Name = tuple[str, tuple[int, ...]]
"""What the hash of a block stands for: the salt, and all tokens from the first one on."""


class Row:
    """One sequence: its tokens, how many are computed, and its table."""

    def __init__(self, token_ids: list[int], num_computed: int, salt: str, table: BlockTable):
        self.token_ids = array("i", token_ids)
        self.prompt = self.token_ids[:]
        self.num_computed = num_computed
        self.num_committed = num_computed
        self.salt = salt
        self.table = table
        self.pin_names: tuple[bytes, ...] | None = None


class ManagerHistories(RuleBasedStateMachine):
    """`content` says what was last written into each block, and how many resets came before."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.content: dict[int, tuple[int, Name]] = {}
        self.num_resets = 0
        self.now = 0.0
        self.pins: dict[Name, int] = {}

    @initialize(
        num_blocks=st.integers(1, 24),
        block_size=st.integers(1, 5),
        use_prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks: int, block_size: int, use_prefix_cache: bool) -> None:
        self.manager = KVCacheManager(num_blocks, block_size, use_prefix_cache)
        self.block_size = block_size
        self.max_pinned = num_blocks // 2 if use_prefix_cache else 0

    @rule(
        token_ids=TOKENS,
        salt=SALTS,
        num_reserved=st.integers(0, 2),
        is_to_be_pinned=st.booleans(),
        is_computed=st.booleans(),
    )
    def admit(
        self,
        token_ids: list[int],
        salt: str,
        num_reserved: int,
        is_to_be_pinned: bool,
        is_computed: bool,
    ) -> None:
        table = self.manager.new_table(salt)
        prefix = self.manager.match_prefix(table, array("i", token_ids))
        assert prefix.num_tokens < len(token_ids)
        assert prefix.num_tokens == len(prefix.block_ids) * self.block_size
        names = self._names(salt, token_ids)
        for block_id, name in zip(prefix.block_ids, names, strict=False):
            assert self.content[block_id] == (self.num_resets, name)
        num_idle = sum(
            not self._is_referenced(block_id) and name not in self.pins
            for block_id, name in zip(prefix.block_ids, names, strict=False)
        )
        num_needed = -(-len(token_ids) // self.block_size) - len(prefix.block_ids) + num_idle
        has_room = num_needed + num_reserved <= self.manager.num_free_blocks
        before = self._state()
        new_ids = self.manager.allocate(table, len(token_ids), prefix, num_reserved)
        assert (new_ids is not None) == has_room
        if new_ids is None:
            assert self._state() == before
            assert table.block_ids == []
            return
        assert list(new_ids) == table.block_ids
        assert new_ids[: len(prefix.block_ids)] == prefix.block_ids
        self._overwrite(new_ids[len(prefix.block_ids) :])
        self.rows.append(Row(token_ids, prefix.num_tokens, salt, table))
        if is_to_be_pinned:
            self._reserve(self.rows[-1])
        if is_computed:
            self._compute(self.rows[-1], len(token_ids), is_committed=True)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), is_whole=st.booleans(), is_committed=st.booleans())
    def compute(self, data: st.DataObject, is_whole: bool, is_committed: bool) -> None:
        row = data.draw(st.sampled_from(self.rows))
        num_tokens = len(row.token_ids)
        num_computed = (
            num_tokens if is_whole else data.draw(st.integers(row.num_computed, num_tokens))
        )
        self._compute(row, num_computed, is_committed)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), new_ids=st.lists(st.integers(1, 2), min_size=1, max_size=6))
    def grow(self, data: st.DataObject, new_ids: list[int]) -> None:
        row = data.draw(st.sampled_from(self.rows))
        num_tokens = len(row.token_ids) + len(new_ids)
        before, held = self._state(), list(row.table.block_ids)
        num_needed = -(-num_tokens // self.block_size) - len(held)
        given = self.manager.allocate(row.table, num_tokens)
        assert (given is not None) == (num_needed <= before[0])
        if given is None:
            assert self._state() == before
            assert row.table.block_ids == held
            return
        assert row.table.block_ids == [*held, *given]
        row.table.block_ids, whole = held, row.table.block_ids
        self._overwrite(given)
        row.table.block_ids = whole
        row.token_ids.extend(new_ids)

    @precondition(lambda self: any(self._pinnable()))
    @rule(data=st.data(), pin_s=st.floats(0.5, 9.0))
    def pin(self, data: st.DataObject, pin_s: float) -> None:
        row = data.draw(st.sampled_from(self._pinnable()))
        # What is pinned is what is cached: a reset or broken logits may have taken some of it.
        table, asked = self.manager.new_table(row.salt), array("i", [*row.prompt, 9])
        num_cached = len(self.manager.match_prefix(table, asked).block_ids)
        assert row.pin_names is not None
        self.manager.pin(row.pin_names, self.now + pin_s)
        for name in self._names(row.salt, row.prompt)[:num_cached]:
            self.pins[name] = max(self.pins.get(name, 0), math.ceil(self.now + pin_s))

    @rule(seconds=st.floats(0.1, 4.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.manager.end_pins(self.now)
        self.pins = {name: end for name, end in self.pins.items() if end > self.now}

    @rule()
    def drop_pins(self) -> None:
        assert self.manager.drop_pins() == bool(self.pins)
        first = min(self.pins.values(), default=0)
        self.pins = {name: end for name, end in self.pins.items() if end > first}

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), is_broken=st.booleans())
    def end(self, data: st.DataObject, is_broken: bool) -> None:
        row = data.draw(st.sampled_from(self.rows))
        if is_broken:
            self.manager.forget(row.table)
            for name in self._names(row.salt, row.token_ids):
                if not self._is_cached(name):
                    self.pins.pop(name, None)
        self.manager.free(row.table)
        assert row.table.block_ids == []
        if row.pin_names is not None:
            self.manager.cancel_pin(row.pin_names)
        self.rows.remove(row)

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()
        assert self.manager.num_cached_idle_blocks == self.manager.num_pinned_blocks == 0
        self.num_resets += 1
        self.pins.clear()

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check_invariants(row.table for row in self.rows)

    @invariant()
    def what_is_pinned_is_cached(self) -> None:
        if hasattr(self, "manager"):
            assert self.manager.num_pinned_blocks == len(self.pins) <= self.max_pinned
            assert all(map(self._is_cached, self.pins))

    def teardown(self) -> None:
        for row in self.rows:
            self.manager.free(row.table)
            if row.pin_names is not None:
                self.manager.cancel_pin(row.pin_names)
        if hasattr(self, "manager"):
            self.manager.check_invariants([])
            num_free = self.manager.num_free_blocks
            assert num_free + len(self.pins) == self.manager.num_blocks
            self.manager.end_pins(self.now + 10)
            self.manager.check_invariants([])
            assert self.manager.num_free_blocks == self.manager.num_blocks

    def _compute(self, row: Row, num_computed: int, is_committed: bool) -> None:
        row.num_computed = num_computed
        names = self._names(row.salt, row.token_ids[:num_computed])
        for block_id, name in zip(row.table.block_ids, names, strict=False):
            _, held = self.content.setdefault(block_id, (row.table.generation, name))
            assert held == name, "two sequences write different tokens into one block"
        if is_committed:
            self.manager.commit(row.table, row.token_ids, num_computed)
            row.num_committed = num_computed

    def _names(self, salt: str, token_ids: Sequence[int]) -> list[Name]:
        ends = range(self.block_size, len(token_ids) + 1, self.block_size)
        return [(salt, tuple(token_ids[:end])) for end in ends]

    def _reserve(self, row: Row) -> None:
        others = [other for other in self.rows if other.pin_names is not None]
        names = {name for one in (*others, row) for name in self._names(one.salt, one.prompt)}
        has_room = len(names.union(self.pins)) <= self.max_pinned
        row.pin_names = self.manager.reserve_pin(row.table, row.prompt)
        assert (row.pin_names is not None) == has_room

    def _pinnable(self) -> list[Row]:
        """Rows as they are when their first token is sampled."""
        return [
            row
            for row in self.rows
            if row.pin_names is not None and row.num_committed >= len(row.prompt)
        ]

    def _is_cached(self, name: Name) -> bool:
        """The block itself: those before it may have been forgotten with another table."""
        salt, token_ids = name
        table = self.manager.new_table(salt)
        self.manager.match_prefix(table, array("i", [*token_ids, 9]))
        return bool(table.hashes) and table.hashes[-1] in self.manager._block_of

    def _is_referenced(self, block_id: int) -> bool:
        return any(block_id in row.table.block_ids for row in self.rows)

    def _overwrite(self, block_ids: tuple[int, ...]) -> None:
        for block_id in block_ids:
            assert not self._is_referenced(block_id), "a block in use was given away"
            self.content.pop(block_id, None)

    def _state(self) -> tuple[int, int, int, int]:
        manager = self.manager
        return (
            manager.num_free_blocks,
            manager.num_cached_idle_blocks,
            manager.num_queried_tokens,
            manager.num_hit_tokens,
        )


def run_histories(max_examples: int, num_rules: int) -> None:
    run_state_machine_as_test(
        ManagerHistories,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_rules,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_histories_keep_every_promise() -> None:
    run_histories(max_examples=400, num_rules=40)


@pytest.mark.slow
def test_many_long_random_histories_keep_every_promise() -> None:
    run_histories(max_examples=4000, num_rules=80)

"""Random histories of tables, beside a model that knows what each block holds."""

from __future__ import annotations

from array import array

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
    st.integers(0, 20),
    st.lists(st.integers(1, 2), min_size=1, max_size=8),
)


class Row:
    """One sequence: its tokens, how many are computed, and its table."""

    def __init__(self, token_ids: list[int], num_computed: int, table: BlockTable) -> None:
        self.token_ids = array("i", token_ids)
        self.num_computed = num_computed
        self.table = table


class ManagerHistories(RuleBasedStateMachine):
    """`content` says which prefix was last written into each block."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.content: dict[int, list[int]] = {}

    @initialize(
        num_blocks=st.integers(1, 16), block_size=st.integers(1, 5), use_prefix_cache=st.booleans()
    )
    def start(self, num_blocks: int, block_size: int, use_prefix_cache: bool) -> None:
        self.manager = KVCacheManager(num_blocks, block_size, use_prefix_cache)
        self.block_size = block_size

    @rule(token_ids=TOKENS, num_reserved=st.integers(0, 2))
    def admit(self, token_ids: list[int], num_reserved: int) -> None:
        table = self.manager.new_table()
        prefix = self.manager.match_prefix(table, array("i", token_ids))
        assert prefix.num_tokens < len(token_ids)
        assert prefix.num_tokens == len(prefix.block_ids) * self.block_size
        for i, block_id in enumerate(prefix.block_ids):
            assert self.content[block_id] == token_ids[: (i + 1) * self.block_size]
        num_idle = sum(not self._is_referenced(block_id) for block_id in prefix.block_ids)
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
        self.rows.append(Row(token_ids, prefix.num_tokens, table))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), is_committed=st.booleans())
    def compute(self, data: st.DataObject, is_committed: bool) -> None:
        row = data.draw(st.sampled_from(self.rows))
        row.num_computed = data.draw(st.integers(row.num_computed, len(row.token_ids)))
        for i in range(row.num_computed // self.block_size):
            written = row.token_ids[: (i + 1) * self.block_size].tolist()
            held = self.content.setdefault(row.table.block_ids[i], written)
            assert held == written, "two sequences write different tokens into one block"
        if is_committed:
            self.manager.commit(row.table, row.token_ids, row.num_computed)

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

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), is_broken=st.booleans())
    def end(self, data: st.DataObject, is_broken: bool) -> None:
        row = data.draw(st.sampled_from(self.rows))
        if is_broken:
            self.manager.forget(row.table)
        self.manager.free(row.table)
        assert row.table.block_ids == []
        self.rows.remove(row)

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()
        assert self.manager.num_cached_idle_blocks == 0

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check_invariants(row.table for row in self.rows)

    def teardown(self) -> None:
        for row in self.rows:
            self.manager.free(row.table)
        if hasattr(self, "manager"):
            self.manager.check_invariants([])
            assert self.manager.num_free_blocks == self.manager.num_blocks

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

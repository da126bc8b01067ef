"""RowTable against an obvious model of it, over random histories."""

from __future__ import annotations

import random

import numpy as np
import pytest

from octavo.runner.batch import RowTable, SampledRows
from octavo.types import NewSequence, SamplingParams, ScheduledSequence, SchedulerOutput

BLOCK = 8
NUM_ROWS = 6
MAX_LEN = 64


def new_sequence(row: int, token_ids: list[int]) -> NewSequence:
    return NewSequence(
        row=row,
        index=0,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(),
    )


class ObviousRows:
    """What RowTable should hold, as lists."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}

    def check(self, table: RowTable, plan: SchedulerOutput) -> SampledRows:
        """Compare `build` with the lists, and return what it says is sampled."""
        for item in plan.scheduled:
            self.blocks[item.row] += item.new_block_ids
        batch, sampled = table.build(plan)
        tokens, positions, slots, starts, lens, wanted, rows = [], [], [], [0], [], [], []
        for item in plan.scheduled:
            end = item.num_computed_tokens + item.num_new_tokens
            for position in range(item.num_computed_tokens, end):
                tokens.append(self.tokens[item.row][position])
                positions.append(position)
                slots.append(self.blocks[item.row][position // BLOCK] * BLOCK + position % BLOCK)
            starts.append(len(tokens))
            lens.append(end)
            if item.is_sampling:
                wanted.append(len(tokens) - 1)
                rows.append(item.row)
        assert batch.token_ids.tolist() == tokens
        assert batch.positions.tolist() == [positions]
        assert batch.slot_mapping[0].tolist() == slots
        assert batch.query_start_loc.tolist() == starts
        assert batch.seq_lens.tolist() == lens
        assert batch.logits_rows.tolist() == wanted
        assert sampled.rows.tolist() == rows
        for item, block_table in zip(plan.scheduled, batch.block_tables[0].tolist(), strict=True):
            end = item.num_computed_tokens + item.num_new_tokens
            used = -(-end // BLOCK)
            assert block_table[:used] == self.blocks[item.row][:used]
            assert not any(block_table[len(self.blocks[item.row]) :])
        for array in (
            batch.token_ids, batch.positions, batch.query_start_loc, batch.seq_lens,
            batch.block_tables[0], batch.slot_mapping[0], batch.logits_rows, sampled.positions,
        ):  # fmt: skip
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        return sampled


@pytest.mark.parametrize("seed", range(30))
def test_build_equals_lists(seed: int) -> None:
    dice = random.Random(seed)
    table = RowTable(NUM_ROWS, MAX_LEN, BLOCK)
    obvious = ObviousRows()
    for _ in range(40):
        finished = [r for r in obvious.tokens if dice.random() < 0.1]
        for row in finished:
            del obvious.tokens[row], obvious.blocks[row]
        new = []
        for row in range(NUM_ROWS):
            if row not in obvious.tokens and dice.random() < 0.4:
                ids = [dice.randrange(1000) for _ in range(dice.randint(1, 30))]
                cached = dice.randrange(len(ids)) // BLOCK * BLOCK
                new.append(new_sequence(row, ids))
                obvious.tokens[row], obvious.blocks[row] = list(ids), []
                obvious.computed[row] = cached
        scheduled = []
        rows = [r for r in obvious.tokens if len(obvious.tokens[r]) < MAX_LEN]
        dice.shuffle(rows)
        for row in rows[: dice.randint(0, NUM_ROWS)]:
            known, computed = len(obvious.tokens[row]), obvious.computed[row]
            num_new = dice.randint(1, known - computed)
            needed = -(-(computed + num_new) // BLOCK) - len(obvious.blocks[row])
            blocks = tuple(dice.randrange(1, 500) for _ in range(needed))
            is_sampling = computed + num_new == known
            scheduled.append(ScheduledSequence(row, computed, num_new, blocks, is_sampling))
            obvious.computed[row] = computed + num_new
        plan = SchedulerOutput(
            finished_rows=tuple(finished), new_sequences=tuple(new), scheduled=tuple(scheduled)
        )
        for sequence in new:
            table.insert(sequence)
        if not scheduled:
            continue
        sampled = obvious.check(table, plan)
        new_ids = np.array([dice.randrange(1000) for _ in sampled.rows], np.int32)
        table.append_tokens(sampled, new_ids)
        for row, token_id in zip(sampled.rows.tolist(), new_ids.tolist(), strict=True):
            obvious.tokens[row].append(token_id)


def test_a_sequence_may_fill_its_last_position() -> None:
    table = RowTable(1, BLOCK, BLOCK)
    table.insert(new_sequence(0, list(range(BLOCK))))
    plan = SchedulerOutput(scheduled=(ScheduledSequence(0, 0, BLOCK, (3,), True),))
    batch, sampled = table.build(plan)
    table.append_tokens(sampled, np.array([9], np.int32))
    assert batch.seq_lens.tolist() == [BLOCK]
    assert sampled.positions.tolist() == [BLOCK]

"""SamplerTable: parameters, histories and bans of rows as arrays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from octavo.graph.batch import SamplingRows
from octavo.runner.batch import SampledRows
from octavo.runner.sampler import SamplerTable
from octavo.types import NewSequence, SamplingParams

EOS = 7


def insert(
    table: SamplerTable,
    row: int,
    params: SamplingParams,
    prompt: list[int],
    output: list[int] | None = None,
    index: int = 0,
) -> None:
    table.insert(
        NewSequence(
            row=row,
            index=index,
            token_ids=prompt + (output or []),
            num_prompt_tokens=len(prompt),
            params=params,
        )
    )


def at(rows: list[int], positions: list[int]) -> SampledRows:
    return SampledRows(np.array(rows, np.intp), np.array(positions, np.int32))


def seen_of(rows: SamplingRows, place: int) -> dict[int, int]:
    penalties = rows.penalties
    part = slice(penalties.start[place], penalties.start[place + 1])
    ids = penalties.token_ids[part].tolist()
    assert len(ids) == len(set(ids))
    return dict(zip(ids, penalties.counts[part].tolist(), strict=True))


def bias_of(rows: SamplingRows, place: int) -> dict[int, float]:
    bias = rows.bias
    part = slice(bias.start[place], bias.start[place + 1])
    return dict(zip(bias.token_ids[part].tolist(), bias.values[part].tolist(), strict=True))


def test_numbers_of_each_row() -> None:
    table = SamplerTable(4, [EOS])
    first = SamplingParams(
        temperature=0.5, top_k=-1, top_p=0.9, min_p=0.25, seed=2**64 - 1, logprobs=3
    )
    insert(table, 2, first, [1], index=5)
    insert(table, 0, SamplingParams(temperature=0, top_k=40, seed=-1), [1, 2])
    rows = table.build(at([2, 0], [1, 2]))
    assert rows.filters.temperature.tolist() == [0.5, 0]
    assert rows.filters.top_k.tolist() == [0, 40]
    assert rows.filters.top_p.tolist() == [np.float32(0.9), 1]
    assert rows.filters.min_p.tolist() == [0.25, 0]
    assert rows.noise.seed.tolist() == [2**64 - 1, 2**64 - 1]
    assert rows.noise.index.tolist() == [5, 0]
    assert rows.noise.position.tolist() == [1, 2]
    assert rows.num_logprobs.tolist() == [3, -1]
    assert rows.penalties.start.tolist() == rows.bias.start.tolist() == [0, 0, 0]
    assert rows.num_logprobs.flags.c_contiguous
    for part in (rows.filters, rows.noise, rows.penalties, rows.bias):
        for name in part.__slots__:
            assert getattr(part, name).flags.c_contiguous, name


def test_a_temperature_that_float32_cannot_divide_by_is_greedy() -> None:
    table = SamplerTable(1, [])
    insert(table, 0, SamplingParams(temperature=1e-30), [1])
    assert table.build(at([0], [1])).filters.temperature.tolist() == [0]


def test_penalties_count_output_and_know_the_prompt() -> None:
    table = SamplerTable(2, [])
    prompt = [5, 5, 6]
    insert(table, 0, SamplingParams(repetition_penalty=1.5), prompt)
    insert(table, 1, SamplingParams(presence_penalty=1.0), prompt)
    output: list[int] = []
    for step, token_id in enumerate([6, 9, 9, 300, *range(1000, 1100)]):
        sampled = at([0, 1], [3 + step, 3 + step])
        rows = table.build(sampled)
        counts = Counter(output)
        assert seen_of(rows, 0) == {5: 0, 6: 0} | counts
        assert seen_of(rows, 1) == counts
        table.append_tokens(sampled, np.array([token_id, token_id], np.int32))
        output.append(token_id)


def test_a_preempted_row_comes_back_with_the_same_history() -> None:
    params = SamplingParams(
        repetition_penalty=1.1, frequency_penalty=0.5, min_tokens=4, logit_bias={3: 1.5}
    )
    table = SamplerTable(2, [EOS])
    insert(table, 0, params, [1, 2, 1])
    for position, token_id in ((3, 2), (4, 8)):
        table.append_tokens(at([0], [position]), np.array([token_id], np.int32))
    table.remove(0)
    insert(table, 1, params, [1, 2, 1], [2, 8])
    fresh = table.build(at([1], [5]))
    assert seen_of(fresh, 0) == {1: 0, 2: 1, 8: 1}
    assert bias_of(fresh, 0) == {3: 1.5, EOS: -np.inf}


@pytest.mark.parametrize("num_output", [0, 1, 2, 3])
def test_nothing_ends_before_min_tokens(num_output: int) -> None:
    table = SamplerTable(1, [EOS])
    params = SamplingParams(min_tokens=2, stop_token_ids=(4,), logit_bias={4: 2.0, 5: -1.0})
    insert(table, 0, params, [1, 2, 3])
    bias = bias_of(table.build(at([0], [3 + num_output])), 0)
    if num_output < 2:
        assert bias == {4: -np.inf, 5: -1, EOS: -np.inf}
    else:
        assert bias == {4: 2, 5: -1}


def test_rows_with_and_without_history_mix() -> None:
    table = SamplerTable(3, [EOS])
    insert(table, 0, SamplingParams(), [1])
    insert(table, 1, SamplingParams(logit_bias={2: 1.0}, frequency_penalty=1.0), [1], [4, 4])
    insert(table, 2, SamplingParams(logit_bias={3: -1.0}), [1])
    rows = table.build(at([0, 1, 2], [1, 3, 1]))
    assert [bias_of(rows, s) for s in range(3)] == [{}, {2: 1}, {3: -1}]
    assert [seen_of(rows, s) for s in range(3)] == [{}, {4: 2}, {}]
    table.remove(1)
    insert(table, 1, SamplingParams(), [1])  # the row is used again, by one without a history
    assert bias_of(table.build(at([1], [1])), 0) == {}


def test_the_same_rows_again_are_sampled_as_a_new_table_would() -> None:
    """What is kept between steps follows positions, newcomers and histories."""
    greedy, warm = SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, seed=3)
    kept = SamplerTable(4, [EOS])

    def check(inserted: dict[int, SamplingParams], rows: list[int], positions: list[int]) -> None:
        fresh = SamplerTable(4, [EOS])
        for row, params in inserted.items():
            insert(fresh, row, params, [1, 2])
        ours, theirs = (table.build(at(rows, positions)) for table in (kept, fresh))
        np.testing.assert_array_equal(ours.noise.position, positions)
        for group in ("filters", "noise", "penalties", "bias"):
            parts = getattr(ours, group), getattr(theirs, group)
            for name in parts[0].__dataclass_fields__:
                first, second = (getattr(part, name) for part in parts)
                np.testing.assert_array_equal(first, second, err_msg=f"{group}.{name}")
        np.testing.assert_array_equal(ours.num_logprobs, theirs.num_logprobs)

    now = {0: greedy, 2: warm}
    for row, params in now.items():
        insert(kept, row, params, [1, 2])
    check(now, [0, 2], [2, 2])
    check(now, [0, 2], [3, 9])
    check(now, [2, 0], [4, 10])
    check(now, [2], [5])
    kept.remove(2)
    now = {0: greedy, 2: SamplingParams(temperature=1.5, top_k=4, logprobs=2)}
    insert(kept, 2, now[2], [1, 2])
    check(now, [2], [2])
    check(now, [0, 2], [6, 3])
    now = {0: SamplingParams(repetition_penalty=1.5, logit_bias={4: 2.0}), 2: now[2]}
    insert(kept, 0, now[0], [1, 2])
    check(now, [0, 2], [6, 3])
    kept.append_tokens(at([0], [6]), np.array([9], np.int32))
    assert seen_of(kept.build(at([0, 2], [7, 4])), 0) == {1: 0, 2: 0, 9: 1}

"""How the sequences of one request branch, where the random histories seldom come."""

from __future__ import annotations

from array import array
from typing import Any

from octavo.kv_cache.manager import KVCacheManager
from octavo.scheduler.beams import Continuation
from octavo.scheduler.groups import Groups
from octavo.scheduler.request import Request, Sequence, Status
from octavo.scheduler.rows import Rows
from octavo.types import SamplingParams


def test_a_beam_that_finds_no_row_is_not_taken_for_what_it_was_before() -> None:
    cache, rows = KVCacheManager(num_blocks=16, block_size=2), Rows(1)
    waiting: list[Sequence] = []
    groups = Groups(cache, rows, waiting.append)
    params = SamplingParams(use_beam_search=True, best_of=2, temperature=0)
    request = Request("a", params, 2, frozenset(), frozenset())

    def run(seq: Sequence) -> None:
        seq.status = Status.RUNNING
        rows.insert(seq)
        prefix = cache.match_prefix(seq.table, seq.token_ids)
        assert cache.allocate(seq.table, len(seq.token_ids), prefix) is not None
        cache.commit(seq.table, seq.token_ids, len(seq.token_ids))

    other, parent = (
        Sequence(request, index, (0, 0, index), array("i", ids), 20, cache.new_table())
        for index, ids in enumerate(([1, 2, 7, 7], [1, 2, 3, 4]))
    )
    request.sequences = [other, parent]
    run(other)
    groups.retire(other)
    run(parent)
    request.live = [parent]
    groups.branch(request, [Continuation(0.0, 0, token_id, ()) for token_id in (5, 6)])
    assert waiting == [other]
    assert other.token_ids.tolist() == [1, 2, 3, 4, 6]
    found = cache.match_prefix(other.table, other.token_ids)
    assert found.block_ids == tuple(parent.table.block_ids)


def test_when_the_last_group_that_runs_must_go_others_come(make_world: Any) -> None:
    """In the same step: a plan of nothing would look as if there were nothing to do."""
    world = make_world(
        num_blocks=10, max_model_len=8, block_size=1, max_num_seqs=3, max_num_batched_tokens=6,
        use_prefix_cache=False,
    )  # fmt: skip
    for _ in range(2):
        world.add([1], max_tokens=4)
    world.add(
        [2, 2, 2, 2], best_of=2, use_beam_search=True, temperature=0, early_stopping=True,
        max_tokens=3,
    )  # fmt: skip
    world.drain()  # Asserts that each plan has something to compute.

"""The rows that the runner remembers between steps, and how a step's Batch is built from them.

Every array is allocated once for all rows (untouched pages cost nothing); a step is a handful of
numpy calls, whatever the mixture of prefill and decode. Knows no request, policy or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.graph.batch import Batch, Int32
from octavo.types import BlockCopy, Fork, NewSequence, ScheduledSequence, SchedulerOutput


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Which rows of a Batch are sampled, in the order of its logits_rows.

    Attributes:
        rows: [S], the runner's row.
        positions: [S] int32, of the token to be sampled.
    """

    rows: NDArray[np.intp]
    positions: Int32


class RowTable:
    """Token ids and block table of every row.

    A row is in use from its NewSequence until it stands in finished_rows; its number is below
    `num_rows`.
    """

    def __init__(
        self, num_rows: int, max_model_len: int, block_size: int, *, looks_ahead: bool = False
    ) -> None:
        """Allocate for `num_rows` sequences of at most `max_model_len` tokens.

        Args:
            num_rows: rows.
            max_model_len: the most tokens of a row.
            block_size: tokens a block.
            looks_ahead: a step may be built before the tokens of the one before it are known; they
                are then named by their place (see Batch.token_ids).
        """
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        # One column more than a sequence can have: the token sampled last is kept even when it ends
        # the sequence.
        self.token_ids: Int32 = np.zeros((num_rows, max_model_len + 1), np.int32)
        self._block_tables: Int32 = np.zeros((num_rows, max_blocks), np.int32)
        self._num_blocks = [0] * num_rows
        self._counting: Int32 = np.arange(num_rows + 1, dtype=np.int32)
        self._counting.flags.writeable = False

        # Of each row, the position of the token that the last step samples, and its place in it.
        self._sampled_at: Int32 = np.full(num_rows, -1, np.int32)
        self._sampled_as: Int32 = np.zeros(num_rows, np.int32)
        self._looks_ahead = looks_ahead

    def insert(self, sequence: NewSequence) -> None:
        """Take in a sequence with all of its tokens; its block table is empty."""
        row = sequence.row
        self.token_ids[row, : len(sequence.token_ids)] = sequence.token_ids
        self._block_tables[row, : self._num_blocks[row]] = 0
        self._num_blocks[row] = 0
        self._sampled_at[row] = -1

    def fork(self, forks: Sequence[Fork]) -> None:
        """Let rows go on from other rows, each as it was before, with another last token."""
        rows = [fork.row for fork in forks]
        parents = [fork.parent_row for fork in forks]
        positions = [fork.position for fork in forks]
        moved = [(row, parent) for row, parent in zip(rows, parents, strict=True) if row != parent]
        if moved:
            to, of = np.array(moved, np.intp).T
            num_tokens = max(positions)
            self.token_ids[to, :num_tokens] = self.token_ids[of, :num_tokens]
            self._block_tables[to] = self._block_tables[of]
            counts = [self._num_blocks[parent] for _, parent in moved]
            for (row, _), count in zip(moved, counts, strict=True):
                self._num_blocks[row] = count
        self.token_ids[rows, positions] = [fork.token_id for fork in forks]

    def replace_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Put the destination of each copy into the block table of its row."""
        for copy in copies:
            self._block_tables[copy.row, copy.index] = copy.destination

    def append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        """Append to the block table of a row."""
        start = self._num_blocks[row]
        end = start + len(block_ids)
        self._block_tables[row, start:end] = block_ids
        self._num_blocks[row] = end

    def append_tokens(self, sampled: SampledRows, token_ids: Int32) -> None:
        """Write each sampled token behind the tokens of its row."""
        self.token_ids[sampled.rows, sampled.positions] = token_ids
        if self._looks_ahead:
            known = self._sampled_at[sampled.rows] == sampled.positions
            self._sampled_at[sampled.rows[known]] = -1

    def build(self, plan: SchedulerOutput) -> tuple[Batch, SampledRows]:
        """Append the plan's new blocks; return the step's arrays and which rows are sampled."""
        batch, sampled = self._build(plan.scheduled)
        if self._looks_ahead:
            self._sampled_at[sampled.rows] = sampled.positions
            self._sampled_as[sampled.rows] = self._counting[: len(sampled.rows)]
        return batch, sampled

    def _build(self, scheduled: Sequence[ScheduledSequence]) -> tuple[Batch, SampledRows]:
        for item in scheduled:
            if item.new_block_ids:
                self.append_blocks(item.row, item.new_block_ids)
        if all(item.num_new_tokens == 1 and item.is_sampling for item in scheduled):
            return self._build_decodes(scheduled)
        rows, computed, new, is_sampling = _columns(scheduled)
        start = np.zeros(len(scheduled) + 1, np.int32)
        np.cumsum(new, out=start[1:])
        sampling = np.flatnonzero(is_sampling)
        sampled = SampledRows(rows[sampling], (computed + new)[sampling])
        # A row without new tokens has the last logits of the one before it.
        logits_rows = start[1:][sampling] - np.int32(1)
        if not new.all():
            has_tokens = new > 0
            rows, computed, new = rows[has_tokens], computed[has_tokens], new[has_tokens]
            start = np.concatenate((start[:1], start[1:][has_tokens]))
        token_rows = np.repeat(rows, new)
        positions = np.arange(int(start[-1]), dtype=np.int32)
        positions += np.repeat(computed - start[:-1], new)
        slots = self._slots(token_rows, positions)
        seq_lens = computed + new
        num_blocks = -(-int(seq_lens.max()) // self.block_size)
        batch = Batch(
            token_ids=self._ids(token_rows, positions),
            positions=positions[None, :],
            query_start_loc=start,
            seq_lens=seq_lens,
            block_tables=(self._block_tables[rows, :num_blocks],),
            slot_mapping=(slots,),
            logits_rows=logits_rows,
        )
        return batch, sampled

    def _build_decodes(self, scheduled: Sequence[ScheduledSequence]) -> tuple[Batch, SampledRows]:
        """`build` where each row adds one token and samples: the same arrays, in fewer calls.

        After a step's weights have gone through the caches, each numpy call costs microseconds.
        """
        count = len(scheduled)
        rows = np.array([item.row for item in scheduled], np.intp)
        computed = [item.num_computed_tokens for item in scheduled]
        positions = np.array(computed, np.int32)
        seq_lens = positions + np.int32(1)
        num_blocks = max(computed) // self.block_size + 1
        batch = Batch(
            token_ids=self._ids(rows, positions),
            positions=positions[None, :],
            query_start_loc=self._counting[: count + 1],
            seq_lens=seq_lens,
            block_tables=(self._block_tables[rows, :num_blocks],),
            slot_mapping=(self._slots(rows, positions),),
            logits_rows=self._counting[:count],
        )
        return batch, SampledRows(rows, seq_lens)

    def _ids(self, rows: NDArray[np.intp], positions: Int32) -> Int32:
        """The tokens of these rows at these positions, or the places of those not known yet."""
        ids: Int32 = self.token_ids[rows, positions]
        if self._looks_ahead:
            is_unknown = self._sampled_at[rows] == positions
            ids[is_unknown] = ~self._sampled_as[rows[is_unknown]]
        return ids

    def _slots(self, rows: NDArray[np.intp], positions: Int32) -> Int32:
        """The slot of the KV cache of each token."""
        block, offset = np.divmod(positions, np.int32(self.block_size))
        slots = self._block_tables[rows, block]
        slots *= self.block_size
        slots += offset
        return slots


def _columns(
    scheduled: Sequence[ScheduledSequence],
) -> tuple[NDArray[np.intp], Int32, Int32, NDArray[np.bool_]]:
    table = np.array(
        [(s.row, s.num_computed_tokens, s.num_new_tokens, s.is_sampling) for s in scheduled],
        np.int32,
    ).T.copy()
    return table[0].astype(np.intp), table[1], table[2], table[3].astype(np.bool_)

"""Decode steps as captured CUDA graphs: hundreds of launches become one.

A step in which every sequence has one token is padded to the next size of its number of sequences
and of its block tables. The first step of a size runs as it is, which loads its kernels; the second
is captured, without being computed, and replayed from then on. So a server starts without capturing
anything, and each size costs it the time of one step once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from octavo.backends.torch.arrays import Staging, put_step
from octavo.backends.torch.execute import GraphExecutor
from octavo.graph.batch import Batch

LEAST_TABLE_TOKENS = 1024
"""Block tables are padded to hold 1, 4, 16 ... times so many tokens."""


def padded_count(count: int) -> int:
    """The size that a number of sequences is padded to: powers of 2, then about an eighth more."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = max(8, 1 << (count.bit_length() - 3))
    return -(-count // step) * step


def padded_width(num_blocks: int, block_size: int) -> int:
    """The size that block tables are padded to."""
    width = max(1, LEAST_TABLE_TOKENS // block_size)
    while width < num_blocks:
        width *= 4
    return width


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token, all of them are sampled, and nothing else is read."""
    count = len(batch.seq_lens)
    return (
        len(batch.token_ids) == count
        and not batch.inputs
        and np.array_equal(batch.logits_rows, np.arange(count))
    )


def pad_decode(batch: Batch, block_size: int) -> Batch:
    """The step with rows that compute nothing (see kernels.StepArrays) up to the next size."""
    (table,), (slots,) = batch.block_tables, batch.slot_mapping
    more = padded_count(len(batch.seq_lens)) - len(batch.seq_lens)
    width = padded_width(table.shape[1], block_size)
    count = len(batch.seq_lens) + more
    counting = np.arange(count + 1, dtype=np.int32)
    return replace(
        batch,
        token_ids=np.pad(batch.token_ids, (0, more)),
        positions=np.pad(batch.positions, ((0, 0), (0, more))),
        query_start_loc=counting,
        seq_lens=np.pad(batch.seq_lens, (0, more)),
        block_tables=(np.pad(table, ((0, more), (0, width - table.shape[1]))),),
        slot_mapping=(np.pad(slots, (0, more), constant_values=-1),),
        logits_rows=counting[:-1],
    )


@dataclass(slots=True)
class _Size:
    """One size: where its arrays lie, and what was captured."""

    staging: Staging
    is_loaded: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class DecodeGraphs:
    """The captured steps of one Program."""

    def __init__(self, device: torch.device, executor: GraphExecutor, block_size: int) -> None:
        """Start without any."""
        self._device = device
        self._executor = executor
        self._block_size = block_size
        self._sizes: dict[tuple[int, int], _Size] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch, last_tokens: Tensor) -> Tensor:
        """The logits [B, vocab] of a decode step; valid until the next call.

        Args:
            batch: the step.
            last_tokens: what the step before has sampled, on the device.
        """
        padded = pad_decode(batch, self._block_size)
        shape = padded.block_tables[0].shape
        size = self._sizes.setdefault(shape, _Size(Staging(self._device)))
        step, ids, rows = put_step(size.staging, padded, last_tokens)
        # What is captured serves every step of this size.
        step = replace(step, max_seq_len=shape[1] * self._block_size)
        if size.graph is not None:
            size.graph.replay()
        elif size.is_loaded:
            size.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(size.graph, pool=self._pool):
                size.logits = self._executor.run(step, ids, rows, {}, {"logits"})["logits"]
            size.graph.replay()
        else:
            size.is_loaded = True
            size.logits = self._executor.run(step, ids, rows, {}, {"logits"})["logits"]
        return size.logits[: len(batch.seq_lens)]

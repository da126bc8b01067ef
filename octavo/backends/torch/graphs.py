"""Decode steps as captured CUDA graphs: hundreds of launches become one.

A step in which every sequence has one token is padded to the next size of its number of sequences
and of its block tables. The first step of a size runs as it is, which loads its kernels; the second
is captured, without being computed, and replayed from then on. So a server starts without capturing
anything, and each size costs it the time of one step once. Sizes share the memory of their steps
and one tensor of logits; where a device has little memory left, further sizes run as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.backends.torch.arrays import Staging, put_step
from octavo.backends.torch.execute import GraphExecutor
from octavo.backends.torch.kernels import StepArrays
from octavo.graph.batch import Batch, Int32

_log = logging.getLogger("octavo.torch")

LEAST_TABLE_TOKENS = 1024
"""Block tables are padded to hold 1, 2, 4 ... times so many tokens."""
LEAST_FREE_BYTES = 256 << 20
"""Of the device, to capture a size."""


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
        width *= 2
    return width


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token, all of them are sampled, and nothing else is read."""
    count = len(batch.seq_lens)
    return (
        len(batch.token_ids) == count
        and not batch.inputs
        and np.array_equal(batch.logits_rows, np.arange(count))
    )


def pad_decode(batch: Batch) -> Batch:
    """The step with rows that compute nothing (see kernels.StepArrays) up to the next count."""
    (table,), (slots,) = batch.block_tables, batch.slot_mapping
    count = padded_count(len(batch.seq_lens))
    counting = np.arange(count + 1, dtype=np.int32)
    return replace(
        batch,
        token_ids=_padded(batch.token_ids, (count,)),
        positions=_padded(batch.positions, (1, count)),
        query_start_loc=counting,
        seq_lens=_padded(batch.seq_lens, (count,)),
        block_tables=(_padded(table, (count, table.shape[1])),),
        slot_mapping=(_padded(slots, (count,), -1),),
        logits_rows=counting[:-1],
    )


def _padded(array: Int32, shape: tuple[int, ...], value: int = 0) -> Int32:
    padded = np.full(shape, value, np.int32)
    padded[tuple([slice(size) for size in array.shape])] = array
    return padded


@dataclass(slots=True)
class _Size:
    """One size: where its arrays lie, and what was captured."""

    staging: Staging
    is_loaded: bool = False
    graph: torch.cuda.CUDAGraph | None = None


class DecodeGraphs:
    """The captured steps of one Program."""

    def __init__(
        self, device: torch.device, executor: GraphExecutor, block_size: int, max_num_rows: int
    ) -> None:
        """Start without any."""
        self._device = device
        self._executor = executor
        self._block_size = block_size
        self._most_rows = padded_count(max_num_rows)
        self._sizes: dict[tuple[int, int], _Size] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._logits: Tensor | None = None
        self._is_full = False

    def run(self, batch: Batch, last_tokens: Tensor) -> Tensor:
        """The logits [B, vocab] of a decode step in float32; valid until the next call.

        Args:
            batch: the step.
            last_tokens: what the step before has sampled, on the device.
        """
        padded = pad_decode(batch)
        width = padded_width(batch.block_tables[0].shape[1], self._block_size)
        shape = (len(padded.seq_lens), width)
        size = self._sizes.get(shape)
        if size is None:
            size = self._sizes[shape] = _Size(Staging(self._device))
        arrays = put_step(size.staging, padded, last_tokens, width)
        if size.graph is None and size.is_loaded and self._has_room():
            size.graph = self._capture(arrays)
        if size.graph is None:
            self._compute(*arrays)
            size.is_loaded = True
        else:
            size.graph.replay()
        assert self._logits is not None
        return self._logits[: len(batch.seq_lens)]

    def _compute(self, step: StepArrays, ids: Tensor, rows: Tensor) -> None:
        """Compute a step into the logits that all sizes share."""
        # What is captured serves every step of this size.
        longest = step.block_tables.shape[1] * self._block_size
        step = replace(step, max_seq_len=longest, max_decode_len=longest)
        logits = self._executor.run(step, ids, rows, {}, {"logits"})["logits"]
        if self._logits is None:
            shape = (self._most_rows, logits.shape[1])
            self._logits = torch.empty(shape, dtype=torch.float32, device=self._device)
        self._logits[: len(logits)].copy_(logits)

    def _has_room(self) -> bool:
        if not self._is_full:
            free, _ = torch.cuda.mem_get_info(self._device)
            self._is_full = int(free) < LEAST_FREE_BYTES
            if self._is_full:
                _log.warning(
                    "%d MiB are free on the device: further sizes of steps are not captured and "
                    "run more slowly; a lower --memory helps", free >> 20,
                )  # fmt: skip
        return not self._is_full

    def _capture(self, arrays: tuple[StepArrays, Tensor, Tensor]) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None if memory ran out."""
        graph = torch.cuda.CUDAGraph()
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        # Not torch.cuda.graph, which gives back memory that is kept for the largest steps.
        with torch.cuda.stream(self._stream):
            # Other threads may go on with what they do on the device.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._compute(*arrays)
            except torch.OutOfMemoryError:
                self._is_full = True
            finally:
                graph.capture_end()
        computing.wait_stream(self._stream)
        return None if self._is_full else graph

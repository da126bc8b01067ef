"""The arrays of a step on their way to the device, in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.backends.torch.kernels import SampleArrays, StepArrays
from octavo.graph.batch import Batch, Int32, SamplingRows

_ALIGNMENT = 16
_MOST_LAYOUTS = 64
_ROOM = 1 << 16
"""Bytes that are there to begin with, and more than needed whenever memory grows."""
_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "uint64": torch.int64,
    "float32": torch.float32,
}

Array = NDArray[Any]
Shape = tuple[int, ...]
_Sizes = tuple[tuple[str, Shape], ...]
"""The dtype's name and the shape of each array."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where arrays of certain sizes lie.

    Attributes:
        hosts: views of the host's memory, for each of the two turns.
        there: views of the device's.
        pieces: for each turn the host's memory that holds all of them.
        piece: the device's.
    """

    hosts: tuple[list[Array], list[Array]]
    there: list[Tensor]
    pieces: tuple[Tensor, Tensor]
    piece: Tensor


class Staging:
    """Memory of the host that a device can read while it computes, and as much on the device.

    Arrays of the same sizes always come to lie at the same addresses of the device, as a captured
    graph needs it. The device takes one step after another, so what `put` returned serves the work
    that is begun before the next call. The host's memory is there twice: while the device has not
    yet copied what one step has put, the next one is put beside it.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with little; it grows."""
        self._device = device
        self._turn = 0
        self._make(_ROOM)

    def put(
        self, arrays: Sequence[Array], shapes: Sequence[Shape] | None = None
    ) -> Sequence[Tensor]:
        """The arrays on the device, uint64 as the same bits in int64.

        Args:
            arrays: of the DTYPES, each read once.
            shapes: of what is returned, if some are larger than the arrays; an array then lies at
                the beginning of each dimension, beside what was there before.
        """
        if shapes is None:
            shapes = [array.shape for array in arrays]
        sizes = tuple(zip([array.dtype.name for array in arrays], shapes, strict=True))
        layout = self._layouts.get(sizes)
        if layout is None:
            layout = self._lay_out(sizes)
        self._turn = 1 - self._turn
        for place, array in zip(layout.hosts[self._turn], arrays, strict=True):
            place[tuple([slice(size) for size in array.shape])] = array
        layout.piece.copy_(layout.pieces[self._turn], non_blocking=True)
        return layout.there

    def _lay_out(self, sizes: _Sizes) -> _Layout:
        dtypes = [_DTYPES[name] for name, _ in sizes]
        lengths = [
            math.prod(shape) * dtype.itemsize
            for (_, shape), dtype in zip(sizes, dtypes, strict=True)
        ]
        whole = [-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]
        end = sum(whole)
        if end > len(self._there):
            self._make(end + _ROOM)

        def views(memory: Tensor) -> list[Tensor]:
            pieces = memory[:end].split(whole)
            return [
                piece[:length].view(dtype).view(shape)
                for piece, length, dtype, (_, shape) in zip(
                    pieces, lengths, dtypes, sizes, strict=True
                )
            ]

        first, second = self._hosts
        layout = _Layout(
            ([view.numpy() for view in views(first)], [view.numpy() for view in views(second)]),
            views(self._there),
            (first[:end], second[:end]),
            self._there[:end],
        )
        if len(self._layouts) == _MOST_LAYOUTS:
            self._layouts.clear()
        self._layouts[sizes] = layout
        return layout

    def _make(self, num_bytes: int) -> None:
        # NOTE: what the device may still copy from is kept alive by torch until it has.
        is_there = self._device.type != "cpu"
        self._hosts = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_there) for _ in range(2)
        ]
        self._there = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        self._layouts: dict[_Sizes, _Layout] = {}


def put_step(
    staging: Staging, batch: Batch, last_tokens: Tensor, table_width: int = 0
) -> tuple[StepArrays, Tensor, Tensor]:
    """The step's arrays on the device, its token ids, and the rows whose logits are wanted.

    Args:
        staging: where they lie.
        batch: the step.
        last_tokens: what the step before has sampled, on the device.
        table_width: the least width of the block tables there; ids past the batch's are any.
    """
    num_sequences = len(batch.seq_lens)
    if batch.block_tables:
        table, slots = batch.block_tables[0], batch.slot_mapping[0]
    else:  # A graph without attention.
        table, slots = np.zeros((num_sequences, 1), np.int32), np.zeros_like(batch.token_ids)
    arrays = [
        batch.token_ids, batch.positions[0], slots, batch.query_start_loc, batch.seq_lens,
        table, batch.logits_rows,
    ]  # fmt: skip
    shapes = [array.shape for array in arrays]
    shapes[5] = (num_sequences, max(table_width, table.shape[1]))
    ids, positions, slots_there, starts, seq_lens, tables, rows = staging.put(arrays, shapes)
    if (batch.token_ids < 0).any():
        sampled = last_tokens[(-1 - ids).clamp_min(0)]
        # A row whose logits were broken has sampled -1; what follows it is thrown away.
        torch.where(ids < 0, sampled.clamp_min(0), ids, out=ids)
    counts = np.diff(batch.query_start_loc)
    step = StepArrays(
        positions=positions,
        slots=slots_there,
        starts=starts,
        seq_lens=seq_lens,
        block_tables=tables,
        max_query_len=int(counts.max(initial=0)),
        max_seq_len=int(batch.seq_lens.max(initial=0)),
        max_decode_len=int(batch.seq_lens.max(initial=0, where=counts == 1)),
    )
    return step, ids, rows


def put_rows(staging: Staging, rows: SamplingRows) -> SampleArrays:
    """How to sample, on the device."""
    filters, noise, penalties, bias = rows.filters, rows.noise, rows.penalties, rows.bias
    names_and_arrays: dict[str, Array] = {
        "temperature": filters.temperature,
        "top_k": filters.top_k,
        "top_p": filters.top_p,
        "min_p": filters.min_p,
        "seed": noise.seed,
        "index": noise.index,
        "position": noise.position,
        "repetition": penalties.repetition,
        "presence": penalties.presence,
        "frequency": penalties.frequency,
        "penalty_start": penalties.start,
        "penalty_ids": _roomy(penalties.token_ids),
        "penalty_counts": _roomy(penalties.counts),
        "bias_start": bias.start,
        "bias_ids": _roomy(bias.token_ids),
        "bias_values": _roomy(bias.values),
        "num_logprobs": rows.num_logprobs,
    }
    there = dict(zip(names_and_arrays, staging.put(list(names_and_arrays.values())), strict=True))
    is_random = filters.temperature > 0
    keeps_less = (filters.top_k > 0) | (filters.top_p < 1) | (filters.min_p > 0)
    return SampleArrays(
        **there,
        num_top=max(0, int(rows.num_logprobs.max(initial=0))),
        has_filters=bool((keeps_less & is_random).any()),
        has_noise=bool(is_random.any()),
        has_edits=bool(len(penalties.token_ids) or len(bias.token_ids)),
    )


def _roomy(entries: Array) -> Array:
    """Entries with others that no row owns: as they grow from step to step, sizes are few."""
    if not len(entries):
        return entries
    roomy = np.zeros(max(64, 1 << (len(entries) - 1).bit_length()), entries.dtype)
    roomy[: len(entries)] = entries
    return roomy


def put_ids(ids: Int32, device: torch.device) -> Tensor:
    """Ids of blocks, or pairs of them, on the device; the host does not wait for it."""
    values = torch.from_numpy(ids.copy())
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)

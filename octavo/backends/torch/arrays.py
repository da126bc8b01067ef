"""The arrays of a step on their way to the device, in one copy."""

from __future__ import annotations

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
_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "uint64": torch.int64,
    "float32": torch.float32,
}

Array = NDArray[Any]


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
        self._make(1 << 16)

    def put(self, arrays: Sequence[Array]) -> list[Tensor]:
        """The arrays on the device, uint64 as the same bits in int64."""
        sizes = tuple([(array.dtype.name, array.shape) for array in arrays])
        layout = self._layouts.get(sizes)
        if layout is None:
            layout = self._lay_out(arrays)
            if len(self._layouts) == _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[sizes] = layout
        self._turn = 1 - self._turn
        for place, array in zip(layout.hosts[self._turn], arrays, strict=True):
            place[...] = array
        layout.piece.copy_(layout.pieces[self._turn], non_blocking=True)
        return layout.there

    def _lay_out(self, arrays: Sequence[Array]) -> _Layout:
        places = []
        end = 0
        for array in arrays:
            places.append(end)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end > len(self._there):
            self._make(2 * end)

        def views(memory: Tensor) -> list[Tensor]:
            return [
                memory[place : place + array.nbytes]
                .view(_DTYPES[array.dtype.name])
                .view(array.shape)
                for array, place in zip(arrays, places, strict=True)
            ]

        first, second = self._hosts
        return _Layout(
            ([v.numpy() for v in views(first)], [v.numpy() for v in views(second)]),
            views(self._there),
            (first[:end], second[:end]),
            self._there[:end],
        )

    def _make(self, num_bytes: int) -> None:
        # NOTE: what the device may still copy from is kept alive by torch until it has.
        is_there = self._device.type != "cpu"
        self._hosts = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_there) for _ in range(2)
        ]
        self._there = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        self._layouts: dict[tuple[tuple[str, tuple[int, ...]], ...], _Layout] = {}


def put_step(
    staging: Staging, batch: Batch, last_tokens: Tensor
) -> tuple[StepArrays, Tensor, Tensor]:
    """The step's arrays on the device, its token ids, and the rows whose logits are wanted.

    Args:
        staging: where they lie.
        batch: the step.
        last_tokens: what the step before has sampled, on the device.
    """
    num_sequences = len(batch.seq_lens)
    if batch.block_tables:
        table, slots = batch.block_tables[0], batch.slot_mapping[0]
    else:  # A graph without attention.
        table, slots = np.zeros((num_sequences, 1), np.int32), np.zeros_like(batch.token_ids)
    arrays = [
        batch.token_ids, batch.positions[0], slots, batch.query_start_loc, batch.seq_lens,
        np.ascontiguousarray(table), batch.logits_rows,
    ]  # fmt: skip
    ids, positions, slots_there, starts, seq_lens, tables, rows = staging.put(arrays)
    if (batch.token_ids < 0).any():
        sampled = last_tokens[(-1 - ids).clamp_min(0)]
        # A row whose logits were broken has sampled -1; what follows it is thrown away.
        torch.where(ids < 0, sampled.clamp_min(0), ids, out=ids)
    step = StepArrays(
        positions=positions,
        slots=slots_there,
        starts=starts,
        seq_lens=seq_lens,
        block_tables=tables,
        max_query_len=int(np.diff(batch.query_start_loc).max(initial=0)),
        max_seq_len=int(batch.seq_lens.max(initial=0)),
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
        "penalty_ids": penalties.token_ids,
        "penalty_counts": penalties.counts,
        "bias_start": bias.start,
        "bias_ids": bias.token_ids,
        "bias_values": bias.values,
        "num_logprobs": rows.num_logprobs,
    }
    arrays = [np.ascontiguousarray(array) for array in names_and_arrays.values()]
    there = dict(zip(names_and_arrays, staging.put(arrays), strict=True))
    is_random = filters.temperature > 0
    keeps_less = (filters.top_k > 0) | (filters.top_p < 1) | (filters.min_p > 0)
    return SampleArrays(
        **there,
        num_top=max(0, int(rows.num_logprobs.max(initial=0))),
        has_filters=bool((keeps_less & is_random).any()),
        has_noise=bool(is_random.any()),
        has_edits=bool(len(penalties.token_ids) or len(bias.token_ids)),
    )


def put_ids(ids: Int32, device: torch.device) -> Tensor:
    """Ids of blocks, or pairs of them, on the device; the host does not wait for it."""
    values = torch.from_numpy(ids.copy())
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)

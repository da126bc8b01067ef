"""The arrays of a step on their way to the device, in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.backends.torch.kernels import SampleArrays, StepArrays
from octavo.graph.batch import Batch, Int32, SamplingRows

_ALIGNMENT = 16
_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "uint64": torch.int64,
    "float32": torch.float32,
}

Array = NDArray[Any]


class Staging:
    """Memory of the host that a device can read while it computes, and as much on the device.

    Arrays of the same sizes always come to lie at the same addresses, as a captured graph needs
    it. What `put` returned is valid until the next call; nothing may read it any longer then.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with little; it grows."""
        self._device = device
        self._grow(1 << 16)

    def put(self, arrays: Sequence[Array]) -> list[Tensor]:
        """The arrays on the device, uint64 as the same bits in int64."""
        places = []
        end = 0
        for array in arrays:
            places.append(end)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end > len(self._host):
            self._grow(2 * end)
        for array, place in zip(arrays, places, strict=True):
            self._bytes[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._there[:end].copy_(self._host[:end], non_blocking=True)
        return [
            self._there[place : place + array.nbytes]
            .view(_DTYPES[array.dtype.name])
            .view(array.shape)
            for array, place in zip(arrays, places, strict=True)
        ]

    def _grow(self, num_bytes: int) -> None:
        is_there = self._device.type != "cpu"
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_there)
        self._bytes: NDArray[np.uint8] = self._host.numpy()
        self._there = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)


def put_step(staging: Staging, batch: Batch) -> tuple[StepArrays, Tensor, Tensor]:
    """The step's arrays on the device, its token ids, and the rows whose logits are wanted."""
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


def put_pairs(pairs: Int32, device: torch.device) -> Tensor:
    """Pairs of block ids on the device, int64."""
    return torch.from_numpy(pairs.astype(np.int64)).to(device)

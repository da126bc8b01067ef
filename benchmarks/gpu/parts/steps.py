"""Batches and sampling rows, as the runner would build them."""

from __future__ import annotations

from typing import Any

import numpy as np

from octavo.graph.batch import Batch, Bias, Filters, Int32, Noise, Penalties, SamplingRows

_DEFAULTS: dict[str, tuple[float, type]] = {
    "temperature": (0.0, np.float32),
    "top_k": (0, np.int32),
    "top_p": (1.0, np.float32),
    "min_p": (0.0, np.float32),
    "seed": (0, np.uint64),
    "index": (0, np.int32),
    "position": (0, np.int32),
    "repetition": (1.0, np.float32),
    "presence": (0.0, np.float32),
    "frequency": (0.0, np.float32),
    "num_logprobs": (-1, np.int32),
}


def step_of(
    tables: Int32, starts: Int32, counts: Int32, token_ids: Int32, block_size: int
) -> Batch:
    """A step of counts[b] tokens of each sequence after its first starts[b]; each is sampled."""
    ends = np.cumsum(counts, dtype=np.int32)
    owner = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - counts - starts, counts)
    positions = positions.astype(np.int32)
    slots = tables[owner, positions // block_size] * block_size + positions % block_size
    return Batch(
        token_ids=token_ids,
        positions=positions[None],
        query_start_loc=np.concatenate([np.zeros(1, np.int32), ends]),
        seq_lens=(starts + counts).astype(np.int32),
        block_tables=(tables,),
        slot_mapping=(slots.astype(np.int32),),
        logits_rows=ends - 1,
    )


def decode_of(tables: Int32, lengths: Int32, token_ids: Int32, block_size: int) -> Batch:
    """A step of one token of each sequence, after the `lengths` that it has."""
    return step_of(tables, lengths, np.ones_like(lengths), token_ids, block_size)


def sampled_before(count: int) -> Int32:
    """The tokens that the step before samples, named by their places (see Batch.token_ids)."""
    return np.arange(-1, -count - 1, -1, dtype=np.int32)


def shuffled_tables(count: int, width: int, seed: int = 3) -> Int32:
    """Block tables of `count` sequences whose blocks are out of order; block 0 is nobody's."""
    order = np.random.default_rng(seed).permutation(count * width)
    return (order + 1).astype(np.int32).reshape(count, width)


def sampling_rows(count: int, **changes: Any) -> SamplingRows:
    """Greedy rows, but for the changes: one value for all rows or an array.

    `seen` and `bias` are a dict of token ids a row.
    """
    arrays: dict[str, Any] = {}
    for name, (default, kind) in _DEFAULTS.items():
        value = np.asarray(changes.pop(name, default), kind)
        arrays[name] = np.ascontiguousarray(np.broadcast_to(value, count))
    lists = {}
    for name, second, kind in (("seen", "counts", np.int32), ("bias", "values", np.float32)):
        given = changes.pop(name, [{}] * count)
        lists[name] = {
            "start": np.cumsum([0, *map(len, given)], dtype=np.int32),
            "token_ids": np.array([i for row in given for i in row], np.int32),
            second: np.array([v for row in given for v in row.values()], kind),
        }
    if changes:
        raise TypeError(f"unknown: {sorted(changes)}")
    return SamplingRows(
        filters=Filters(**{n: arrays[n] for n in ("temperature", "top_k", "top_p", "min_p")}),
        noise=Noise(**{n: arrays[n] for n in ("seed", "index", "position")}),
        penalties=Penalties(
            **{n: arrays[n] for n in ("repetition", "presence", "frequency")}, **lists["seen"]
        ),
        bias=Bias(**lists["bias"]),
        num_logprobs=arrays["num_logprobs"],
    )

"""SamplingRows as the flat arrays that the native program reads by name.

Knows nothing of what they mean: that is said in `graph/batch.py`.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from octavo.graph.batch import Float32, Int32, SamplingRows


class SamplingArrays(msgspec.Struct, frozen=True):
    """The arrays of Filters, Noise, Penalties (those of its tokens as seen_*) and Bias."""

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    seed: NDArray[np.uint64]
    index: Int32
    position: Int32
    repetition: Float32
    presence: Float32
    frequency: Float32
    seen_start: Int32
    seen_ids: Int32
    seen_counts: Int32
    bias_start: Int32
    bias_ids: Int32
    bias_values: Float32
    num_logprobs: Int32


def flat(rows: SamplingRows) -> SamplingArrays:
    """The same arrays without their nesting; by place, since this runs every step."""
    filters, noise, penalties, bias = rows.filters, rows.noise, rows.penalties, rows.bias
    return SamplingArrays(
        filters.temperature,
        filters.top_k,
        filters.top_p,
        filters.min_p,
        noise.seed,
        noise.index,
        noise.position,
        penalties.repetition,
        penalties.presence,
        penalties.frequency,
        penalties.start,
        penalties.token_ids,
        penalties.counts,
        bias.start,
        bias.token_ids,
        bias.values,
        rows.num_logprobs,
    )

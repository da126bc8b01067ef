"""How much of a GPU's memory the KV pool may take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from octavo.backends.torch.transfers import DEVICE_BYTES
from octavo.graph.batch import Bias, Filters, Noise, Penalties, SamplingRows

GRAPH_BYTES = 256 << 20
"""What captured graphs and the libraries' workspaces take later on."""
MARGIN = 0.02
"""Of the device's memory, for what the allocator cannot join together."""


def measure_spare_bytes(device: torch.device, run_largest: Callable[[], None]) -> int:
    """Bytes that are free beside the largest step, as its peak says and the device does now."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_largest()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = GRAPH_BYTES + DEVICE_BYTES + int(MARGIN * total)
    return max(0, int(free) - int(peak) - others)


def sampling_rows(count: int) -> SamplingRows:
    """Rows that need as much memory as rows can: filters, penalties and log probabilities."""
    ones, none = np.ones(count, np.float32), np.zeros(count, np.int32)
    start = np.zeros(count + 1, np.int32)
    return SamplingRows(
        filters=Filters(
            temperature=ones,
            top_k=none + np.int32(50),
            top_p=ones * np.float32(0.9),
            min_p=ones * 0,
        ),
        noise=Noise(seed=none.astype(np.uint64), index=none, position=none),
        penalties=Penalties(
            repetition=ones,
            presence=ones,
            frequency=ones,
            start=start,
            token_ids=none[:0],
            counts=none[:0],
        ),
        bias=Bias(start=start, token_ids=none[:0], values=ones[:0]),
        num_logprobs=none + np.int32(20),
    )

"""How much of a GPU's memory the KV pool may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.backends.program import CompileOptions
from octavo.backends.torch.transfers import DEVICE_BYTES
from octavo.graph.batch import Batch, Bias, Filters, Noise, Penalties, SamplingRows

GRAPH_BYTES = 512 << 20
"""What captured graphs and the libraries' workspaces take later on, all sizes together."""
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


def largest_steps(limits: CompileOptions) -> Iterator[tuple[Batch, SamplingRows]]:
    """Steps that take the most memory: of a prompt, of sequences with one token each, of both.

    One sequence of single tokens has a context as long as can be, for which memory is there as if
    all had; the others read little.
    """
    tokens, longest = min(limits.max_num_tokens, limits.max_model_len), limits.max_model_len
    ones = np.ones(limits.max_num_rows, np.intp)
    sizes = [(np.array([tokens]), tokens), (ones, longest)]
    if len(ones) < tokens:
        sizes.append((np.append(ones[1:], tokens - len(ones) + 1), longest))
    for counts, context in sizes:
        batch = empty_step(counts, context, limits)
        yield batch, sampling_rows(len(batch.logits_rows))


def steps_to_load(limits: CompileOptions) -> Iterator[tuple[Batch, SamplingRows]]:
    """Steps that kernels are compiled or loaded for, which would make requests wait.

    Products have tiles for 1 token, up to 16, 64, 256 and more, attention for up to 16 and 64 rows
    of a kv head, and more.
    """
    for number, tokens in enumerate((1, 2, 8, 17, 65, 257)):
        if tokens <= min(limits.max_num_tokens, limits.max_model_len):
            batch = empty_step(np.array([tokens]), tokens, limits)
            is_filtered, wanted = number % 2 == 1, 20 if number // 2 % 2 else -1
            rows = len(batch.logits_rows)
            yield batch, sampling_rows(rows, filtered=is_filtered, num_logprobs=wanted)


def empty_step(counts: NDArray[np.intp], context: int, limits: CompileOptions) -> Batch:
    """A step of sequences that write nothing, with as many sampled rows as there may be.

    Args:
        counts: tokens of each sequence.
        context: tokens of the first sequence, these included, all in block 0; others are new.
        limits: the sizes that the Program is made for.
    """
    num_tokens = int(counts.sum())
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    seq_lens = counts.astype(np.int32)
    seq_lens[0] = context
    offsets = np.repeat(seq_lens - counts - starts[:-1], counts)
    width = -(-context // limits.block_size)
    return Batch(
        token_ids=np.zeros(num_tokens, np.int32),
        positions=(offsets + np.arange(num_tokens)).astype(np.int32)[None],
        query_start_loc=starts,
        seq_lens=seq_lens,
        block_tables=(np.zeros((len(counts), width), np.int32),),
        slot_mapping=(np.full(num_tokens, -1, np.int32),),
        logits_rows=np.arange(min(num_tokens, limits.max_num_rows), dtype=np.int32),
    )


def sampling_rows(count: int, *, filtered: bool = True, num_logprobs: int = 20) -> SamplingRows:
    """Rows with noise, and by default all that needs memory: a bias, filters, logprobs."""
    ones, none = np.ones(count, np.float32), np.zeros(count, np.int32)
    start = np.zeros(count + 1, np.int32)
    return SamplingRows(
        filters=Filters(
            temperature=ones,
            top_k=none + np.int32(50 if filtered else 0),
            top_p=ones * np.float32(0.9 if filtered else 1),
            min_p=ones * 0,
        ),
        noise=Noise(seed=none.astype(np.uint64), index=none, position=none),
        penalties=Penalties(
            repetition=ones,
            presence=ones * 0,
            frequency=ones * 0,
            start=start,
            token_ids=none[:0],
            counts=none[:0],
        ),
        bias=Bias(
            start=np.minimum(np.arange(count + 1, dtype=np.int32), int(filtered)),
            token_ids=none[: int(filtered)],
            values=ones[: int(filtered)],
        ),
        num_logprobs=none + np.int32(num_logprobs),
    )

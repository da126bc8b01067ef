"""Part A: attention to a long context, whose keys many programs share, at offsets beyond 2**31."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.backends.torch.kernels import Kernels, LayerCache, StepArrays
from octavo.backends.torch.plain.table import KERNELS as PLAIN
from octavo.backends.torch.tables import choose_kernels
from octavo.graph.ops import PagedAttention
from parts.check import BF16, F16, F32, Checks, error_of, generator
from parts.check_attention import TOLERANCE, operator_of
from parts.machine import Setup
from parts.record import Recorder

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the cache and of a prompt's chunk.

    Attributes:
        context: tokens of the one sequence.
        apart: how many times its own size a block of the layer is from the next one.
        chunk: tokens that end the context.
    """

    context: int
    apart: int
    chunk: int


def run(setup: Setup, recorder: Recorder) -> None:
    """The last token, and the last chunk of a prompt, in both modes."""
    checks = Checks(setup, recorder, "Attention")
    kernels = choose_kernels(setup.table, setup.device)
    operator = operator_of(4, 2, 16) if setup.quick else operator_of(32, 8, 128)
    sizes = Sizes(600, 2, 9) if setup.quick else Sizes(40_007, 32, 70)
    cache, table = cache_of(setup, operator, sizes)
    for count in (1, sizes.chunk):
        for deterministic in (False, True):
            name = f"{count} at the end of a context of {sizes.context}"
            name += ", deterministic" if deterministic else ""
            step = step_of(setup, operator, sizes.context, count, table)
            checks.add(
                name,
                lambda s=step, d=deterministic: error(kernels, s, (cache, operator), d),
            )


def cache_of(setup: Setup, operator: PagedAttention, sizes: Sizes) -> tuple[LayerCache, Tensor]:
    """Random K and V in blocks out of order; what lies between them is of other layers."""
    device, random = setup.device, generator(setup)
    num_blocks = -(-sizes.context // BLOCK_SIZE)
    shape = (2, operator.num_kv_heads, BLOCK_SIZE, operator.head_dim)
    pool = torch.empty((num_blocks + 1, sizes.apart, *shape), dtype=F16, device=device)
    values = pool[:, -1]
    values.copy_(torch.randn(values.shape, generator=random, device=device))
    table = 1 + torch.randperm(num_blocks, generator=random, device=device)
    return LayerCache(values, None), table[None].int()


def step_of(
    setup: Setup, operator: PagedAttention, context: int, count: int, table: Tensor
) -> tuple[Tensor, StepArrays]:
    """Queries of the last `count` tokens, and where they stand."""
    shape = (count, operator.num_heads * operator.head_dim)
    # Of some size, so that few keys matter most and no error drowns in the mean of all values.
    q = torch.randn(shape, generator=generator(setup, 12), device=setup.device) * 2

    def put(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=setup.device)

    zeros = torch.zeros(count, dtype=torch.int32, device=setup.device)
    arrays = StepArrays(
        positions=zeros,
        slots=zeros,
        starts=put(0, count),
        seq_lens=put(context),
        block_tables=table,
        max_query_len=count,
        max_seq_len=context,
        max_decode_len=context if count == 1 else 0,
    )
    return q.to(F16), arrays


def error(
    kernels: Kernels,
    step: tuple[Tensor, StepArrays],
    layer: tuple[LayerCache, PagedAttention],
    deterministic: bool,
) -> float:
    """By the tolerance of other contexts, of the greatest value."""
    (q, arrays), (cache, operator) = step, layer
    actual = kernels.attention(q, cache, arrays, operator, BF16, deterministic)
    expected = PLAIN.attention(q.float(), cache, arrays, operator, F32, True)
    return error_of(actual, expected, TOLERANCE[BF16] * float(expected.abs().max()))

"""Copies of whole blocks of the cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.backends.torch.plain import cache as plain
from octavo.backends.torch.triton.copy_blocks import copy_blocks as copy_blocks_triton

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "plain": plain.copy_blocks,
    "triton": copy_blocks_triton,
}


@pytest.fixture(params=IMPLEMENTATIONS)
def copy_blocks(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor], None]:
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("size", [1, 6, 4096, 8200, 40000])
def test_copies_over_all_layers(copy_blocks: Callable[[Tensor, Tensor], None], size: int) -> None:
    pool = torch.randint(0, 256, (3, 7, size), dtype=torch.uint8)
    pairs = torch.tensor([[5, 0], [2, 6], [5, 3]], dtype=torch.int32)
    expected = pool.clone()
    for source, destination in pairs.tolist():
        expected[:, destination] = pool[:, source]

    copy_blocks(pool, pairs)

    assert torch.equal(pool, expected)


def test_layers_may_lie_apart_at_odd_places(
    copy_blocks: Callable[[Tensor, Tensor], None],
) -> None:
    memory = torch.randint(0, 256, (2, 3 * 64 + 5), dtype=torch.uint8)
    pool = memory[:, 1 : 1 + 3 * 64].unflatten(1, (3, 64))
    expected = memory.clone()
    expected[:, 1 : 1 + 64] = memory[:, 1 + 128 : 1 + 192]

    copy_blocks(pool, torch.tensor([[2, 0]], dtype=torch.int32))

    assert torch.equal(memory, expected)


def test_no_pairs(copy_blocks: Callable[[Tensor, Tensor], None]) -> None:
    pool = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    before = pool.clone()

    copy_blocks(pool, torch.zeros((0, 2), dtype=torch.int32))

    assert torch.equal(pool, before)

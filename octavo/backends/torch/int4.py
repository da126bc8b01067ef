"""From a dense matrix to codes of 4 bits with a scale and a minimum a group, on the device.

Rounded to nearest within the range of each group of 32 columns; the range is drawn in a little
where that makes the group's squared error smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.backends.torch.kernels import GroupedWeight
from octavo.backends.torch.weights import block_columns, pack_scales, pack_words

GROUP = 32
MOST = 15
"""The greatest code."""
_SHRINKS = (1.0, 0.95)
"""Parts of a group's range that are tried."""
_ROWS = 1024
"""Rows at a time."""


def round_to_int4(weight: Tensor) -> GroupedWeight:
    """Round a matrix [out_features, in_features]; the columns must be whole groups.

    A group that holds NaN or infinity becomes NaN as a whole.
    """
    num_rows, columns = weight.shape
    assert columns % GROUP == 0, "weights of other shapes are left dense"
    width = block_columns(4)
    num_blocks = -(-columns // width)
    num_groups = num_blocks * width // GROUP
    words = weight.new_empty((num_blocks, num_rows, width // 8), dtype=torch.int32)
    scales = weight.new_zeros((num_groups, num_rows), dtype=torch.float16)
    minimums = torch.zeros_like(scales)
    for start in range(0, num_rows, _ROWS):
        rows = slice(start, min(start + _ROWS, num_rows))
        groups = weight[rows].float().unflatten(1, (-1, GROUP))
        codes, scale, minimum = _best(groups)
        words[:, rows] = pack_words(codes.flatten(1), 4)
        scales[: columns // GROUP, rows] = scale.T
        minimums[: columns // GROUP, rows] = minimum.T
    return GroupedWeight(
        codes=words,
        scales=pack_scales(scales, minimums),
        has_minimums=True,
        factors=torch.ones(num_rows, dtype=torch.float32, device=weight.device),
        bits=4,
        zero=0,
        group=GROUP,
        shape=(num_rows, columns),
    )


def _best(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [rows, groups, 32], scales and minimums float16 [rows, groups]."""
    low, high = groups.amin(2), groups.amax(2)
    middle, half = (low + high) / 2, (high - low) / 2
    least = torch.full_like(low, torch.inf)
    codes = torch.zeros_like(groups, dtype=torch.uint8)
    scale = torch.full_like(low, torch.nan, dtype=torch.float16)
    minimum = scale.clone()
    for shrink in _SHRINKS:
        one_scale = (2 * half * shrink / MOST).to(torch.float16)
        one_minimum = (middle - half * shrink).to(torch.float16)
        wide_scale, wide_minimum = one_scale.float()[..., None], one_minimum.float()[..., None]
        steps = torch.where(wide_scale > 0, (groups - wide_minimum) / wide_scale, 0.0)
        one_codes = steps.round().clamp(0, MOST)
        error = (one_codes * wide_scale + wide_minimum - groups).square().sum(2)
        is_better = error < least
        least = torch.where(is_better, error, least)
        codes = torch.where(is_better[..., None], one_codes.to(torch.uint8), codes)
        scale = torch.where(is_better, one_scale, scale)
        minimum = torch.where(is_better, one_minimum, minimum)
    return codes, scale, minimum

"""Part A: norms, gated activations and rounding to codes, against those of torch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.backends.torch.kernels import Kernels, Quantized, QuantizeMode, StaticScale
from octavo.backends.torch.plain.table import KERNELS as PLAIN
from octavo.backends.torch.tables import choose_kernels
from parts.check import BF16, F16, F32, NAMES, Checks, error_of, generator, unlike, value_error
from parts.machine import Setup
from parts.record import Recorder

STATIC = StaticScale(0.009)
"""Which cuts off some of what is multiplied with it."""
MODES: tuple[QuantizeMode | None, ...] = (None, "int8 token", "fp8 token", "fp8 group", STATIC)
SIZES = ((1, 4096), (3, 100), (67, 5120), (5, 14336))
QUICK = ((1, 128), (3, 100))


def combinations(setup: Setup) -> Iterator[tuple[torch.dtype, QuantizeMode | None]]:
    """bfloat16 with all modes, the others with some."""
    yield from ((BF16, mode) for mode in MODES)
    yield from ((F16, mode) for mode in ((None,) if setup.quick else (None, "fp8 token")))
    yield from ((F32, mode) for mode in ((None,) if setup.quick else (None, "int8 token")))


def run(setup: Setup, recorder: Recorder) -> None:
    """All combinations."""
    checks = Checks(setup, recorder, "Rows")
    kernels = choose_kernels(setup.table, setup.device)
    sizes = QUICK if setup.quick else SIZES
    for dtype, mode in combinations(setup):
        name = f"{NAMES[dtype]}, {mode or 'not rounded'}"
        checks.add(f"rms_norm {name}", lambda d=dtype, m=mode: norms(setup, kernels, sizes, d, m))
        checks.add(f"gated {name}", lambda d=dtype, m=mode: gates(setup, kernels, sizes, d, m))
        if mode is not None:
            checks.add(
                f"quantize {name}", lambda d=dtype, m=mode: codes(setup, kernels, sizes, d, m)
            )
        checks.add(
            f"a row alone {name}", lambda d=dtype, m=mode: alone(setup, kernels, sizes[-1], d, m)
        )
    for heads, features in ((32, 128), (7, 64), (9, 40)):
        checks.add(
            f"rms_norm of {heads} heads of {features}",
            lambda h=heads, f=features: of_heads(setup, kernels, h, f),
        )
    checks.add("ends of the range", lambda: ends(setup, kernels))


def random(setup: Setup, rows: int, features: int, dtype: torch.dtype, seed: int = 11) -> Tensor:
    """Strided rows."""
    wide = torch.randn((rows, features + 16), generator=generator(setup, seed), device=setup.device)
    return wide.to(dtype)[:, :features]


Sizes = tuple[tuple[int, int], ...]


def norms(
    setup: Setup, kernels: Kernels, sizes: Sizes, dtype: torch.dtype, mode: QuantizeMode | None
) -> float:
    """With a residual and, for sizes in turn, without."""
    worst = 0.0
    for number, (rows, features) in enumerate(sizes):
        x = random(setup, rows, features, dtype)
        weight = torch.rand(features, generator=generator(setup), device=setup.device) + 0.5
        residual = None if number % 2 else random(setup, rows, features, dtype, 12)
        actual = kernels.rms_norm(x, weight, 1e-5, residual, mode)
        expected = PLAIN.rms_norm(x, weight, 1e-5, residual, mode)
        worst = max(worst, unlike(actual.total, expected.total))
        worst = max(worst, value_error(actual.values, expected.values))
    return worst


def gates(
    setup: Setup, kernels: Kernels, sizes: Sizes, dtype: torch.dtype, mode: QuantizeMode | None
) -> float:
    """Both activations."""
    worst = 0.0
    for rows, features in sizes:
        gate, up = (random(setup, rows, features, dtype, seed) for seed in (1, 2))
        for activation in ("silu", "gelu"):
            actual = kernels.gated(gate, up, activation, mode)
            worst = max(worst, value_error(actual, PLAIN.gated(gate, up, activation, mode)))
    return worst


def codes(
    setup: Setup, kernels: Kernels, sizes: Sizes, dtype: torch.dtype, mode: QuantizeMode
) -> float:
    """To the bit: nothing comes before that could differ."""
    worst = 0.0
    for rows, features in sizes:
        x = random(setup, rows, features, dtype)
        actual, expected = kernels.quantize(x, mode), PLAIN.quantize(x, mode)
        worst = max(worst, unlike(actual.codes, expected.codes))
        worst = max(worst, unlike(actual.scales, expected.scales))
    return worst


def alone(
    setup: Setup,
    kernels: Kernels,
    size: tuple[int, int],
    dtype: torch.dtype,
    mode: QuantizeMode | None,
) -> float:
    """A row's bytes do not depend on the rows beside it."""
    rows, features = size
    x, other = (random(setup, rows, features, dtype, seed) for seed in (3, 4))
    weight = torch.ones(features, device=setup.device)

    def both(part: slice) -> list[Tensor]:
        results = [
            kernels.rms_norm(x[part], weight, 1e-5, other[part], mode).values,
            kernels.gated(x[part], other[part], "silu", mode),
        ]
        return [t for r in results for t in (r if isinstance(r, Quantized) else (r,))]

    whole = both(slice(0, rows))
    pairs = [
        (one, every[row : row + 1])
        for row in (0, rows - 1)
        for one, every in zip(both(slice(row, row + 1)), whole, strict=True)
    ]
    return max(unlike(one, every) for one, every in pairs)


def of_heads(setup: Setup, kernels: Kernels, heads: int, features: int) -> float:
    """The norm of each head by itself."""
    x = random(setup, 5, heads * features, BF16)
    weight = torch.rand(features, generator=generator(setup), device=setup.device) + 0.5
    actual = kernels.rms_norm(x, weight, 1e-6, None, None)
    return value_error(actual.values, PLAIN.rms_norm(x, weight, 1e-6, None, None).values)


def ends(setup: Setup, kernels: Kernels) -> float:
    """Zeros, numbers too small for a scale, NaN and infinity."""
    x = torch.zeros((6, 96), device=setup.device)
    x[1, 5], x[2, 5] = 2.0**-121, 2.0**-119
    x[3, 5], x[4, 95], x[5, 7] = torch.nan, -torch.inf, -(2.0**127)
    worst = 0.0
    for mode in ("int8 token", "fp8 token", "fp8 group"):
        actual, expected = kernels.quantize(x, mode), PLAIN.quantize(x, mode)
        finite = expected.scales.isfinite().all(dim=1)
        worst = max(worst, unlike(actual.scales[finite], expected.scales[finite]))
        ours, theirs = (q.codes.view(torch.uint8)[finite] for q in (actual, expected))
        worst = max(worst, unlike(ours, theirs))
        is_nan = actual.scales.isnan() == expected.scales.isnan()
        worst = max(worst, 0.0 if bool(is_nan.all()) else torch.inf)
    actual, expected = kernels.quantize(x, STATIC), PLAIN.quantize(x, STATIC)
    # NaN of either sign; infinity is as the greatest number.
    return max(worst, error_of(actual.codes.float(), expected.codes.float(), 1e-9))

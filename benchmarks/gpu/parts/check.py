"""How part A compares: every case gives its greatest error as a part of what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.backends.torch.kernels import Quantized
from parts.machine import Setup
from parts.record import Recorder

F32, F16, BF16, INT8, FP8 = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.float8_e4m3fn,
)
NAMES = {F32: "fp32", F16: "fp16", BF16: "bf16", INT8: "int8", FP8: "fp8"}
TARGET = "error at most what is allowed"


class Checks:
    """Runs cases; one that fails or raises does not end the others."""

    def __init__(self, setup: Setup, recorder: Recorder, table: str) -> None:
        """Report into the table of that name."""
        self._setup = setup
        self._recorder = recorder
        self._table = table

    def add(self, name: str, case: Callable[[], float]) -> None:
        """Run a case, which returns its error divided by what is allowed."""

        def report() -> None:
            with torch.inference_mode():
                found = float(case())
            cells = {"error / allowed": found if math.isfinite(found) else str(found)}
            self._recorder.add(self._table, name, cells, ok=found <= 1, target=TARGET)

        self._recorder.attempt(self._table, name, report)


def generator(setup: Setup, seed: int = 11) -> torch.Generator:
    """Random numbers of the device, the same in every run."""
    return torch.Generator(device=setup.device).manual_seed(seed)


def error_of(actual: Tensor, expected: Tensor, allowed: Tensor | float) -> float:
    """The greatest error by what is allowed; infinite if one is NaN and the other is not."""
    if actual.shape != expected.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    a, b = actual.double(), expected.double()
    parts = (a - b).abs() / allowed
    equal = (a == b) | (a.isnan() & b.isnan())
    parts = torch.where(equal, 0.0, parts)
    return float(torch.where(parts.isnan(), math.inf, parts).max())


def unlike(actual: Tensor, expected: Tensor) -> float:
    """0 if all bytes are equal, else infinite."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    both = (actual.contiguous(), expected.contiguous())
    one, other = (tensor.view(torch.uint8) for tensor in both)
    return 0.0 if torch.equal(one, other) else math.inf


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """What one rounding to the dtype, and sums in float32 before it, may change."""
    wide = expected.double().abs()
    finite = torch.where(wide.isfinite(), wide, 0.0)
    peak = finite.max() if wide.numel() else finite.sum()
    return wide * (torch.finfo(dtype).eps / 2 + 2e-6) + 5e-7 * peak + 1e-30


def codes_error(actual: Quantized, expected: Quantized) -> float:
    """Scales to their last bits; few codes may be the next ones, where those bits decide."""
    scales = error_of(actual.scales, expected.scales, expected.scales.double().abs() * 4e-6 + 1e-44)
    if actual.codes.dtype != expected.codes.dtype:
        return math.inf
    ours, theirs = actual.codes.float(), expected.codes.float()
    step = torch.ones_like(theirs)
    if expected.codes.dtype == FP8:
        step = (theirs.abs() / 8).clamp_min(2.0**-9)
    moved = int((ours != theirs).sum())
    allowed = max(3.0, 0.01 * ours.numel())
    return max(scales, error_of(ours, theirs, step), moved / allowed)


def value_error(actual: Tensor | Quantized, expected: Tensor | Quantized) -> float:
    """Of either kind of result."""
    if isinstance(actual, Quantized) and isinstance(expected, Quantized):
        return codes_error(actual, expected)
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        return math.inf
    if actual.dtype != expected.dtype:
        return math.inf
    return error_of(actual, expected, 2 * rounding(expected, actual.dtype))

"""Part C: sampling alone, of logits as large a vocabulary gives them; the device's time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from octavo.backends.torch.arrays import Staging, put_rows
from octavo.backends.torch.kernels import Kernels
from octavo.backends.torch.tables import choose_kernels
from parts.machine import MILLISECOND, Setup, device_seconds
from parts.record import Recorder
from parts.steps import sampling_rows

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "noise": {"temperature": 1.0},
    "noise, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "noise, top_k 50": {"temperature": 1.0, "top_k": 50},
}
COUNT = 8
HEAD_START = 20 * MILLISECOND
"""In which the host begins COUNT calls."""


def run(setup: Setup, recorder: Recorder) -> None:
    """Each way, of one row and of many."""
    kernels = choose_kernels(setup.table, setup.device)
    vocabulary = 1000 if setup.quick else 128_256
    for rows in (1, 3) if setup.quick else (1, 256):
        shape = (rows, vocabulary)
        logits = torch.randn(shape, device=setup.device) * 3
        for way in WAYS:
            name = f"{way}, {rows} rows of {vocabulary}"
            case = partial(measure, setup, recorder, kernels, (name, way), logits)
            recorder.attempt("Sampling, time of the device", name, case)


def measure(
    setup: Setup, recorder: Recorder, kernels: Kernels, case: tuple[str, str], logits: torch.Tensor
) -> None:
    """One row."""
    name, way = case
    count = len(logits)
    rows = sampling_rows(count, seed=range(count), position=7, **WAYS[way])
    arrays = put_rows(Staging(setup.device), rows)

    def several() -> None:
        for _ in range(COUNT):
            kernels.sample(logits, arrays)

    head_start = 0 if setup.warm else HEAD_START
    with torch.inference_mode():
        several()
        seconds = min(device_seconds(several, setup.device, head_start) for _ in range(3)) / COUNT
    moved = logits.numel() * logits.element_size()
    cells = {"us": seconds * 1e6, "TB/s of logits": moved / seconds / 1e12}
    recorder.add("Sampling, time of the device", name, cells)

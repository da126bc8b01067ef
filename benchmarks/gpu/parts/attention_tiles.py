"""Part C: prefill with other tiles than those that attention_shapes has chosen by generated code.

What a device finds faster on Hopper goes into `attention_shapes.ragged_tiles`; A needs a bound of
registers beside it. Predictions by SASS: A waits for each wgmma and prefetches nothing, but has two
programs a processor; B and C have one, whose matrix instructions run beside loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from octavo.backends.torch.triton import attention, attention_shapes
from parts.machine import Setup, captured_seconds, release
from parts.record import Recorder
from parts.speed_attention import Case, calls_of

CANDIDATES: dict[str, tuple[int, dict[str, int]]] = {
    "A: 128 by 64, 3 stages, 128 registers": (64, {"num_stages": 3, "maxnreg": 128}),
    "B: 128 by 64, 5 stages": (64, {"num_stages": 5}),
    "C: 128 by 128, 2 stages": (128, {"num_stages": 2}),
}
"""Keys of a tile, and options; B is what is served."""
SIZES = ((1, 8192, 8192), (4, 2048, 2048))


@contextmanager
def tiles_of(keys: int, options: dict[str, int]) -> Iterator[None]:
    """Have the ragged kernel launched with these for a while."""
    chosen = attention_shapes.choose_shape

    def choose(*args: Any) -> attention_shapes.Shape:
        shape = chosen(*args)
        constants = {**shape.constants, "BLOCK_N": keys}
        return replace(shape, constants=constants, options={**shape.options, **options})

    attention.choose_shape = choose
    try:
        yield
    finally:
        attention.choose_shape = chosen


def run(setup: Setup, recorder: Recorder) -> None:
    """Time the candidates, for a cache in fp16 and 128 features a head."""
    cases = [
        Case(f"{n} prefill", h, k, *s) for n, h, k in (("7B", 32, 32), ("8B", 32, 8)) for s in SIZES
    ]
    if setup.quick:
        cases = [Case("8B prefill", 4, 2, 1, 40, 40)]
    for case in cases:
        cells: dict[str, Any] = {}
        for name, (keys, options) in CANDIDATES.items():
            with tiles_of(keys, options), torch.inference_mode():
                seconds = captured_seconds(calls_of(setup, case), setup.device)
            cells[f"{name}: TFLOP/s"] = case.operations / seconds / 1e12
            release(setup.device)
        title = f"{case.name}, batch {case.batch}, context {case.context}"
        recorder.add("Tiles of attention", title, cells)

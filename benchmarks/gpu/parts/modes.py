"""Part F: what deterministic mode costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from parts import dummy
from parts.dummy import BLOCK_SIZE
from parts.machine import Setup
from parts.record import Recorder
from parts.speed import decode_seconds, percent, prefill_seconds, sizes_of, width_of

NAME = "Llama-3.1-8B"
TABLE = f"{NAME} bf16"
BATCHES = (1, 32, 128)


def run(setup: Setup, recorder: Recorder) -> None:
    """The same weights in two Programs, one of them deterministic."""
    config = dummy.shape_of(NAME, setup)
    seconds: dict[str, float] = {}
    weights = None
    for mode in ("default", "deterministic"):
        is_other = mode == "deterministic"
        model = dummy.make(setup, config, deterministic=is_other, weights=weights)
        weights = model.weights
        for name, function in cases(setup, model).items():
            case = partial(report, recorder, (name, mode), function, seconds)
            recorder.attempt(TABLE, f"{name}, {mode}", case)
        dummy.close(model, setup.device)
        del model


def report(
    recorder: Recorder,
    case: tuple[str, str],
    function: Callable[[], float],
    default: dict[str, float],
) -> None:
    """One row, beside the seconds of default mode, which are kept in `default`."""
    name, mode = case
    seconds = function()
    cells: dict[str, float | str] = {"ms": seconds * 1e3}
    if mode == "default":
        default[name] = seconds
    elif name in default:
        cells["cost"] = percent(seconds / default[name] - 1)
    recorder.add(TABLE, f"{name}, {mode}", cells)


def cases(setup: Setup, model: dummy.Dummy) -> dict[str, Callable[[], float]]:
    """What measures the seconds of a prefill and of decode steps, by name."""
    batches, context, prompt, steps = sizes_of(setup)
    batches = batches if setup.quick else BATCHES
    prompt_blocks = -(-prompt // BLOCK_SIZE)
    width = width_of(context, steps)
    model.program.allocate_cache(1 + max(prompt_blocks, width * max(batches)))
    dummy.fill_cache(model.program)
    found: dict[str, Callable[[], float]] = {
        f"prefill of {prompt} tokens": partial(prefill_seconds, setup, model, prompt)
    }
    for batch in batches:
        found[f"decode step, batch {batch}"] = lambda b=batch: (
            decode_seconds(setup, model, b, context, steps).wall
        )
    return found

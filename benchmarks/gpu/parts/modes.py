"""Part F: what deterministic mode costs."""

from __future__ import annotations

from parts import dummy
from parts.dummy import BLOCK_SIZE
from parts.machine import Setup
from parts.record import Recorder
from parts.speed import decode_seconds, percent, prefill_seconds, sizes_of, width_of

NAME = "Llama-3.1-8B"
BATCHES = (1, 32, 128)


def run(setup: Setup, recorder: Recorder) -> None:
    """The same weights in two Programs, one of them deterministic."""
    config = dummy.shape_of(NAME, setup)
    found: dict[bool, dict[str, float]] = {}
    weights = None
    for deterministic in (False, True):
        model = dummy.make(setup, config, deterministic=deterministic, weights=weights)
        weights = model.weights
        found[deterministic] = measure(setup, model)
        dummy.close(model, setup.device)
        del model
    for name, seconds in found[False].items():
        other = found[True][name]
        cells = {"ms": seconds * 1e3, "deterministic ms": other * 1e3}
        cells |= {"cost": percent(other / seconds - 1)}
        recorder.add(f"{NAME} bf16", name, cells)


def measure(setup: Setup, model: dummy.Dummy) -> dict[str, float]:
    """Seconds of a prefill and of decode steps."""
    batches, context, prompt, steps = sizes_of(setup)
    batches = batches if setup.quick else BATCHES
    prompt_blocks = -(-prompt // BLOCK_SIZE)
    width = width_of(context, steps)
    model.program.allocate_cache(1 + max(prompt_blocks, width * max(batches)))
    dummy.fill_cache(model.program)
    found = {f"prefill of {prompt} tokens": prefill_seconds(setup, model, prompt)}
    for batch in batches:
        decode = decode_seconds(setup, model, batch, context, steps)
        found[f"decode step, batch {batch}"] = decode.wall
    return found

"""Part D: the headline of PagedAttention, on the lengths of ShareGPT."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

from parts import dummy, serving
from parts.machine import Setup, free_bytes
from parts.record import Recorder
from parts.serving import Request, Served, Sizes
from parts.speed import ROOM

LEAST_GAIN = {"Llama-7B": 2.5, "Llama-13B": 2.7}
PAPER = Path(__file__).resolve().parents[2] / "paper" / "workload.py"
MAX_RUNNING = 256
BUDGET = 2048
SECONDS = {"continuous": 12.0, "static": 15.0}


def run(setup: Setup, recorder: Recorder, name: str) -> None:
    """Serve both ways; the larger rate is divided by the smaller."""
    config = dummy.shape_of(name, setup)
    if not dummy.fits(setup, config, "bf16", 12 << 30):
        recorder.add(name, "weights and a cache", {"left out": "no room"})
        return
    model = dummy.make(setup, config)
    sizes = sizes_of(setup, model)
    model.program.allocate_cache(sizes.num_blocks)
    dummy.fill_cache(model.program)
    served: dict[str, Served] = {}

    def measure(way: str) -> None:
        served[way] = serve(setup, model, way, sizes)
        report(recorder, name, way, served[way], sizes)

    for way in serving.WAYS:
        recorder.attempt(title_of(name), way, partial(measure, way))
    if len(served) == len(serving.WAYS):
        report_gain(setup, recorder, name, served)


def report_gain(setup: Setup, recorder: Recorder, name: str, served: Mapping[str, Served]) -> None:
    """The headline."""
    gain = served["continuous"].rate / served["static"].rate
    least = LEAST_GAIN[name]
    recorder.add(
        title_of(name),
        "continuous / static",
        {"gain": gain},
        ok=setup.met(gain >= least),
        target=f"at least {least}",
    )


def title_of(name: str) -> str:
    """Of the table."""
    return f"{name} bf16, lengths of ShareGPT"


def sizes_of(setup: Setup, model: dummy.Dummy) -> Sizes:
    """The cache takes what is free; small where the script itself is tested."""
    if setup.quick:
        return Sizes(num_blocks=16, max_len=64, max_running=8, budget=64, seconds=1.0)
    blocks = (free_bytes(setup.device) - ROOM) // model.program.block_bytes()
    if setup.warm:
        blocks = min(blocks, (4 << 30) // model.program.block_bytes())
    return Sizes(blocks, workload_module().MAX_LENGTH, MAX_RUNNING, BUDGET, 0.0)


def workload_module() -> ModuleType:
    """benchmarks/paper/workload.py, whose neighbours have the names of others here."""
    name = "paper_workload"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, PAPER)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def workload_of(setup: Setup) -> list[Request]:
    """The requests, in the order that they came; the same in every run."""
    if setup.quick:
        rng = random.Random(1)
        return [Request(rng.randint(1, 20), rng.randint(1, 30)) for _ in range(12)]
    module = workload_module()
    dataset, rng = module.synthetic()["ShareGPT"], random.Random(1)
    requests = []
    for _ in range(4000):
        prompt = min(dataset.prompt.draw(rng), module.MAX_LENGTH // 2)
        requests.append(Request(prompt, min(dataset.output.draw(rng), module.MAX_LENGTH - prompt)))
    return requests


def serve(setup: Setup, model: dummy.Dummy, way: str, sizes: Sizes) -> Served:
    """One way, after a short run that loads its kernels."""
    seconds = sizes.seconds or (3.0 if setup.warm else SECONDS[way])
    requests = workload_of(setup)
    for limit in (0.2 if setup.quick else 1.5, seconds):
        served = serving.WAYS[way](model.program, requests, replace(sizes, seconds=limit))
    return served


def report(recorder: Recorder, name: str, way: str, served: Served, sizes: Sizes) -> None:
    """One row."""
    cells = {
        "tok/s of answers": served.rate,
        "tokens": served.tokens,
        "steps": served.steps,
        "mean batch": served.sequences / served.steps,
        "ms a step": 1e3 * served.seconds / served.steps,
        "s measured": served.measured,
        "preempted": served.preempted,
        "blocks": sizes.num_blocks,
    }
    recorder.add(title_of(name), way, cells)

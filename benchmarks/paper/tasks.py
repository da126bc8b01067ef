"""What a pool of processes works on: one run or one curve of one system each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cost import Model
from simulate import Result, Simulation, System
from sweep import sweep
from workload import Job

ENOUGH = 1000
"""Requests of a trace that is cut short."""

Record = dict[str, Any]
"""What a task showed, ready for JSON: a "curve", or averages over the time of a run."""


@dataclass(frozen=True)
class Scale:
    """How much is simulated.

    Attributes:
        models: of figure 12.
        part: of the model's time (an hour, or 15 minutes) that a trace lasts.
        latencies: where curves are refined; they end above the greatest.
        precision: factor between the rates on both sides of such a latency.
        widths: samples and beams of figures 14 and 15.
        block_sizes: of figure 2's waste.
        has_extras: also what no target asks for.
    """

    models: tuple[Model, ...]
    part: float
    latencies: tuple[float, ...]
    precision: float
    widths: tuple[int, ...]
    block_sizes: tuple[int, ...]
    has_extras: bool


@dataclass(frozen=True)
class Source:
    """Where requests come from.

    Attributes:
        make: the requests of a rate and a time in seconds.
        first_rate: requests a second that curves begin with.
        part: of the trace's time, where rates are so high that a part holds enough requests.
    """

    name: str
    make: Callable[[float, float], list[Job]]
    first_rate: float = 0.2
    part: float = 1.0

    def trace(self, rate: float, duration_s: float) -> list[Job]:
        """The requests of a part of `duration_s`, or of more of it until there are enough."""
        enough_s = max(duration_s * self.part, ENOUGH / rate)
        return self.make(rate, min(duration_s, enough_s))


@dataclass(frozen=True)
class Task:
    """One run or one curve.

    Attributes:
        rate: requests a second of a run, averaged over its time; None: a curve over rates.
    """

    system: System
    model: Model
    source: Source
    rate: float | None = None

    @property
    def label(self) -> str:
        """What it is: no two tasks have the same."""
        at = "curve" if self.rate is None else f"{self.rate:.3g}/s"
        system = self.system
        size = f", blocks of {system.block_size}" if system.need is None else ""
        overhead = f"{1e3 * system.overhead.fixed_s:g} ms"
        return f"{self.model.name}, {self.source.name}, {system.name}{size}, {overhead}, {at}"

    def run(self, scale: Scale) -> Record:
        """Simulate it."""
        record: Record = {
            "label": self.label,
            "system": self.system.name,
            "block_size": self.system.block_size,
            "has_overhead": self.system.overhead.sequence_s > 0,
            "model": self.model.name,
            "source": self.source.name,
        }
        duration_s = self.model.trace_s * scale.part
        if self.rate is not None:
            jobs = self.source.trace(self.rate, duration_s)
            result = Simulation(self.system, self.model, jobs).run(is_window=True)
            return record | self._averages(result, len(jobs))
        record["curve"] = sweep(
            self.system,
            self.model,
            lambda rate: self.source.trace(rate, duration_s),
            self.source.first_rate,
            scale.latencies,
            scale.precision,
        )
        return record

    def _averages(self, result: Result, num_jobs: int) -> Record:
        memory = result.memory
        record: Record = {
            "num_batched": result.num_batched,
            "num_preemptions": result.num_preemptions,
        }
        if memory.unshared:  # Tokens that several hold would count several times below.
            record["saved"] = 1 - memory.taken / memory.unshared
            record["copies_a_request"] = result.num_copies / num_jobs
        else:
            record["shares"] = self._shares(result)
            record["waste"] = 1 - memory.held / memory.taken
        return record

    def _shares(self, result: Result) -> dict[str, float]:
        """What the pool's slots were, as parts of it: figure 2's four kinds."""
        memory = result.memory
        pool = self.model.num_slots * result.window_s
        if self.system.need is None:
            slots = {"tokens": memory.held, "reserved": 0.0, "internal": memory.taken - memory.held}
        else:
            slots = {
                "tokens": memory.held,
                "reserved": memory.final - memory.held,
                "internal": memory.wanted - memory.final,
            }
        slots["external or free"] = pool - sum(slots.values())
        return {kind: count / pool for kind, count in slots.items()}

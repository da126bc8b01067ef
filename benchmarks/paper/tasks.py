"""What a pool of processes works on: one run or one curve of one system each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost import Model
from simulate import Result, Simulation, System
from sweep import Point, sweep
from workload import Job

ENOUGH = 1000
"""Requests of a trace that is cut short."""
AVERAGE_S = 900.0
"""Time of a run at one rate, of which averages are taken."""


@dataclass(frozen=True)
class Scale:
    """How much is simulated.

    Attributes:
        models: of figure 12.
        part: of the model's time (an hour, or 15 minutes) that a trace lasts.
        latencies: where curves are refined; they end above the greatest.
        precision: factor between the rates on both sides of such a latency.
        has_extras: also what no target asks for.
    """

    models: tuple[Model, ...]
    part: float
    latencies: tuple[float, ...]
    precision: float
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
        """What it is, for people."""
        at = "curve" if self.rate is None else f"{self.rate:g}/s"
        return f"{self.model.name}, {self.source.name}, {self.system.name}, {at}"

    def run(self, scale: Scale) -> Result | list[Point]:
        """Simulate it."""
        duration_s = self.model.trace_s * scale.part
        if self.rate is not None:
            jobs = self.source.trace(self.rate, min(duration_s, AVERAGE_S))
            return Simulation(self.system, self.model, jobs).run(is_window=True)
        return sweep(
            self.system,
            self.model,
            lambda rate: self.source.trace(rate, duration_s),
            self.source.first_rate,
            scale.latencies,
            scale.precision,
        )

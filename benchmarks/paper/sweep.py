"""Curves of normalized latency over the request rate, and the rate at a given latency."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from cost import Model
from simulate import System, simulate
from workload import Job

Point = tuple[float, float]
"""Requests a second, seconds a token."""


def sweep(
    system: System,
    model: Model,
    make_trace: Callable[[float], list[Job]],
    first_rate: float,
    latencies: tuple[float, ...],
    precision: float,
) -> list[Point]:
    """The curve of one system, by rising rates.

    Rates rise by half until the latency is above all of `latencies`, then the bracket around each
    of these is halved until its ends differ by less than a factor of `precision`. What lies far
    above them is not simulated to its end: those points are lower bounds.
    """
    latency_at: dict[float, float] = {}

    def measure(rate: float) -> float:
        result = simulate(system, model, make_trace(rate), give_up=1.2 * max(latencies))
        latency_at[rate] = result.normalized_latency
        return result.normalized_latency

    rate = first_rate
    while measure(rate) > min(latencies) and rate > first_rate / 100:
        rate /= 2
    rate = max(latency_at)
    while latency_at[rate] <= max(latencies):
        rate *= 1.5
        measure(rate)
    for latency in latencies:
        while (ends := _bracket(latency_at, latency)) and ends[1] / ends[0] > precision:
            measure(math.sqrt(ends[0] * ends[1]))
    return sorted(latency_at.items())


def rate_at(points: list[Point], latency: float) -> float:
    """The rate at which a curve first rises above a latency; its first rate if it begins above."""
    ends = _bracket(dict(points), latency)
    if ends is None:
        return points[0][0]
    low, high = (math.log(dict(points)[end]) for end in ends)
    part = (math.log(latency) - low) / (high - low)
    return math.exp(math.log(ends[0]) * (1 - part) + math.log(ends[1]) * part)


def _bracket(latency_at: dict[float, float], latency: float) -> tuple[float, float] | None:
    """The neighbouring rates between which the curve first rises above a latency."""
    for low, high in pairwise(sorted(latency_at)):
        if latency_at[low] <= latency < latency_at[high]:
            return low, high
    return None

"""The paper's figures: what is run for each, and what follows, beside the paper's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from cost import LLAMA_13B, NO_OVERHEAD, OPT_13B, OPT_66B, OPT_175B, Model
from sharing import chat_turns, conversations, translations
from simulate import (
    FASTER_TRANSFORMER,
    OCTAVO,
    OCTAVO_CACHED,
    ORCA_CHAT,
    ORCA_MAX,
    ORCA_ORACLE,
    ORCA_POW2,
    Result,
    System,
)
from sweep import rate_at
from tasks import Scale, Source, Task
from workload import Dataset, poisson_trace

SYSTEMS = (OCTAVO, ORCA_ORACLE, ORCA_POW2, ORCA_MAX, FASTER_TRANSFORMER)
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFIXES = {80: 1.67, 341: 3.58}
"""Tokens of figure 16's prefixes, and the paper's ratio to Orca (Oracle)."""
LATENCY = 0.2
"""Seconds a token at which rates are compared."""
RATES = {"ShareGPT": 2.0, "Alpaca": 30.0}
"""Requests a second of figures 2 and 13."""
QUICK = Scale((OPT_13B,), 1 / 12, (LATENCY,), 1.12, has_extras=False)
FULL = Scale((OPT_13B, OPT_66B, OPT_175B), 1.0, (LATENCY, 0.1, 0.5), 1.08, has_extras=True)

Results = dict[Task, Any]


@dataclass(frozen=True)
class Claim:
    """One of our figures beside the paper's.

    Attributes:
        low, high: what the paper says: a range, or one value twice; None: nothing.
        least, most: what ours must be.
        others: ours under other circumstances, for people.
    """

    figure: str
    subject: str
    ours: float
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None
    unit: str = ""
    others: str = ""

    @property
    def is_missed(self) -> bool:
        """Whether there is a target that ours is beside."""
        is_short = self.least is not None and self.ours < self.least
        return is_short or (self.most is not None and self.ours > self.most)

    @property
    def differs(self) -> bool:
        """Whether ours is more than a fifth beside what the paper says."""
        if self.low is None or self.high is None:
            return False
        return not 0.8 * self.low <= self.ours <= 1.2 * self.high


class Paper:
    """All tasks of a scale, and the claims that follow from their results."""

    def __init__(self, datasets: dict[str, Dataset], scale: Scale) -> None:
        """Plan the tasks."""
        self._scale = scale
        self.sharegpt, self.alpaca = (
            Source(name, partial(poisson_trace, datasets[name]), first_rate, part)
            for name, first_rate, part in (("ShareGPT", 0.3, 1.0), ("Alpaca", 2.0, 1 / 4))
        )
        self.brief = dataclasses.replace(self.sharegpt, part=1 / 4)
        self.chat = Source("chat", chat_turns, part=1 / 2)
        self.chats = Source("whole chats", conversations, part=1 / 2)
        self.prefixes = {
            num: Source(f"prefix of {num}", partial(translations, num), 5.0, 1 / 8)
            for num in PREFIXES
        }

    def tasks(self) -> list[Task]:
        """What is to be run, each once, roughly the longest first."""
        tasks = [Task(system, OPT_13B, self.chat) for system in (OCTAVO, ORCA_CHAT)]
        tasks += [
            self._prefix_task(s, num) for num in PREFIXES for s in (OCTAVO_CACHED, ORCA_ORACLE)
        ]
        tasks += [
            Task(system, model, source)
            for model in self._scale.models
            for source in (self.sharegpt, self.alpaca)
            for system in SYSTEMS
        ]
        tasks += [
            self._memory_task(system, source)
            for source in (self.sharegpt, self.alpaca)
            for system in SYSTEMS[:4]
        ]
        tasks += [
            self._memory_task(_with_blocks(size), source)
            for source in (self.sharegpt, self.alpaca)
            for size in BLOCK_SIZES
        ]
        if self._scale.has_extras:
            tasks += [Task(system, OPT_13B, self.chats) for system in (OCTAVO, OCTAVO_CACHED)]
            tasks += [
                Task(_without_overhead(system), OPT_13B, self.brief)
                for system in (OCTAVO, ORCA_ORACLE, ORCA_MAX)
            ]
            tasks += [
                self._prefix_task(_without_overhead(system), num)
                for num in PREFIXES
                for system in (OCTAVO_CACHED, ORCA_ORACLE)
            ]
        return list(dict.fromkeys(tasks))

    def claims(self, results: Results) -> list[Claim]:
        """Everything, in the paper's order."""
        return [
            *self._memory_claims(results),
            *self._curve_claims(results),
            *self._batch_claims(results),
            *self._prefix_claims(results),
            *self._chat_claims(results),
            *(self._cost_claims(results) if self._scale.has_extras else ()),
        ]

    # ---- Figures 2 and 13: memory and batches ----------------------------------------------------

    def _memory_task(self, system: System, source: Source) -> Task:
        return Task(system, OPT_13B, source, RATES[source.name])

    def _memory_claims(self, results: Results) -> Iterator[Claim]:
        said = {ORCA_MAX: 20.4, ORCA_POW2: 26.8, ORCA_ORACLE: 38.2}
        for system, paper in said.items():
            result = results[self._memory_task(system, self.sharegpt)]
            held = 100 * shares(result, system)["tokens"]
            yield Claim("2", f"{system.name}: slots that hold tokens", held, paper, paper, unit="%")
        result = results[self._memory_task(OCTAVO, self.sharegpt)]
        held = 100 * result.memory.held / result.memory.taken
        pool = 100 * shares(result, OCTAVO)["tokens"]
        yield Claim(
            "2", "Octavo: slots taken that hold tokens", held, 96.3, 96.3, least=96, unit="%",
            others=f"{pool:.1f} % of the pool at {RATES['ShareGPT']:g}/s",
        )  # fmt: skip
        for source, most in ((self.sharegpt, 4.0), (self.alpaca, None)):
            wastes = {size: self._waste(results, source, size) for size in BLOCK_SIZES}
            listed = ", ".join(f"{size}: {waste:.1f}" for size, waste in wastes.items())
            yield Claim(
                "2", f"Octavo, {source.name}: waste at block size 16", wastes[16],
                most=most, unit="%", others=f"by block size {listed}",
            )  # fmt: skip

    def _waste(self, results: Results, source: Source, block_size: int) -> float:
        """Percent of the slots taken that hold no token."""
        memory = results[self._memory_task(_with_blocks(block_size), source)].memory
        return float(100 * (1 - memory.held / memory.taken))

    def _batch_claims(self, results: Results) -> Iterator[Claim]:
        said = {
            "ShareGPT": (7.0, 9.81, 13.62, 30.42),
            "Alpaca": (7.0, 43.24, 72.75, 132.44),
        }
        for source in (self.sharegpt, self.alpaca):
            systems = (ORCA_MAX, ORCA_POW2, ORCA_ORACLE, OCTAVO)
            for system, paper in zip(systems, said[source.name], strict=True):
                result = results[self._memory_task(system, source)]
                subject = f"{source.name} at {RATES[source.name]:g}/s, {system.name}: batched"
                is_input = "an input of the cost model" if system is OCTAVO else ""
                yield Claim("13", subject, result.num_batched, paper, paper, others=is_input)

    # ---- Figure 12: latency against rate ---------------------------------------------------------

    def _curve_claims(self, results: Results) -> Iterator[Claim]:
        for model in self._scale.models:
            for source in (self.sharegpt, self.alpaca):
                for system in SYSTEMS[1:]:
                    claim = self._ratio(
                        results, "12", Task(OCTAVO, model, source), Task(system, model, source)
                    )
                    yield self._with_paper(claim, model, source, system)

    def _with_paper(self, claim: Claim, model: Model, source: Source, system: System) -> Claim:
        """Add what the paper says of the pair, and what must be."""
        ranges = {ORCA_ORACLE: (1.7, 2.7), ORCA_MAX: (2.7, 8.0)}
        if source is self.sharegpt and system in ranges:
            low, high = ranges[system]
            least = low if model is OPT_13B else None
            return dataclasses.replace(claim, low=low, high=high, least=least)
        if system is FASTER_TRANSFORMER:
            return dataclasses.replace(claim, low=1.0, high=22.0)
        return claim

    def _ratio(self, results: Results, figure: str, ours: Task, other: Task) -> Claim:
        """How many times the other's rate ours bears at equal latency."""
        ratios = {
            latency: rate_at(results[ours], latency) / rate_at(results[other], latency)
            for latency in self._scale.latencies
        }
        rates = [rate_at(results[task], LATENCY) for task in (ours, other)]
        listed = ", ".join(f"{ratios[at]:.2f} at {at:g} s" for at in sorted(ratios))
        others = f"{rates[0]:.2f}/s against {rates[1]:.2f}/s"
        if len(ratios) > 1:
            others += f"; {listed}"
        subject = f"{ours.model.name}, {ours.source.name}: rate over {other.system.name}"
        return Claim(figure, subject, ratios[LATENCY], unit="x", others=others)

    # ---- Figures 16 and 17: shared tokens --------------------------------------------------------

    def _prefix_task(self, system: System, num_prefix: int) -> Task:
        return Task(system, LLAMA_13B, self.prefixes[num_prefix])

    def _prefix_claims(self, results: Results) -> Iterator[Claim]:
        for num, paper in PREFIXES.items():
            claim = self._ratio(
                results,
                "16",
                self._prefix_task(OCTAVO_CACHED, num),
                self._prefix_task(ORCA_ORACLE, num),
            )
            yield dataclasses.replace(claim, low=paper, high=paper, least=1.2)

    def _chat_claims(self, results: Results) -> Iterator[Claim]:
        ours, orca = (Task(system, OPT_13B, self.chat) for system in (OCTAVO, ORCA_CHAT))
        claim = self._ratio(results, "17", ours, orca)
        yield dataclasses.replace(claim, low=2.0, high=2.0, least=1.3)
        if self._scale.has_extras:
            cached, plain = (
                Task(system, OPT_13B, self.chats) for system in (OCTAVO_CACHED, OCTAVO)
            )
            yield self._ratio(results, "17", cached, plain)

    # ---- What the cost model's overhead is to the ratios -----------------------------------------

    def _cost_claims(self, results: Results) -> Iterator[Claim]:
        """The same ratios on GPUs that never wait for Python."""
        ours = Task(_without_overhead(OCTAVO), OPT_13B, self.brief)
        for system in (ORCA_ORACLE, ORCA_MAX):
            other = Task(_without_overhead(system), OPT_13B, self.brief)
            yield self._ratio(results, "12, no overhead", ours, other)
        for num in PREFIXES:
            ours, other = (
                self._prefix_task(_without_overhead(system), num)
                for system in (OCTAVO_CACHED, ORCA_ORACLE)
            )
            yield self._ratio(results, "16, no overhead", ours, other)


def shares(result: Result, system: System) -> dict[str, float]:
    """What the pool's slots were, as parts of it: figure 2's four kinds."""
    memory = result.memory
    pool = OPT_13B.num_slots * result.window_s
    if system.need is None:
        kinds = {"tokens": memory.held, "reserved": 0.0, "internal": memory.taken - memory.held}
    else:
        kinds = {
            "tokens": memory.held,
            "reserved": memory.final - memory.held,
            "internal": memory.wanted - memory.final,
        }
    kinds["external or free"] = pool - sum(kinds.values())
    return {kind: slots / pool for kind, slots in kinds.items()}


def _with_blocks(block_size: int) -> System:
    return dataclasses.replace(OCTAVO, block_size=block_size)


def _without_overhead(system: System) -> System:
    return dataclasses.replace(system, overhead=NO_OVERHEAD)

"""The paper's figures: what is run for each, and what follows, beside the paper's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from claims import Claim
from cost import LLAMA_13B, NO_OVERHEAD, OPT_13B, OPT_66B, OPT_175B, Model
from sharing import chat_turns, conversations, groups, translations
from simulate import (
    FASTER_TRANSFORMER,
    OCTAVO,
    OCTAVO_CACHED,
    ORCA_CHAT,
    ORCA_MAX,
    ORCA_ORACLE,
    ORCA_POW2,
    System,
)
from sweep import rate_at
from tasks import Record, Scale, Source, Task
from workload import Dataset, poisson_trace

SYSTEMS = (OCTAVO, ORCA_ORACLE, ORCA_POW2, ORCA_MAX, FASTER_TRANSFORMER)
PREFIXES = {80: 1.67, 341: 3.58}
"""Tokens of figure 16's prefixes, and the paper's ratio to Orca (Oracle)."""
LATENCY = 0.2
"""Seconds a token at which rates are compared."""
RATES = {"ShareGPT": 2.0, "Alpaca": 30.0}
"""Requests a second of figures 2 and 13."""
SHARED = {
    ("Alpaca", False): (6.1, 9.8),
    ("Alpaca", True): (37.6, 55.2),
    ("ShareGPT", False): (16.2, 30.5),
    ("ShareGPT", True): (44.3, 66.3),
}
"""Percent of blocks that 2 and 6 samples, or beams (True), save by sharing, in the paper."""
SHARING_LOAD = 0.7
"""They arrive at this part of RATES, counted in sequences."""
MOST = 6
"""Samples and beams of the widest request."""
QUICK = Scale(
    models=(OPT_13B,),
    part=1 / 12,
    latencies=(LATENCY,),
    precision=1.12,
    widths=(2, MOST),
    block_sizes=(4, 16, 64, 256),
    has_extras=False,
)
FULL = Scale(
    models=(OPT_13B, OPT_66B, OPT_175B),
    part=1.0,
    latencies=(LATENCY, 0.1, 0.5),
    precision=1.1,
    widths=(2, 4, MOST),
    block_sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    has_extras=True,
)

Results = dict[str, Record]
"""By the label of the task."""


class Paper:
    """All tasks of a scale, and the claims that follow from their results."""

    def __init__(self, datasets: dict[str, Dataset], scale: Scale) -> None:
        """Say where requests come from."""
        self._scale = scale
        self._datasets = datasets
        self._sharegpt, self._alpaca = (
            Source(name, partial(poisson_trace, datasets[name]), first_rate, part)
            for name, first_rate, part in (("ShareGPT", 0.3, 1.0), ("Alpaca", 2.0, 1 / 4))
        )
        self._chat = Source("chat", chat_turns, part=1 / 2)
        self._chats = Source("whole chats", conversations, part=1 / 4)

    def tasks(self) -> list[Task]:
        """What is to be run, each once, roughly the longest first."""
        tasks = [Task(system, OPT_13B, self._chat) for system in (OCTAVO, ORCA_CHAT)]
        tasks += [task for num in PREFIXES for task in self._prefix_pair(num)]
        tasks += [
            Task(system, model, source)
            for model in self._scale.models
            for source in self._datasets_of_figure_12
            for system in self._systems
        ]
        tasks += [
            self._group_task(name, width, is_beam_search)
            for name, is_beam_search in SHARED
            for width in self._scale.widths
        ]
        for source in self._datasets_of_figure_12:
            tasks += [self._memory_task(system, source) for system in SYSTEMS[:4]]
            tasks += [
                self._memory_task(_with_blocks(size), source) for size in self._scale.block_sizes
            ]
        if self._scale.has_extras:
            tasks += self._extra_tasks()
        return list({task.label: task for task in tasks}.values())

    def _extra_tasks(self) -> Iterator[Task]:
        for is_beam_search in (False, True):
            yield from self._group_pair(is_beam_search)
        for system in (OCTAVO, OCTAVO_CACHED):
            yield Task(system, OPT_13B, self._chats)
        for model in (OPT_13B, OPT_175B):
            for system in (OCTAVO, ORCA_ORACLE, ORCA_MAX):
                yield Task(_without_overhead(system), model, self._brief)
        for num in PREFIXES:
            for task in self._prefix_pair(num):
                yield dataclasses.replace(task, system=_without_overhead(task.system))

    def claims(self, results: Results) -> list[Claim]:
        """Everything, in the paper's order."""
        claims = [
            *self._memory_claims(results),
            *self._curve_claims(results),
            *self._batch_claims(results),
            *self._group_claims(results),
            *self._prefix_claims(results),
            *self._chat_claims(results),
        ]
        if self._scale.has_extras:
            claims += self._cost_claims(results)
        return claims

    @property
    def _systems(self) -> tuple[System, ...]:
        """Of figure 12."""
        return SYSTEMS if self._scale.has_extras else (OCTAVO, ORCA_ORACLE, *SYSTEMS[3:])

    @property
    def _datasets_of_figure_12(self) -> tuple[Source, ...]:
        return self._sharegpt, self._alpaca

    @property
    def _brief(self) -> Source:
        """A quarter of an hour of ShareGPT."""
        return dataclasses.replace(self._sharegpt, part=1 / 4)

    # ---- Figures 2 and 13: memory and batches ----------------------------------------------------

    def _memory_task(self, system: System, source: Source) -> Task:
        source = dataclasses.replace(source, part=1 / 4)
        return Task(system, OPT_13B, source, RATES[source.name])

    def _memory_claims(self, results: Results) -> Iterator[Claim]:
        def held(system: System) -> float:
            task = self._memory_task(system, self._sharegpt)
            return float(100 * results[task.label]["shares"]["tokens"])

        for system, paper in ((ORCA_MAX, 20.4), (ORCA_POW2, 26.8), (ORCA_ORACLE, 38.2)):
            subject = f"{system.name}: slots that hold tokens"
            yield Claim("2", subject, held(system), paper, paper, unit="%")
        rate = RATES["ShareGPT"]
        yield Claim(
            "2", "Octavo: slots taken that hold tokens",
            100 - self._waste(results, self._sharegpt, 16), 96.3, 96.3, least=96, unit="%",
            others=f"{held(OCTAVO):.1f} % of the pool at {rate:g}/s",
        )  # fmt: skip
        for source, most in ((self._sharegpt, 4.0), (self._alpaca, None)):
            wastes = {size: self._waste(results, source, size) for size in self._scale.block_sizes}
            listed = ", ".join(f"{size}: {waste:.1f}" for size, waste in wastes.items())
            yield Claim(
                "2", f"Octavo, {source.name}: waste at block size 16", wastes[16],
                most=most, unit="%", others=f"by block size {listed}",
            )  # fmt: skip

    def _waste(self, results: Results, source: Source, block_size: int) -> float:
        """Percent of the slots taken that hold no token."""
        task = self._memory_task(_with_blocks(block_size), source)
        return float(100 * results[task.label]["waste"])

    def _batch_claims(self, results: Results) -> Iterator[Claim]:
        systems = (ORCA_MAX, ORCA_POW2, ORCA_ORACLE, OCTAVO)
        said = {"ShareGPT": (7.0, 9.81, 13.62, 30.42), "Alpaca": (7.0, 43.24, 72.75, 132.44)}
        for source in self._datasets_of_figure_12:
            for system, paper in zip(systems, said[source.name], strict=True):
                batched = results[self._memory_task(system, source).label]["num_batched"]
                subject = f"{source.name} at {RATES[source.name]:g}/s, {system.name}: batched"
                is_input = "an input of the cost model" if system is OCTAVO else ""
                yield Claim("13", subject, batched, paper, paper, others=is_input)

    # ---- Figure 12: latency against rate ---------------------------------------------------------

    def _curve_claims(self, results: Results) -> Iterator[Claim]:
        for model in self._scale.models:
            for source in self._datasets_of_figure_12:
                for system in self._systems[1:]:
                    pair = Task(OCTAVO, model, source), Task(system, model, source)
                    claim = self._ratio(results, "12", *pair)
                    yield self._with_paper(claim, model, source, system)

    def _with_paper(self, claim: Claim, model: Model, source: Source, system: System) -> Claim:
        """Add what the paper says of the pair, and what must be."""
        ranges = {ORCA_ORACLE: (1.7, 2.7), ORCA_MAX: (2.7, 8.0)}
        if source is self._sharegpt and system in ranges:
            low, high = ranges[system]
            least = low if model is OPT_13B else None
            return dataclasses.replace(claim, low=low, high=high, least=least)
        if system is FASTER_TRANSFORMER:
            return dataclasses.replace(claim, low=0.0, high=22.0)
        if (model, source.name, system) == (OPT_13B, "Alpaca", ORCA_ORACLE):
            return dataclasses.replace(claim, low=1.3, high=1.3, least=1.0)
        return claim

    def _ratio(self, results: Results, figure: str, ours: Task, other: Task) -> Claim:
        """How many times the other's rate ours bears at equal latency."""
        curves = [results[task.label]["curve"] for task in (ours, other)]
        rates = {at: [rate_at(curve, at) for curve in curves] for at in self._scale.latencies}
        others = "{:.2f}/s against {:.2f}/s".format(*rates[LATENCY])
        if len(rates) > 1:
            ratios = [f"{a / b:.2f} at {at:g}" for at, (a, b) in sorted(rates.items())]
            others += f"; {', '.join(ratios)} s/token"
        subject = f"{ours.model.name}, {ours.source.name}: rate over {other.system.name}"
        first, second = rates[LATENCY]
        return Claim(figure, subject, first / second, unit="x", others=others)

    # ---- Figures 14 and 15: samples and beams ----------------------------------------------------

    def _group_source(self, name: str, width: int, is_beam_search: bool) -> Source:
        kind = "beams" if is_beam_search else "samples"
        make = partial(groups, self._datasets[name], width, is_beam_search)
        return Source(f"{name}, {width} {kind}", make, first_rate=0.5, part=1 / 12)

    def _group_task(self, name: str, width: int, is_beam_search: bool) -> Task:
        source = self._group_source(name, width, is_beam_search)
        return Task(OCTAVO, OPT_13B, source, SHARING_LOAD * RATES[name] / width)

    def _group_pair(self, is_beam_search: bool) -> list[Task]:
        """Curves of ours and of Orca, for which each sequence is a request of its own."""
        source = self._group_source("Alpaca", MOST, is_beam_search)
        return [Task(system, OPT_13B, source) for system in (OCTAVO, ORCA_ORACLE)]

    def _group_claims(self, results: Results) -> Iterator[Claim]:
        for (name, is_beam_search), (low, high) in SHARED.items():
            for width in self._scale.widths:
                task = self._group_task(name, width, is_beam_search)
                record = results[task.label]
                said = {2: (low, low), MOST: (high, high)}.get(width, (low, high))
                yield Claim(
                    "14, 15", f"{task.source.name}: blocks saved", 100 * record["saved"], *said,
                    least=low if width == MOST else None, unit="%",
                    others=f"{record['copies_a_request']:.1f} blocks copied a request",
                )  # fmt: skip
        for is_beam_search in (False, True) if self._scale.has_extras else ():
            claim = self._ratio(results, "14", *self._group_pair(is_beam_search))
            said = (2.3, 2.3) if is_beam_search else (None, None)
            yield dataclasses.replace(claim, low=said[0], high=said[1])

    # ---- Figures 16 and 17: prefixes and chats ---------------------------------------------------

    def _prefix_pair(self, num_prefix: int) -> list[Task]:
        source = Source(f"prefix of {num_prefix}", partial(translations, num_prefix), 5.0, 1 / 8)
        return [Task(system, LLAMA_13B, source) for system in (OCTAVO_CACHED, ORCA_ORACLE)]

    def _prefix_claims(self, results: Results) -> Iterator[Claim]:
        for num, paper in PREFIXES.items():
            claim = self._ratio(results, "16", *self._prefix_pair(num))
            yield dataclasses.replace(claim, low=paper, high=paper, least=1.2)

    def _chat_claims(self, results: Results) -> Iterator[Claim]:
        pair = [Task(system, OPT_13B, self._chat) for system in (OCTAVO, ORCA_CHAT)]
        claim = self._ratio(results, "17", *pair)
        yield dataclasses.replace(claim, low=2.0, high=2.0, least=1.3)
        if self._scale.has_extras:
            pair = [Task(system, OPT_13B, self._chats) for system in (OCTAVO_CACHED, OCTAVO)]
            claim = self._ratio(results, "17", *pair)
            yield dataclasses.replace(claim, subject="whole chats: prefix cache over none")

    # ---- What the cost model's overhead is to the ratios -----------------------------------------

    def _cost_claims(self, results: Results) -> Iterator[Claim]:
        """The same ratios on GPUs that never wait for Python."""
        for model in (OPT_13B, OPT_175B):
            ours = Task(_without_overhead(OCTAVO), model, self._brief)
            for system in (ORCA_ORACLE, ORCA_MAX):
                other = Task(_without_overhead(system), model, self._brief)
                yield self._ratio(results, "12, no overhead", ours, other)
        for num in PREFIXES:
            pair = [
                dataclasses.replace(task, system=_without_overhead(task.system))
                for task in self._prefix_pair(num)
            ]
            yield self._ratio(results, "16, no overhead", *pair)


def _with_blocks(block_size: int) -> System:
    return dataclasses.replace(OCTAVO, block_size=block_size)


def _without_overhead(system: System) -> System:
    return dataclasses.replace(system, overhead=NO_OVERHEAD)

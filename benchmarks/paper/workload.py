"""The requests: lengths of prompts and outputs, and when they arrive.

By default lengths are drawn from the quantile tables below, which were fitted to public data and
scaled to the means that the paper states (Kwon et al. 2023, section 6.1); with a data folder they
are drawn from that data, scaled likewise. Scaling by a constant keeps the shape, and makes the unit
of the data (characters here) irrelevant. Largest distance between a table's cumulative distribution
and its data's: prompts 2.1 % (ShareGPT) and 1.2 % (Alpaca), outputs 2.7 % and 1.9 %.

| table | data | scaled by |
|---|---|---|
| ShareGPT prompts | characters of 500 first turns (sharegpt_v3_filtered_500.json.gz) | 0.460 |
| ShareGPT outputs | GeneratedTokens of Azure's chat trace (azure_llm_2023_conv.csv.gz) | 1.601 |
| Alpaca prompts, outputs | characters of 999 instructions and answers | 0.226, 0.083 |

NOTE: the sample of ShareGPT that we have holds no answers, hence the other chat trace for outputs.
Prompt and output of a request are drawn independently (in Alpaca they correlate by -0.15).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MAX_LENGTH = 2048
"""The context of OPT: prompt and output of a request together."""
PROBABILITIES = (
    0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1,
)  # fmt: skip
SHAREGPT_PROMPT = (
    2.25, 5.85, 12.1, 16.6, 23.4, 31.5, 41.5, 53.9, 75.3, 90.6, 118, 213, 454, 790, 1070, 1260,
    1550,
)  # fmt: skip
SHAREGPT_OUTPUT = (
    11.3, 25.8, 66.0, 87.0, 124, 147, 166, 208, 285, 349, 618, 644, 683, 726, 870, 968, 1610,
)  # fmt: skip
ALPACA_PROMPT = (
    3.59, 6.28, 8.08, 8.98, 10.5, 12.1, 13.7, 15.3, 17.1, 18.6, 20.0, 24.0, 30.7, 41.3, 58.8, 91.4,
    180,
)  # fmt: skip
ALPACA_OUTPUT = (
    0.201, 0.835, 2.42, 3.51, 6.43, 12.1, 22.1, 38.8, 58.1, 72.9, 89.0, 115, 144, 163, 188, 202,
    237,
)  # fmt: skip
MEANS = {"ShareGPT": (161.31, 337.99), "Alpaca": (19.31, 58.45)}
"""Mean tokens of prompts and outputs in the paper."""


class Lengths(Protocol):
    """A distribution of numbers of tokens."""

    def draw(self, rng: random.Random) -> int:
        """A number of tokens, at least 1."""


class Quantiles:
    """Lengths between given quantiles, interpolated in the logarithm."""

    def __init__(self, values: tuple[float, ...]) -> None:
        """Keep the lengths at PROBABILITIES."""
        self._logs = [math.log(value) for value in values]

    def draw(self, rng: random.Random) -> int:
        """A number of tokens, at least 1."""
        where = rng.random()
        at = bisect_right(PROBABILITIES, where) - 1
        low, high = PROBABILITIES[at : at + 2]
        part = (where - low) / (high - low)
        log = self._logs[at] * (1 - part) + self._logs[at + 1] * part
        return max(1, round(math.exp(log)))


class Sample:
    """Lengths that were seen, scaled to a mean."""

    def __init__(self, values: list[int], mean: float) -> None:
        """Keep what was seen."""
        self._values = values
        self._scale = mean * len(values) / sum(values)

    def draw(self, rng: random.Random) -> int:
        """A number of tokens, at least 1."""
        return max(1, round(rng.choice(self._values) * self._scale))


@dataclass(frozen=True)
class Dataset:
    """The lengths of a kind of requests."""

    name: str
    prompt: Lengths
    output: Lengths


@dataclass(slots=True)
class Job:
    """One request of a trace.

    Attributes:
        arrival: seconds from the start.
        tokens: the ids of its prompt and of what it will be answered; None where ids do not matter.
        shared: how many ids of a common prefix stand before those.
        width: how many samples, or beams, of that length it asks for.
    """

    arrival: float
    num_prompt: int
    num_output: int
    tokens: range | None = None
    shared: int = 0
    width: int = 1
    is_beam_search: bool = False

    def prompt_ids(self) -> list[int]:
        """The prompt."""
        if self.tokens is None:
            return [1] * self.num_prompt
        return [*range(self.shared), *self.tokens[: self.num_prompt - self.shared]]


def synthetic() -> dict[str, Dataset]:
    """The fitted distributions."""
    tables = {
        "ShareGPT": (SHAREGPT_PROMPT, SHAREGPT_OUTPUT),
        "Alpaca": (ALPACA_PROMPT, ALPACA_OUTPUT),
    }
    return {
        name: Dataset(name, *(Quantiles(table) for table in pair)) for name, pair in tables.items()
    }


def load(folder: Path) -> dict[str, Dataset]:
    """The distributions of the data in a folder with `prompts/` and `traces/`."""
    with gzip.open(folder / "prompts" / "sharegpt_v3_filtered_500.json.gz") as file:
        turns = [len(item["conversations"][0]["value"]) for item in json.load(file)]
    with gzip.open(folder / "prompts" / "alpaca_en_demo_1k.json.gz") as file:
        pairs = json.load(file)
    with gzip.open(folder / "traces" / "azure_llm_2023_conv.csv.gz") as file:
        rows = csv.DictReader(io.TextIOWrapper(file))
        answers = [int(row["GeneratedTokens"]) for row in rows]
    lengths = {
        "ShareGPT": (turns, answers),
        "Alpaca": (
            [len(pair["instruction"]) + len(pair["input"]) for pair in pairs],
            [len(pair["output"]) for pair in pairs],
        ),
    }
    return {
        name: Dataset(name, *(Sample(v, m) for v, m in zip(pair, MEANS[name], strict=True)))
        for name, pair in lengths.items()
    }


def poisson_trace(dataset: Dataset, rate: float, duration_s: float, seed: int = 1) -> list[Job]:
    """Requests that arrive independently, `rate` a second on average.

    The same seed gives the same lengths in the same order at every rate, so that curves of several
    rates and systems differ by nothing else.
    """
    rng = random.Random(seed)
    jobs: list[Job] = []
    now = rng.expovariate(1.0) / rate
    while now < duration_s:
        num_prompt = min(dataset.prompt.draw(rng), MAX_LENGTH // 2)
        num_output = min(dataset.output.draw(rng), MAX_LENGTH - num_prompt)
        jobs.append(Job(now, num_prompt, num_output))
        now += rng.expovariate(1.0) / rate
    return jobs

"""SEC-33: how soon an answer begins tells nobody what was asked under another key."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

KEYS = ("the-victims-key", "the-spys-key")
NUM_PROMPTS = 24
CRITICAL = 1.95 * (2 / NUM_PROMPTS) ** 0.5
"""Two samples of equal distribution differ more than that once in a thousand times."""


@pytest.fixture(scope="module")
def locked(start_e2e: Any, smollm2_path: Path, tmp_path_factory: Any) -> Iterator[Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS))
    return start_e2e("smollm2", "--memory", "512MiB", "--api-key-file", str(keys))


def distance(one: list[float], other: list[float]) -> float:
    """The statistic of Kolmogorov and Smirnov for two samples of equal size."""
    return max(
        abs(sum(x <= at for x in one) - sum(x <= at for x in other)) / len(one)
        for at in (*one, *other)
    )


def test_distance() -> None:
    assert distance([1, 2, 3], [1, 2, 3]) == 0
    assert distance([1, 2, 3], [4, 5, 6]) == 1
    assert distance([1, 2, 3, 4], [1, 2, 5, 6]) == 0.5


@pytest.mark.slow
def test_the_time_to_the_first_token_tells_nothing(locked: Any) -> None:
    with httpx.Client(base_url=locked.url, timeout=60) as client:

        def ask(key: str, prompt: str) -> float:
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
            began = time.perf_counter()
            answer = client.post("/v1/completions", json=body, headers={"x-api-key": key})
            took = time.perf_counter() - began
            assert answer.status_code == 200
            return took

        known, unknown, own = [], [], []
        ask(KEYS[1], "to warm up")
        for number in range(NUM_PROMPTS):
            secret, other = (f"{word} number {number} " * 60 for word in ("Secret", "Another"))
            ask(KEYS[0], secret)
            for spied in (secret, other) if number % 2 else (other, secret):
                (known if spied is secret else unknown).append(ask(KEYS[1], spied))
            own.append(ask(KEYS[1], secret))
    assert distance(own, unknown) > 0.9, "a hit shows: the test can tell"
    assert distance(known, unknown) < CRITICAL

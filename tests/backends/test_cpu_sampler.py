"""Sampling on the cpu backend against the reference, which sorts the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo.backends import cpu, reference
from octavo.graph.batch import Float32, SamplingRows, StepOutput

VOCAB = 1000


def sample_both(
    kit: Any, logits: Float32, rows: SamplingRows, isa: str
) -> tuple[StepOutput, StepOutput]:
    """One step whose logits are these, on both backends."""
    count, vocab = logits.shape
    graph = kit.graph(lambda ops: ops.select_rows(ops.input("x", vocab)))
    batch = kit.batch(
        [kit.Part(range(8), 0, count)], logits_rows=range(count), inputs={"x": logits}
    )
    options = kit.options(isa=isa, max_num_rows=64)
    actual, expected = (
        backend.compile(graph, {}, options).run(batch, rows) for backend in (cpu, reference)
    )
    return actual, expected


def random_logits(rng: np.random.Generator, rows: int, vocab: int = VOCAB) -> Float32:
    return rng.normal(0, 3, (rows, vocab)).astype(np.float32)


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "hot": {"temperature": 50.0},
    "cold": {"temperature": 0.01},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "top_k of one": {"temperature": 1.0, "top_k": 1},
    "top_k of all": {"temperature": 1.0, "top_k": 5 * VOCAB},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p of almost all": {"temperature": 2.0, "top_p": 0.9999},
    "top_p of almost none": {"temperature": 1.0, "top_p": 1e-6},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "all filters": {"temperature": 1.5, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [1, 63, 64, VOCAB])
def test_tokens(kit: Any, rng: np.random.Generator, isa: str, case: str, vocab: int) -> None:
    changes = CASES[case] | {"seed": np.arange(60), "index": 3, "position": np.arange(60) * 7}
    logits = random_logits(rng, 60, vocab)
    actual, expected = sample_both(kit, logits, kit.rows(60, **changes), isa)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)


def test_large_vocabulary(kit: Any, rng: np.random.Generator, isa: str) -> None:
    logits = random_logits(rng, 12, 50_000)
    rows = kit.rows(
        12,
        temperature=[0, 1, 1, 1, 1, 1, 0.7, 2, 1, 1, 1, 1],
        top_k=[0, 0, 50, 0, 0, 2000, 20, 0, 0, 0, 0, 0],
        top_p=[1, 1, 1, 0.95, 0.5, 0.9, 0.8, 0.99, 1, 1, 1, 1],
        min_p=[0, 0, 0, 0, 0, 0, 0, 0, 0.1, 0, 0, 0],
        seed=2**64 - 1,
        index=range(12),
        num_logprobs=5,
    )
    actual, expected = sample_both(kit, logits, rows, isa)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.top_ids, expected.top_ids)
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(actual.top_logprobs, expected.top_logprobs, atol=1e-5)


def test_noise_follows_the_distribution(kit: Any, isa: str) -> None:
    """Over many seeds, tokens come as often as softmax says (six standard deviations)."""
    probabilities = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = np.tile(np.log(probabilities).astype(np.float32), (50, 1))
    counts = np.zeros(5)
    for first in range(0, 4000, 50):
        rows = kit.rows(50, temperature=1.0, seed=np.arange(first, first + 50))
        actual, expected = sample_both(kit, logits, rows, isa)
        np.testing.assert_array_equal(actual.tokens, expected.tokens)
        counts += np.bincount(actual.tokens, minlength=5)
    deviation = np.sqrt(4000 * probabilities * (1 - probabilities))
    assert (np.abs(counts - 4000 * probabilities) < 6 * deviation).all()


def test_penalties_and_bias(kit: Any, rng: np.random.Generator, isa: str) -> None:
    """Seen tokens and biased ones, some of them both; bans; greedy and sampled rows."""
    count = 40
    seen, bias = [], []
    for _ in range(count):
        ids = rng.choice(VOCAB, 300, replace=False)
        seen.append({int(i): int(rng.integers(0, 4)) for i in ids[:200]})
        bias.append({int(i): float(rng.choice([-np.inf, 4.0, -4.0])) for i in ids[100:]})
    rows = kit.rows(
        count,
        temperature=np.arange(count) % 2,
        repetition=1.3,
        presence=0.5,
        frequency=0.25,
        seed=np.arange(count),
        seen=seen,
        bias=bias,
        num_logprobs=np.arange(count) % 4 - 1,
    )
    actual, expected = sample_both(kit, random_logits(rng, count), rows, isa)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    for s in range(count):
        wanted = int(rows.num_logprobs[s])
        if wanted < 0:
            continue
        np.testing.assert_allclose(actual.logprobs[s], expected.logprobs[s], atol=1e-5)
        np.testing.assert_array_equal(actual.top_ids[s, :wanted], expected.top_ids[s, :wanted])


def test_equals_go_to_the_lower_id(kit: Any, isa: str) -> None:
    logits = np.zeros((4, VOCAB), np.float32)
    logits[1, 500:] = 1
    logits[2] = np.repeat(np.arange(VOCAB // 4), 4)
    rows = kit.rows(4, num_logprobs=8, temperature=[0, 0, 0, 1], top_k=[0, 0, 0, 3])
    actual, expected = sample_both(kit, logits, rows, isa)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.top_ids, expected.top_ids)
    assert list(actual.tokens[:3]) == [0, 500, 996]
    assert actual.tokens[3] in (0, 1, 2)


def test_logits_that_are_not_finite(kit: Any, isa: str) -> None:
    """NaN or nothing finite: -1. Infinities beside finite ones are values like others."""
    logits = np.zeros((7, VOCAB), np.float32)
    logits[0, 999] = np.nan
    logits[1] = -np.inf
    logits[2] = np.inf
    logits[3] = np.nan
    logits[4, :-1] = -np.inf
    logits[5, 7] = np.inf
    rows = kit.rows(
        7, temperature=[0, 0, 0, 1, 1, 0, 1], bias=[{}] * 6 + [dict.fromkeys(range(VOCAB), -np.inf)]
    )
    actual, expected = sample_both(kit, logits, rows, isa)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert list(actual.tokens) == [-1, -1, -1, -1, 999, 7, -1]


def test_instruction_sets_agree_in_every_bit(kit: Any, rng: np.random.Generator, isa: str) -> None:
    logits = random_logits(rng, 20, 5000)
    rows = kit.rows(20, temperature=1.0, top_p=0.9, seed=np.arange(20), num_logprobs=4)
    actual, _ = sample_both(kit, logits, rows, isa)
    best, _ = sample_both(kit, logits, rows, "scalar")
    for name in ("tokens", "logprobs", "top_ids", "top_logprobs"):
        assert getattr(actual, name).tobytes() == getattr(best, name).tobytes()

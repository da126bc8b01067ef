"""Sampling in the reference backend against its contract, written out in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.backends.reference.sampling import empty_output, gumbel_noise, sample
from octavo.graph.batch import Bias, Filters, Noise, Penalties, SamplingRows, StepOutput

WRAP = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15

Pairs = dict[int, float]


def rows_of(*rows: dict[str, Any]) -> SamplingRows:
    """Rows from the fields that differ from plain sampling; seen and bias are dictionaries."""
    plain: dict[str, tuple[float, type]] = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "seed": (0, np.uint64),
        "index": (0, np.int32),
        "position": (0, np.int32),
        "repetition": (1.0, np.float32),
        "presence": (0.0, np.float32),
        "frequency": (0.0, np.float32),
        "num_logprobs": (-1, np.int32),
    }
    fields: dict[str, Any] = {
        name: np.array([row.get(name, value) for row in rows], dtype)
        for name, (value, dtype) in plain.items()
    }
    lists: dict[str, dict[str, Any]] = {}
    for kind, second, dtype in (("seen", "counts", np.int32), ("bias", "values", np.float32)):
        pairs = [row.get(kind, {}) for row in rows]
        lists[kind] = {
            "start": np.cumsum([0, *map(len, pairs)]).astype(np.int32),
            "token_ids": np.array([i for p in pairs for i in p], np.int32),
            second: np.array([v for p in pairs for v in p.values()], dtype),
        }
    return SamplingRows(
        filters=Filters(**{n: fields[n] for n in ("temperature", "top_k", "top_p", "min_p")}),
        noise=Noise(**{n: fields[n] for n in ("seed", "index", "position")}),
        penalties=Penalties(
            **{n: fields[n] for n in ("repetition", "presence", "frequency")}, **lists["seen"]
        ),
        bias=Bias(**lists["bias"]),
        num_logprobs=fields["num_logprobs"],
    )


def sample_one(logits: list[float], **row: Any) -> StepOutput:
    return sample(np.array([logits], np.float32), rows_of(row))


def token_of(logits: list[float], **row: Any) -> int:
    return int(sample_one(logits, **row).tokens[0])


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WRAP
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WRAP
    return z ^ z >> 31


@given(
    st.integers(0, WRAP), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(1, 50)
)
def test_noise_is_the_contracts(seed: int, index: int, position: int, vocab: int) -> None:
    key = mix(mix(mix((seed + GOLDEN) & WRAP) ^ index) ^ (position + GOLDEN & WRAP))
    for token, noise in enumerate(gumbel_noise(seed, index, position, vocab)):
        u = ((mix((key + GOLDEN * (token + 1)) & WRAP) >> 40) + 0.5) / 2**24
        assert noise == np.float32(-math.log(-math.log(u)))


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert token_of([1, 3, 3, 2], temperature=0) == 1
    assert token_of([-math.inf, -5, -math.inf], temperature=0) == 1


def test_rows_without_a_finite_logit_are_told() -> None:
    nan, inf = math.nan, math.inf
    for logits in ([1, nan, 2], [-inf, -inf, -inf], [inf, inf, inf]):
        for temperature in (0, 1):
            assert token_of(logits, temperature=temperature) == -1
    banned = dict.fromkeys(range(3), -inf)
    assert token_of([1.0, 2.0, 3.0], bias=banned) == -1
    assert token_of([1, inf, 2]) == 1


def test_bias_and_penalties() -> None:
    logits = [2.0, -1.0, 1.9, 0.0]
    assert token_of(logits, temperature=0, bias={3: 2.5}) == 3
    assert token_of(logits, temperature=0, bias={0: -math.inf}) == 2
    assert token_of(logits, temperature=0, repetition=1.1, seen={0: 0}) == 2
    assert token_of(logits, temperature=0, presence=0.2, seen={0: 0}) == 0, "not in the output"
    assert token_of(logits, temperature=0, presence=0.2, seen={0: 1}) == 2
    assert token_of(logits, temperature=0, frequency=0.04, seen={0: 2}) == 0
    assert token_of(logits, temperature=0, frequency=0.04, seen={0: 3}) == 2
    negative = [-1.0, -1.1]
    assert token_of(negative, temperature=0, repetition=1.5, seen={0: 0}) == 1
    # Bias comes before the penalties: -1 + 2 is positive, and divided.
    assert token_of([-1.0, 0.6], temperature=0, repetition=2.0, seen={0: 0}, bias={0: 2.0}) == 1


def naive_choice(logits: np.ndarray, row: dict[str, Any]) -> tuple[int, set[int]]:
    """The token, and those that the filters leave, by sorting Python lists."""
    z = [np.float32(x) / np.float32(row["temperature"]) for x in logits]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if row["top_k"]:
        order = order[: row["top_k"]]
    weights = {i: math.exp(float(z[i]) - float(z[order[0]])) for i in order}
    total, reached, kept = sum(weights.values()), 0.0, []
    for i in order:
        if row["top_p"] < 1 and reached >= float(np.float32(row["top_p"])) * total:
            break
        kept.append(i)
        reached += weights[i]
    left = {i for i in kept if weights[i] >= float(np.float32(row["min_p"]))} | {order[0]}
    noise = gumbel_noise(row["seed"], row["index"], row["position"], len(z))
    return min(left, key=lambda i: (-(z[i] + noise[i]), i)), left


@given(
    st.integers(0, 2**32 - 1),
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 1.0, 2.5]),
            "top_k": st.integers(0, 12),
            "top_p": st.sampled_from([0.1, 0.5, 0.93, 1.0]),
            "min_p": st.sampled_from([0.0, 0.05, 0.7]),
            "seed": st.integers(0, WRAP),
            "index": st.integers(0, 3),
            "position": st.integers(0, 1000),
        }
    ),
)
def test_filters_and_noise(seed: int, row: dict[str, Any]) -> None:
    # Few distinct values, so that equals are common.
    logits = np.random.default_rng(seed).integers(-6, 7, 10).astype(np.float32) / 2
    expected, left = naive_choice(logits, row)
    got = token_of(logits.tolist(), **row)
    assert got in left
    assert got == expected


def test_samples_follow_the_distribution() -> None:
    """Each position draws afresh: frequencies come within five standard deviations of softmax."""
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5], np.float32)
    count = 20_000
    rows = rows_of(*({"temperature": 0.8, "position": p, "seed": 7} for p in range(count)))
    tokens = sample(np.tile(logits, (count, 1)), rows).tokens
    expected = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    found = np.bincount(tokens, minlength=5) / count
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_seed_index_and_position_all_matter() -> None:
    noises = {
        tuple(gumbel_noise(seed, index, position, 8).tolist())
        for seed in (0, 1)
        for index in (0, 1)
        for position in (0, 1)
    }
    assert len(noises) == 8


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = [0.0, 2.0, 2.0, 1.0]
    log_softmax = [x - math.log(sum(math.exp(y) for y in logits)) for x in logits]
    out = sample(
        np.array([logits] * 3, np.float32),
        rows_of(
            {"temperature": 0, "num_logprobs": 3, "bias": {3: 100.0}},
            {"temperature": 0, "num_logprobs": 0},
            {"temperature": 0, "num_logprobs": 1},
        ),
    )
    assert out.tokens.tolist() == [3, 1, 1]
    expected = [log_softmax[t] for t in (3, 1, 1)]
    np.testing.assert_allclose(out.logprobs, expected, rtol=1e-6)
    assert out.top_ids.shape == (3, 3)
    assert out.top_ids[0].tolist() == [1, 2, 3]
    np.testing.assert_allclose(out.top_logprobs[0], [log_softmax[i] for i in (1, 2, 3)], rtol=1e-6)
    assert out.top_ids[2, 0] == 1
    assert out.top_logprobs[2, 0] == pytest.approx(log_softmax[1])


def test_empty_output() -> None:
    out = empty_output()
    assert out.tokens.size == out.logprobs.size == out.top_ids.size == out.top_logprobs.size == 0

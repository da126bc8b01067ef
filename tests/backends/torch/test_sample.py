"""Sampling on the torch backend against the reference, which sorts the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from octavo.backends.reference.sampling import gumbel_noise
from octavo.backends.reference.sampling import sample as expected_sample
from octavo.backends.torch.arrays import Staging, put_rows
from octavo.backends.torch.kernels import SampleArrays, Sampled
from octavo.backends.torch.plain import sample as plain
from octavo.backends.torch.triton import sample as fast
from octavo.backends.torch.triton import sample_filters, sample_parts
from octavo.graph.batch import Float32, SamplingRows, StepOutput

Sample = Callable[[torch.Tensor, SampleArrays], Sampled]
VOCAB = 1000


@pytest.fixture(params=["plain", "triton"])
def sample(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """Both implementations; tiles are smaller than on a device, where the interpreter is slow."""
    monkeypatch.setattr(fast, "TILE", 1024)
    monkeypatch.setattr(sample_filters, "TILE", 1024)
    monkeypatch.setattr(sample_filters, "CHUNK", 512)
    return {"plain": plain.sample, "triton": fast.sample}[request.param]


def arrays(rows: SamplingRows) -> SampleArrays:
    """The rows as a Program brings them to its device."""
    return put_rows(Staging(torch.device("cpu")), rows)


def sample_both(
    sample: Sample, logits: Float32, rows: SamplingRows
) -> tuple[StepOutput, StepOutput]:
    found = sample(torch.from_numpy(logits.copy()), arrays(rows))
    assert [x.dtype for x in found] == [torch.int32, torch.float32] * 2
    tokens, logprobs, top_ids, top_logprobs = (x.numpy() for x in found)
    actual = StepOutput(
        tokens=tokens, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs
    )
    return actual, expected_sample(logits, rows)


def assert_logprobs(actual: StepOutput, expected: StepOutput, rows: SamplingRows) -> None:
    """What each row asked for."""
    assert actual.top_ids.shape == actual.top_logprobs.shape == expected.top_ids.shape
    for s, wanted in enumerate(rows.num_logprobs.tolist()):
        if wanted < 0 or expected.tokens[s] < 0:
            continue
        np.testing.assert_allclose(actual.logprobs[s], expected.logprobs[s], atol=1e-5)
        top = np.s_[s, :wanted]
        np.testing.assert_array_equal(actual.top_ids[top], expected.top_ids[top])
        np.testing.assert_allclose(actual.top_logprobs[top], expected.top_logprobs[top], atol=1e-5)


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
    "top_p of hot": {"temperature": 50.0, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "min_p of one": {"temperature": 1.0, "min_p": 1.0},
    "all filters": {"temperature": 1.5, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
    "top_p of a top_k that min_p cuts": {
        "temperature": 1.0,
        "top_k": 300,
        "top_p": 0.5,
        "min_p": 0.2,
    },
    "greedy with filters": {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
}


@pytest.mark.parametrize("vocab", [1, VOCAB])
def test_tokens(kit: Any, rng: np.random.Generator, sample: Sample, vocab: int) -> None:
    """Each case in rows of its own, beside the others in one step."""
    names = ("temperature", "top_k", "top_p", "min_p")
    default = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    cases = [default | case for case in CASES.values()]
    count = len(cases)
    changes = {name: [case[name] for case in cases] for name in names}
    rows = kit.rows(count, **changes, seed=np.arange(count), index=3, position=np.arange(count) * 7)
    actual, expected = sample_both(sample, random_logits(rng, count, vocab), rows)
    found = dict(zip(CASES, actual.tokens.tolist(), strict=True))
    assert found == dict(zip(CASES, expected.tokens.tolist(), strict=True))


@pytest.mark.parametrize("has_filters", [False, True])
def test_large_vocabulary(
    kit: Any, rng: np.random.Generator, sample: Sample, has_filters: bool
) -> None:
    """Of more than one tile, with a remainder; without any filter there is a shorter way."""
    filters = {
        "top_k": [0, 0, 50, 0, 0, 2000],
        "top_p": [1, 1, 1, 0.95, 0.5, 0.9],
        "min_p": [0, 0.1, 0, 0, 0, 0],
    }
    rows = kit.rows(
        6,
        temperature=[0, 1, 1, 1, 0.7, 2],
        seed=2**64 - 1,
        index=range(6),
        num_logprobs=5,
        **(filters if has_filters else {}),
    )
    actual, expected = sample_both(sample, random_logits(rng, 6, 2_501), rows)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert_logprobs(actual, expected, rows)


def test_more_candidates_than_are_listed(
    kit: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_filters, "LISTED", 20)
    rows = kit.rows(
        4,
        temperature=1.0,
        top_k=[100, 0, 0, 5],
        top_p=[0.9, 0.99, 1.0, 1.0],
        min_p=[0.0, 0.0, 0.001, 0.0],
        seed=range(4),
    )
    actual, expected = sample_both(fast.sample, random_logits(rng, 4, 3000), rows)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)


def test_noise_follows_the_distribution(kit: Any) -> None:
    """Over many seeds, tokens come as often as softmax says (six standard deviations)."""
    probabilities = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = np.tile(np.log(probabilities).astype(np.float32), (4000, 1))
    rows = kit.rows(4000, temperature=1.0, seed=np.arange(4000))
    actual, expected = sample_both(plain.sample, logits, rows)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    counts = np.bincount(actual.tokens, minlength=5)
    deviation = np.sqrt(4000 * probabilities * (1 - probabilities))
    assert (np.abs(counts - 4000 * probabilities) < 6 * deviation).all()


def test_noise_to_the_last_bit(kit: Any) -> None:
    rows = kit.rows(2, seed=[5, 2**64 - 3], index=[0, 9], position=[0, 2**31 - 1])
    actual = plain.gumbel_noise(arrays(rows), 5000).numpy()
    expected = [gumbel_noise(5, 0, 0, 5000), gumbel_noise(2**64 - 3, 9, 2**31 - 1, 5000)]
    np.testing.assert_allclose(actual, expected, rtol=1.3e-7)
    assert np.mean(actual != expected) < 1e-3


@triton.jit
def both_noises(keys, rough, exact, size: tl.constexpr):
    ids = tl.arange(0, size)
    key = tl.load(keys).to(tl.uint64)
    tl.store(rough + ids, sample_parts.fast_noise(key, ids))
    tl.store(exact + ids, sample_parts.noise(key, ids))


def test_fast_noise_is_near() -> None:
    """Nearer than half of the margin within which tokens are looked at exactly."""
    size = 2**16
    rough, exact = torch.empty((2, size))
    both_noises[(1,)](torch.tensor([12345]), rough, exact, size=size)
    assert exact.max() > 9  # of a u near 1, which needs the series
    assert exact.min() < -2
    torch.testing.assert_close(rough, exact, atol=5e-6, rtol=0)


def test_penalties_and_bias(kit: Any, rng: np.random.Generator, sample: Sample) -> None:
    """Seen tokens and biased ones, some of them both; bans; greedy and sampled rows."""
    count = 12
    seen, bias = [], []
    for _ in range(count):
        ids = rng.choice(VOCAB, 300, replace=False)
        seen.append({int(i): int(rng.integers(0, 4)) for i in ids[:200]})
        bias.append({int(i): float(rng.choice([-np.inf, 4.0, -4.0])) for i in ids[100:]})
    seen[3], bias[4] = {}, {}
    rows = kit.rows(
        count,
        temperature=np.arange(count) % 2,
        repetition=1.3,
        presence=0.5,
        frequency=0.3,
        seed=np.arange(count),
        seen=seen,
        bias=bias,
        num_logprobs=np.arange(count) % 4 - 1,
    )
    actual, expected = sample_both(sample, random_logits(rng, count), rows)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert_logprobs(actual, expected, rows)


def test_equals_go_to_the_lower_id(kit: Any, sample: Sample) -> None:
    logits = np.zeros((6, VOCAB), np.float32)
    logits[1, 500:] = 1
    logits[2] = np.repeat(np.arange(VOCAB // 4), 4)
    logits[4:, ::2] = -0.0
    rows = kit.rows(
        6,
        num_logprobs=8,
        temperature=[0, 0, 0, 1, 1, 1],
        top_k=[0, 0, 0, 3, 3, 0],
        top_p=[1, 1, 1, 1, 1, 0.0025],
    )
    actual, expected = sample_both(sample, logits, rows)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert_logprobs(actual, expected, rows)
    assert list(actual.tokens[:3]) == [0, 500, 996]
    assert set(actual.tokens[3:]) <= {0, 1, 2}


def test_more_logprobs_than_tokens(kit: Any, rng: np.random.Generator, sample: Sample) -> None:
    rows = kit.rows(2, num_logprobs=[20, 3])
    actual, expected = sample_both(sample, random_logits(rng, 2, 5), rows)
    np.testing.assert_array_equal(actual.top_ids[0, :5], expected.top_ids[0, :5])
    np.testing.assert_allclose(actual.top_logprobs[0, :5], expected.top_logprobs[0, :5], atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 2])
def test_logits_that_are_not_finite(kit: Any, sample: Sample, top_k: int) -> None:
    """NaN or nothing finite: -1. Infinities beside finite ones are values like others."""
    logits = np.zeros((10, VOCAB), np.float32)
    logits[0, 999] = np.nan
    logits[1] = -np.inf
    logits[2] = np.inf
    logits[3] = np.nan
    logits[4, :-1] = -np.inf
    logits[5, 7] = np.inf
    logits[7, [7, 9]] = np.inf
    logits[8, 999] = -np.nan
    logits[9, 1:] = -np.inf
    rows = kit.rows(
        10,
        temperature=[0, 0, 0, 1, 1, 0, 1, 1, 1, 1],
        top_k=top_k,
        bias=[{}] * 6 + [dict.fromkeys(range(VOCAB), -np.inf)] + [{}] * 3,
    )
    actual, expected = sample_both(sample, logits, rows)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert list(actual.tokens) == [-1, -1, -1, -1, 999, 7, -1, 7, -1, 0]


def test_a_row_depends_on_no_other(kit: Any, rng: np.random.Generator, sample: Sample) -> None:
    """Alone or beside rows that are sampled otherwise: the same bits."""
    logits = random_logits(rng, 4)
    changes = {
        "temperature": [1.0, 0.0, 0.8, 1.0],
        "top_k": [0, 0, 20, 0],
        "top_p": [1.0, 1.0, 0.9, 0.7],
        "seed": [1, 2, 3, 4],
        "seen": [{}, {5: 1}, {}, {7: 2}],
        "presence": [0.0, 0.5, 0.0, 0.5],
        "num_logprobs": [-1, 3, 0, 5],
    }
    whole = sample(torch.from_numpy(logits.copy()), arrays(kit.rows(4, **changes)))
    for s in range(4):
        own = {name: values[s : s + 1] for name, values in changes.items()}
        alone = sample(torch.from_numpy(logits[s : s + 1].copy()), arrays(kit.rows(1, **own)))
        assert alone.tokens[0] == whole.tokens[s]
        wanted = changes["num_logprobs"][s]
        if wanted >= 0:
            assert torch.equal(alone.logprobs[0], whole.logprobs[s])
            assert torch.equal(alone.top_logprobs[0], whole.top_logprobs[s, :wanted])


def test_no_rows(kit: Any, sample: Sample) -> None:
    found = sample(torch.zeros((0, VOCAB)), arrays(kit.rows(0)))
    assert [tuple(x.shape) for x in found] == [(0,), (0,), (0, 0), (0, 0)]

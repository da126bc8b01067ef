"""Part A: sampling against the reference in numpy, which sorts the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from octavo.backends.reference.sampling import sample as exact_sample
from octavo.backends.torch.arrays import Staging, put_rows
from octavo.backends.torch.kernels import Kernels, Sampled
from octavo.backends.torch.tables import choose_kernels
from octavo.graph.batch import Float32, SamplingRows
from parts.check import Checks, unlike
from parts.machine import Setup
from parts.record import Recorder
from parts.steps import sampling_rows

FILTERS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 50.0},
    {"temperature": 0.01},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 10**6},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 2.0, "top_p": 0.9999},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.5, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.5, "min_p": 0.2},
    {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
)


def run(setup: Setup, recorder: Recorder) -> None:
    """Tokens of all filters, edits, log probabilities, ends, and a row alone."""
    checks = Checks(setup, recorder, "Sampling")
    kernels = choose_kernels(setup.table, setup.device)
    sizes = (1, 63, 1000) if setup.quick else (1, 63, 1000, 32000, 128256)
    for vocabulary in sizes:
        checks.add(f"filters, {vocabulary} tokens", lambda v=vocabulary: filters(setup, kernels, v))
    for vocabulary in sizes[2:]:
        checks.add(f"edits, {vocabulary} tokens", lambda v=vocabulary: edits(setup, kernels, v))
        checks.add(f"a row alone, {vocabulary}", lambda v=vocabulary: alone(setup, kernels, v))
        checks.add(f"many rows, {vocabulary}", lambda v=vocabulary: many(setup, kernels, v))
    checks.add("not finite, and equals", lambda: ends(setup, kernels))


def logits_of(rows: int, vocabulary: int, seed: int = 11) -> Float32:
    """Random ones, without equals of note."""
    values = np.random.default_rng(seed).normal(0, 3, (rows, vocabulary))
    return values.astype(np.float32)


def sample(setup: Setup, kernels: Kernels, logits: Float32, rows: SamplingRows) -> Sampled:
    """On the device."""
    there = torch.from_numpy(logits.copy()).to(setup.device)
    return kernels.sample(there, put_rows(Staging(setup.device), rows))


def beside(setup: Setup, kernels: Kernels, logits: Float32, rows: SamplingRows) -> float:
    """Tokens to the id; log probabilities to 2e-5."""
    found = Sampled(*(value.cpu() for value in sample(setup, kernels, logits, rows)))
    with np.errstate(all="ignore"):
        expected = exact_sample(logits, rows)
    if not np.array_equal(found.tokens.numpy(), expected.tokens):
        return float("inf")
    worst = 0.0
    for s, wanted in enumerate(rows.num_logprobs.tolist()):
        if wanted < 0 or expected.tokens[s] < 0:
            continue
        wanted = min(wanted, logits.shape[1])
        worst = max(worst, abs(float(found.logprobs[s]) - float(expected.logprobs[s])) / 2e-5)
        if not np.array_equal(found.top_ids[s, :wanted].numpy(), expected.top_ids[s, :wanted]):
            return float("inf")
        off = found.top_logprobs[s, :wanted].numpy() - expected.top_logprobs[s, :wanted]
        worst = max(worst, float(np.abs(off).max(initial=0)) / 2e-5)
    return worst


def filters(setup: Setup, kernels: Kernels, vocabulary: int) -> float:
    """Each in a row of its own."""
    count = len(FILTERS)
    names = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    changes: dict[str, Any] = {
        name: [case.get(name, default) for case in FILTERS] for name, default in names.items()
    }
    rows = sampling_rows(
        count,
        **changes,
        seed=np.arange(count, dtype=np.uint64) + np.uint64(2**63),
        index=3,
        position=np.arange(count) * 7,
        num_logprobs=np.arange(count) % 7 - 1,
    )
    return beside(setup, kernels, logits_of(count, vocabulary), rows)


def edits(setup: Setup, kernels: Kernels, vocabulary: int) -> float:
    """Penalties, biases and bans, some tokens with several."""
    count, rng = 8, np.random.default_rng(4)
    seen, bias = [], []
    for _ in range(count):
        ids = rng.choice(vocabulary, 300, replace=False)
        seen.append({int(i): int(rng.integers(0, 4)) for i in ids[:200]})
        bias.append({int(i): float(rng.choice([-np.inf, 4.0, -4.0])) for i in ids[100:]})
    seen[3], bias[4] = {}, {}
    rows = sampling_rows(
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
    return beside(setup, kernels, logits_of(count, vocabulary), rows)


def many(setup: Setup, kernels: Kernels, vocabulary: int) -> float:
    """More rows than fit a wave of programs."""
    count = 20 if setup.quick else 160
    rows = sampling_rows(
        count,
        temperature=np.arange(count) % 3 / 2,
        top_p=np.where(np.arange(count) % 5 == 0, 0.9, 1.0),
        seed=np.arange(count),
    )
    return beside(setup, kernels, logits_of(count, vocabulary), rows)


def alone(setup: Setup, kernels: Kernels, vocabulary: int) -> float:
    """A row's bytes do not depend on how the others are sampled."""
    logits = logits_of(4, vocabulary)
    changes: dict[str, list[Any]] = {
        "temperature": [1.0, 0.0, 0.8, 1.0],
        "top_k": [0, 0, 20, 0],
        "top_p": [1.0, 1.0, 0.9, 0.7],
        "seed": [1, 2, 3, 4],
        "seen": [{}, {5: 1}, {}, {7: 2}],
        "presence": [0.0, 0.5, 0.0, 0.5],
        "num_logprobs": [-1, 3, 0, 5],
    }
    whole = sample(setup, kernels, logits, sampling_rows(4, **changes))
    worst = 0.0
    for s in range(4):
        own = {name: values[s : s + 1] for name, values in changes.items()}
        one = sample(setup, kernels, logits[s : s + 1], sampling_rows(1, **own))
        worst = max(worst, unlike(one.tokens, whole.tokens[s : s + 1]))
        wanted = changes["num_logprobs"][s]
        if wanted >= 0:
            worst = max(worst, unlike(one.logprobs, whole.logprobs[s : s + 1]))
            mine = whole.top_logprobs[s : s + 1, :wanted]
            worst = max(worst, unlike(one.top_logprobs, mine))
    return worst


def ends(setup: Setup, kernels: Kernels) -> float:
    """NaN or nothing finite is -1; of equals the lower id."""
    vocabulary = 1000
    logits = np.zeros((9, vocabulary), np.float32)
    logits[0, 999] = np.nan
    logits[1] = -np.inf
    logits[2] = np.inf
    logits[3, :-1] = -np.inf
    logits[4, 7] = np.inf
    logits[5, 500:] = 1
    logits[6] = np.repeat(np.arange(vocabulary // 4), 4)
    logits[7, ::2] = -0.0
    rows = sampling_rows(
        9, temperature=[0, 0, 0, 1, 0, 0, 0, 1, 1], top_k=[0, 0, 0, 0, 0, 0, 0, 3, 0], seed=9
    )
    return beside(setup, kernels, logits, rows)

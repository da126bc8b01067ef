"""The angles against the tensors that transformers computes, to one unit in the last place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from octavo.models.rope import FrequencyDivisors, LinearScaling, Llama3Scaling, RopeConfig


def oracle(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


def assert_equal_to_one_ulp(ours: tuple[float, ...], expected: np.ndarray) -> None:
    assert all(f == float(np.float32(f)) for f in ours), "not float32 values"
    np.testing.assert_array_max_ulp(np.array(ours, np.float32), expected, maxulp=1)


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_plain_and_linear(theta: float, head_dim: int) -> None:
    plain = RopeConfig(theta).inv_freq(head_dim)
    assert len(plain) == head_dim // 2
    assert plain[0] == 1.0
    assert_equal_to_one_ulp(plain, oracle(theta, head_dim, {"rope_type": "default"}))
    linear = RopeConfig(theta, LinearScaling(2.5)).inv_freq(head_dim)
    expected = oracle(theta, head_dim, {"rope_type": "linear", "factor": 2.5})
    assert_equal_to_one_ulp(linear, expected)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (3.3, 0.7, 9.0, 1000)],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3(factor: float, low: float, high: float, original: int, head_dim: int) -> None:
    scaling = Llama3Scaling(factor, low, high, original)
    ours = RopeConfig(500000.0, scaling).inv_freq(head_dim)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    values = dict(zip(names, (factor, low, high, original), strict=True))
    expected = oracle(500000.0, head_dim, {"rope_type": "llama3", **values})
    np.testing.assert_allclose(ours, expected, rtol=3e-7, atol=0)
    plain = RopeConfig(500000.0).inv_freq(head_dim)
    kept = sum(a == b for a, b in zip(ours, plain, strict=True))
    stretched = sum(a * factor == pytest.approx(b) for a, b in zip(ours, plain, strict=True))
    assert kept and stretched and kept + stretched < len(ours), "all three branches are taken"


def test_divisors_of_a_gguf_divide() -> None:
    ours = RopeConfig(10000.0, FrequencyDivisors((1.0, 2.0, 4.0, 8.0))).inv_freq(8)
    plain = RopeConfig(10000.0).inv_freq(8)
    assert ours == tuple(float(np.float32(f / d)) for f, d in zip(plain, (1, 2, 4, 8), strict=True))

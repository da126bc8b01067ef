"""Every architecture with small random weights against transformers: logits and greedy text.

The recipe for a new architecture: add a case here (docs/add-a-model.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA, QWEN2, MISTRAL = "LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped": (LLAMA, {}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True}),
    "llama-every-head-its-own": (LLAMA, {"num_key_value_heads": 4}),
    "llama-one-kv-head": (LLAMA, {"num_key_value_heads": 1}),
    "llama-numbers": (
        LLAMA,
        {
            "head_dim": 32,
            "rms_norm_eps": 0.05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "llama-biases": (LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": (LLAMA, {"rope_parameters": LLAMA3}),
    "llama-linear": (
        LLAMA,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": (MISTRAL, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (QWEN2, {}),
    "qwen2-tied": (QWEN2, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
}

# |logits| reach about 10. The CPU backend keeps K and V in float16.
TOLERANCES = {"reference": 1e-4, "cpu": 3e-2}
BACKENDS = {"reference": {"cache_dtype": "f32"}, "cpu": {}}


def make_oracle(case: str, seed: int = 5) -> Any:
    """A model of transformers with random weights large enough that every part of it matters."""
    architecture, changes = CASES[case]
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    torch.manual_seed(seed)
    oracle = getattr(transformers, architecture)(config_class(**(SIZES | changes))).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return oracle


def oracle_logits(oracle: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return oracle(torch.tensor([ids])).logits[0].numpy()


def random_ids(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(2, SIZES["vocab_size"], count).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text(
    case: str, backend: str, quality: ModuleType, tmp_path: Path
) -> None:
    oracle = make_oracle(case)
    oracle.save_pretrained(tmp_path)
    model, weights = quality.load(tmp_path)
    assert model.num_parameters == sum(p.numel() for p in oracle.parameters())
    stream = quality.Stream.compile(
        backend, model, weights, max_len=256, num_sequences=3, **BACKENDS[backend]
    )

    # Three sequences of different lengths; the first and the second go on in a second step.
    ids = [random_ids(n, seed=n) for n in (100, 37, 1)]
    first = stream.logits([(0, ids[0][:70]), (0, ids[1][:17]), (0, ids[2])])
    second = stream.logits([(70, ids[0][70:]), (17, ids[1][17:])])
    ours = [
        np.concatenate([first[:70], second[:30]]),
        np.concatenate([first[70:87], second[30:]]),
        first[87:],
    ]
    for sequence, logits in zip(ids, ours, strict=True):
        expected = oracle_logits(oracle, sequence)
        assert np.abs(expected).max() > 3, "random weights too small to show a difference"
        np.testing.assert_allclose(logits, expected, atol=TOLERANCES[backend], rtol=0)

    assert_greedy_follows(stream.greedy([ids[1]], 40)[0], ids[1], oracle, TOLERANCES[backend])


def assert_greedy_follows(
    answer: list[int], prompt: list[int], oracle: Any, tolerance: float
) -> None:
    """Every token is the oracle's best after those before it, up to the first numerical tie."""
    logits = oracle_logits(oracle, prompt + answer)[len(prompt) - 1 :]
    for token, row in zip(answer, logits, strict=False):
        if token != row.argmax():
            assert row.max() - row[token] < 2 * tolerance
            return


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folder(dtype: torch.dtype, quality: ModuleType, tmp_path: Path) -> None:
    make_oracle("qwen2").to(dtype).save_pretrained(tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, weights = quality.load(tmp_path)
    stream = quality.Stream.compile("reference", model, weights, max_len=64, cache_dtype="f32")
    ids = random_ids(50)
    expected = oracle_logits(oracle, ids)
    np.testing.assert_allclose(stream.logits([(0, ids)]), expected, atol=1e-4, rtol=0)


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them: partners of a rotation side by side."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def in_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as the converter leaves them for every other architecture."""
    return weight


def write_gguf(
    path: Path, oracle: Any, architecture: str, reorder: Callable[..., np.ndarray]
) -> None:
    """The oracle's weights as a GGUF file, named and keyed as llama.cpp's converter does."""
    config = oracle.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if config.rope_parameters["rope_type"] == "llama3":
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = np.arange(0, head_dim, 2) / head_dim
        plain = config.rope_parameters["rope_theta"] ** -exponents
        scaled = oracle.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, parameter in oracle.named_parameters():
        module, _, part = name.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        data = parameter.detach().numpy()
        if module.endswith("q_proj"):
            data = reorder(data, config.num_attention_heads)
        elif module.endswith("k_proj"):
            data = reorder(data, config.num_key_value_heads)
        writer.add_tensor(f"{prefix}{names[module]}.{part}", np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_CASES = [
    ("llama-grouped", "llama", interleaved),
    ("llama-tied", "llama", interleaved),
    ("llama-biases", "llama", interleaved),
    ("llama-llama3", "llama", interleaved),
    ("qwen2", "qwen2", in_order),
    ("qwen2-tied", "qwen2", in_order),
]


@pytest.mark.parametrize(("case", "architecture", "reorder"), GGUF_CASES)
def test_gguf_logits(
    case: str,
    architecture: str,
    reorder: Callable[..., np.ndarray],
    quality: ModuleType,
    tmp_path: Path,
) -> None:
    oracle = make_oracle(case)
    write_gguf(tmp_path / "tiny.gguf", oracle, architecture, reorder)
    model, weights = quality.load(tmp_path / "tiny.gguf")
    assert model.architecture == CASES[case][0]
    assert model.num_parameters == sum(p.numel() for p in oracle.parameters())
    stream = quality.Stream.compile("reference", model, weights, max_len=128, cache_dtype="f32")
    ids = random_ids(100)
    expected = oracle_logits(oracle, ids)
    np.testing.assert_allclose(stream.logits([(0, ids)]), expected, atol=1e-4, rtol=0)


def test_mistral_window_cuts_the_context(quality: ModuleType, tmp_path: Path) -> None:
    """Up to its window the model is exact; the registry lets no longer context through."""
    CASES["mistral-window"] = (MISTRAL, {"sliding_window": 40})
    try:
        oracle = make_oracle("mistral-window")
    finally:
        del CASES["mistral-window"]
    oracle.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == 40
    model, weights = quality.load(tmp_path)
    assert model.max_position_embeddings == 40
    assert "40" in model.config.context_note
    stream = quality.Stream.compile("reference", model, weights, max_len=64, cache_dtype="f32")
    ids = random_ids(60)
    expected, ours = oracle_logits(oracle, ids), stream.logits([(0, ids)])
    np.testing.assert_allclose(ours[:40], expected[:40], atol=1e-4, rtol=0)
    assert np.abs(ours[41:] - expected[41:]).max() > 0.1, "the cap would be needless"

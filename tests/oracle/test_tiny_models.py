"""Every architecture with small random weights against transformers: logits and greedy text.

The recipe for a new architecture: add a case here (docs/add-a-model.md).
"""

from __future__ import annotations

import functools
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
GEMMA3 = "Gemma3ForCausalLM"
GEMMA3_SIZES: dict[str, Any] = {
    "tie_word_embeddings": True,
    "head_dim": 32,
    "sliding_window": 20,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 3e4, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 400.0},
    },
}
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
    "mistral-window": (MISTRAL, {"sliding_window": 20}),
    "qwen2": (QWEN2, {}),
    "qwen2-windows": (
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen2-tied": (QWEN2, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "gemma3": (GEMMA3, GEMMA3_SIZES),
    "gemma3-untied": (GEMMA3, {**GEMMA3_SIZES, "tie_word_embeddings": False, "head_dim": 16}),
    "gemma3-defaults": (  # what a GGUF file leaves out
        GEMMA3,
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 7,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 20,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 3e4, "factor": 8.0}
            },
        },
    ),
    "gemma3-soft-cap": (GEMMA3, {**GEMMA3_SIZES, "attn_logit_softcapping": 2.0}),
}

# |logits| reach about 10. The CPU backend keeps K and V in float16.
TOLERANCES = {"reference": 1e-4, "cpu": 3e-2, "torch": 1e-4}
BACKENDS = {
    "reference": {"cache_dtype": "fp32"},
    "cpu": {},
    "torch": {"cache_dtype": "fp32", "num_threads": 1},
}


def make_oracle(case: str, seed: int = 5) -> Any:
    """A model of transformers with random weights large enough that every part of it matters."""
    architecture, changes = CASES[case]
    config_class = getattr(transformers, architecture).config_class
    torch.manual_seed(seed)
    config = config_class(**(SIZES | changes), attn_implementation="eager")
    oracle = getattr(transformers, architecture)(config).eval()
    soft_cap = getattr(config, "attn_logit_softcapping", None)
    if soft_cap is not None:  # Gemma 3 of transformers does not hand its setting to the attention
        oracle.forward = functools.partial(oracle.forward, softcap=soft_cap)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name and architecture == GEMMA3:
                parameter.uniform_(-0.5, 0.5)  # it adds 1
            elif "norm" in name:
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
    stream = quality.Stream.compile("reference", model, weights, max_len=64, cache_dtype="fp32")
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
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gemma3":
        add_gemma3_keys(writer, config)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "llama3":
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
    if architecture == "gemma3":
        names |= {
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
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
        elif "norm" in module and architecture == "gemma3":
            data = data + 1
        writer.add_tensor(f"{prefix}{names[module]}.{part}", np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_gemma3_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the converter writes for Gemma 3; it leaves out which layers slide, and their base."""
    full = config.rope_parameters["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)


GGUF_CASES = [
    ("llama-grouped", "llama", interleaved),
    ("llama-tied", "llama", interleaved),
    ("llama-biases", "llama", interleaved),
    ("llama-llama3", "llama", interleaved),
    ("qwen2", "qwen2", in_order),
    ("qwen2-tied", "qwen2", in_order),
    ("gemma3-defaults", "gemma3", in_order),
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
    stream = quality.Stream.compile("reference", model, weights, max_len=128, cache_dtype="fp32")
    ids = random_ids(100)
    expected = oracle_logits(oracle, ids)
    np.testing.assert_allclose(stream.logits([(0, ids)]), expected, atol=1e-4, rtol=0)

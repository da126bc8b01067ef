"""Fixtures that every room's tests share: where the default model lies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from octavo.weights import source


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's file, fetched into the cache on the first run."""
    return source.resolve("smollm2")


TINY_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers (0.1 M parameters) and a byte-level tokenizer.

    Its context is 512 tokens; ids below 256 are bytes, then come merges and three special tokens.
    """
    folder = tmp_path_factory.mktemp("tiny-model")
    vocab_size = write_tiny_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": vocab_size - 3,
        "eos_token_id": vocab_size - 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tiny_weights(folder, vocab_size)
    return folder


def write_tiny_tokenizer(folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; return the size of the vocabulary."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("o", "n"), ("Ġ", "the")]
    tokens = alphabet + ["".join(pair) for pair in merges]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": TINY_CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens) + len(specials)


def write_tiny_weights(folder: Path, vocab_size: int) -> None:
    """Write model.safetensors with random float32 weights."""
    shapes = {"model.embed_tokens.weight": (vocab_size, 64), "lm_head.weight": (vocab_size, 64)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (64, 64),
            f"{layer}self_attn.k_proj.weight": (32, 64),
            f"{layer}self_attn.v_proj.weight": (32, 64),
            f"{layer}self_attn.o_proj.weight": (64, 64),
            f"{layer}mlp.gate_proj.weight": (96, 64),
            f"{layer}mlp.up_proj.weight": (96, 64),
            f"{layer}mlp.down_proj.weight": (64, 96),
        }
    random = np.random.default_rng(7)
    tensors = {n: random.normal(0, 0.25, shape).astype(np.float32) for n, shape in shapes.items()}
    norms = [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    tensors |= {f"{n}.weight": np.ones(64, np.float32) for n in (*norms, "model.norm")}
    safetensors.numpy.save_file(tensors, str(folder / "model.safetensors"))

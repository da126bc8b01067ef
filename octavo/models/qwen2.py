"""Qwen2 and Qwen2.5: Llama's declaration with biases on q, k and v.

Its GGUF keeps the rows of q and k in their order.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import llama_config
from octavo.models.llama_config import LlamaConfig, cap_to_window
from octavo.models.source import ConfigSource


def from_folder(source: ConfigSource) -> LlamaConfig:
    """Read a config.json of Qwen2ForCausalLM; its window counts only with use_sliding_window."""
    config = llama_config.from_folder(source)
    if source.boolean("use_sliding_window", False):
        config = cap_to_window(config, source.integer("sliding_window"))
    return replace(config, attention_bias=True, output_bias=False, mlp_bias=False)


def from_gguf(source: ConfigSource) -> LlamaConfig:
    """Read GGUF metadata of architecture qwen2."""
    config = llama_config.from_gguf(source)
    return replace(config, attention_bias=True, output_bias=False, mlp_bias=False)

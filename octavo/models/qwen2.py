"""Qwen2 and Qwen2.5: Llama's declaration with biases on q, k and v.

Its GGUF keeps the rows of q and k in their order.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import ModelFileError
from octavo.models import llama_config
from octavo.models.llama_config import LlamaConfig, slides_of_types, with_window
from octavo.models.source import ConfigSource


def from_folder(source: ConfigSource) -> LlamaConfig:
    """Read a config.json of Qwen2ForCausalLM; its window counts only with use_sliding_window."""
    config = llama_config.from_folder(source)
    if source.boolean("use_sliding_window", False):
        config = with_window(config, source.integer("sliding_window"), _slides(source, config))
    return replace(config, attention_bias=True, output_bias=False, mlp_bias=False)


def _slides(source: ConfigSource, config: LlamaConfig) -> tuple[bool, ...]:
    """Which layers slide: layer_types, or those from max_window_layers on."""
    kinds = source.items("layer_types", str)
    if kinds is not None:
        return slides_of_types(kinds)
    first = source.integer("max_window_layers", 28, least=0)
    return tuple(i >= first for i in range(config.num_hidden_layers))


def from_gguf(source: ConfigSource) -> LlamaConfig:
    """Read GGUF metadata of architecture qwen2."""
    config = llama_config.sizes_from_gguf(source)
    key, context = "attention.sliding_window", config.max_position_embeddings
    if source.integer(key, context) < context:
        raise ModelFileError(
            f"{source.prefix}{key}: the file does not say which layers slide a window; use the "
            "model's safetensors folder"
        )
    return replace(config, attention_bias=True, output_bias=False, mlp_bias=False)

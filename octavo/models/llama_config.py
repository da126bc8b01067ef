"""The numbers of a Llama-like model, read from a config.json or from GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass, replace

from octavo.errors import ModelFileError
from octavo.models.rope import FrequencyDivisors, RopeConfig
from octavo.models.rope_source import rope_from_folder, rope_from_gguf
from octavo.models.source import MAX_HEAD_DIM, MAX_LAYERS, ConfigSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The numbers of a Llama-like model, named as in its config.json.

    Attributes:
        max_position_embeddings: the longest context that is computed exactly.
        context_note: why that is less than the file says, for people; None if it is not.
        attention_bias: q, k and v have biases.
        output_bias: the product after attention has one.
        mlp_bias: gate, up and down have biases.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    context_note: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that do not fit together."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelFileError(
                f"{self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"head_dim is {self.head_dim}, but rotary embedding needs pairs")
        scaling = self.rope.scaling
        if isinstance(scaling, FrequencyDivisors) and len(scaling.divisors) != self.head_dim // 2:
            raise ModelFileError(
                f"rope_freqs.weight has {len(scaling.divisors)} values, not {self.head_dim // 2}"
            )


def cap_to_window(config: LlamaConfig, window: int) -> LlamaConfig:
    """The same model with its context cut to its attention window, harmless up to there.

    Beyond it every layer would have to forget all but the last `window` tokens, which is not
    implemented; an answer computed with full attention would be silently wrong.
    """
    if window >= config.max_position_embeddings:
        return config
    note = (
        f"context cut from {config.max_position_embeddings} to {window} tokens: the model slides "
        f"an attention window of {window} tokens, and beyond it attention would differ"
    )
    return replace(config, max_position_embeddings=window, context_note=note)


def from_folder(source: ConfigSource) -> LlamaConfig:
    """Read a config.json of LlamaForCausalLM (and what its kin share with it)."""
    source.require("hidden_act", source.text("hidden_act", "silu"), "silu")
    if source.has("quantization_config"):
        raise ModelFileError(
            "quantization_config: folders with quantized weights are not supported; use a GGUF file"
        )
    hidden_size = source.integer("hidden_size")
    heads = source.integer("num_attention_heads")
    bias = source.boolean("attention_bias", False)
    context = source.integer("max_position_embeddings")
    return LlamaConfig(
        vocab_size=source.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=source.integer("intermediate_size"),
        num_hidden_layers=source.integer("num_hidden_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=source.integer("num_key_value_heads", heads),
        head_dim=source.integer("head_dim", max(1, hidden_size // heads), most=MAX_HEAD_DIM),
        rms_norm_eps=source.number("rms_norm_eps"),
        max_position_embeddings=context,
        rope=rope_from_folder(source, context),
        tie_word_embeddings=source.boolean("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=source.boolean("mlp_bias", False),
    )


def mistral_from_folder(source: ConfigSource) -> LlamaConfig:
    """Read a config.json of MistralForCausalLM: version 0.1 slides a window, later ones do not."""
    config = from_folder(source)
    if not source.has("sliding_window"):
        return config
    return cap_to_window(config, source.integer("sliding_window"))


def from_gguf(source: ConfigSource) -> LlamaConfig:
    """Read GGUF metadata; biases and tied embeddings show in the names of the tensors."""
    if source.has("expert_count") and source.integer("expert_count", least=0) > 0:
        raise ModelFileError(f"{source.prefix}expert_count: mixtures of experts are not supported")
    hidden_size = source.integer("embedding_length")
    heads = source.integer("attention.head_count")
    head_dim = source.integer(
        "attention.key_length", max(1, hidden_size // heads), most=MAX_HEAD_DIM
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        source.require(key, source.integer(key, head_dim), head_dim)
    tokens = source.values.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list | tuple) and tokens else None
    config = LlamaConfig(
        vocab_size=source.integer("vocab_size", num_tokens),
        hidden_size=hidden_size,
        intermediate_size=source.integer("feed_forward_length"),
        num_hidden_layers=source.integer("block_count", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=source.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=source.number("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=source.integer("context_length"),
        rope=rope_from_gguf(source),
        tie_word_embeddings="output.weight" not in source.names,
        attention_bias="blk.0.attn_q.bias" in source.names,
        output_bias="blk.0.attn_output.bias" in source.names,
        mlp_bias="blk.0.ffn_gate.bias" in source.names,
    )
    if not source.has("attention.sliding_window"):
        return config
    return cap_to_window(config, source.integer("attention.sliding_window"))

"""The numbers of a Llama-like model, read from a config.json or from GGUF metadata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from octavo.errors import ModelFileError
from octavo.models.rope import FrequencyDivisors, RopeConfig
from octavo.models.rope_source import rope_from_folder, rope_from_gguf
from octavo.models.source import MAX_HEAD_DIM, MAX_LAYERS, ConfigSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The numbers of a Llama-like model, named as in its config.json.

    Attributes:
        max_position_embeddings: the longest context.
        windows: of each layer the tokens that it attends to, or None for all; empty: all layers
            attend to all.
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
    windows: tuple[int | None, ...] = ()

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
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ModelFileError(
                f"layer_types names {len(self.windows)} layers, but the model has "
                f"{self.num_hidden_layers}"
            )

    def window(self, layer: int) -> int | None:
        """The tokens that a layer attends to, or None for all."""
        return self.windows[layer] if self.windows else None


def with_window(config: LlamaConfig, window: int, slides: Iterable[bool]) -> LlamaConfig:
    """The same model with an attention window in the layers that slide one."""
    if window >= config.max_position_embeddings:
        return config
    return replace(config, windows=tuple(window if s else None for s in slides))


def slides_of_types(layer_types: Iterable[str]) -> tuple[bool, ...]:
    """Which layers slide a window, from config.json's layer_types."""
    kinds = {"sliding_attention": True, "full_attention": False}
    for kind in layer_types:
        if kind not in kinds:
            raise ModelFileError(
                f"layer_types names {kind!r}; sliding_attention and full_attention are supported"
            )
    return tuple(kinds[kind] for kind in layer_types)


def from_folder(source: ConfigSource) -> LlamaConfig:
    """Read a config.json of LlamaForCausalLM (and what its kin share with it)."""
    source.require("hidden_act", source.text("hidden_act", "silu"), "silu")
    rope = rope_from_folder(source, source.integer("max_position_embeddings"))
    return sizes_from_folder(source, rope)


def sizes_from_folder(source: ConfigSource, rope: RopeConfig, *, tied: bool = False) -> LlamaConfig:
    """Read what all architectures spell alike; tied: whether embeddings are where nothing says."""
    hidden_size = source.integer("hidden_size")
    heads = source.integer("num_attention_heads")
    bias = source.boolean("attention_bias", False)
    return LlamaConfig(
        vocab_size=source.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=source.integer("intermediate_size"),
        num_hidden_layers=source.integer("num_hidden_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=source.integer("num_key_value_heads", heads),
        head_dim=source.integer("head_dim", max(1, hidden_size // heads), most=MAX_HEAD_DIM),
        rms_norm_eps=source.number("rms_norm_eps"),
        max_position_embeddings=source.integer("max_position_embeddings"),
        rope=rope,
        tie_word_embeddings=source.boolean("tie_word_embeddings", tied),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=source.boolean("mlp_bias", False),
    )


def mistral_from_folder(source: ConfigSource) -> LlamaConfig:
    """Read a config.json of MistralForCausalLM: version 0.1 slides a window, later ones do not."""
    config = from_folder(source)
    if not source.has("sliding_window"):
        return config
    window = source.integer("sliding_window")
    return with_window(config, window, [True] * config.num_hidden_layers)


def from_gguf(source: ConfigSource) -> LlamaConfig:
    """Read GGUF metadata of architecture llama; a window is that of every layer (Mistral)."""
    config = sizes_from_gguf(source)
    if not source.has("attention.sliding_window"):
        return config
    window = source.integer("attention.sliding_window")
    return with_window(config, window, [True] * config.num_hidden_layers)


def sizes_from_gguf(source: ConfigSource) -> LlamaConfig:
    """Read what all architectures spell alike.

    Biases and tied embeddings show in the names of the tensors.
    """
    if source.has("expert_count") and source.integer("expert_count", least=0) > 0:
        raise ModelFileError(f"{source.prefix}expert_count: mixtures of experts are not supported")
    hidden_size = source.integer("embedding_length")
    heads = source.integer("attention.head_count")
    head_dim = source.integer(
        "attention.key_length", max(1, hidden_size // heads), most=MAX_HEAD_DIM
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        source.require(key, source.integer(key, head_dim), head_dim)
    return LlamaConfig(
        vocab_size=source.integer("vocab_size", source.length("tokenizer.ggml.tokens") or None),
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

"""Gemma 3, the text models: declaration, configuration and GGUF names.

Most layers slide an attention window and have a rotary base of their own; every sixth sees all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.errors import ModelFileError
from octavo.graph.trace import Graph, Ops
from octavo.models import llama, llama_config
from octavo.models.llama_config import LlamaConfig
from octavo.models.rope import RopeConfig
from octavo.models.rope_source import rope_from_folder
from octavo.models.source import ConfigSource
from octavo.models.transforms import AddOne

GGUF_NAMES: Mapping[str, str] = {
    **llama.GGUF_NAMES,
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}
_NORMS = (
    "model.norm",
    "model.layers.{}.input_layernorm",
    "model.layers.{}.self_attn.q_norm",
    "model.layers.{}.self_attn.k_norm",
    "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.pre_feedforward_layernorm",
    "model.layers.{}.post_feedforward_layernorm",
)
_PATTERN = 6
"""Every so manieth layer sees all, where a file does not say which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Config:
    """The numbers of a Gemma 3.

    Attributes:
        sizes: what it has in common with Llama; its rope is that of the layers that see all.
        slides: of each layer, whether it attends to the last `window` tokens only.
        local_rope: the rotary embedding of the layers that slide.
        attention_scale: multiplies q·k.
        soft_cap: of the attention's scores.
    """

    sizes: LlamaConfig
    slides: tuple[bool, ...]
    window: int
    local_rope: RopeConfig
    attention_scale: float
    soft_cap: float | None

    def __post_init__(self) -> None:
        """Refuse numbers that do not fit together."""
        if len(self.slides) != self.sizes.num_hidden_layers:
            raise ModelFileError(
                f"the configuration says of {len(self.slides)} layers whether they slide a window, "
                f"but the model has {self.sizes.num_hidden_layers}"
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the logits' weight."""
        return self.sizes.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest context."""
        return self.sizes.max_position_embeddings


def gemma3(ops: Ops, config: Gemma3Config) -> Graph:
    """Declare the model: four norms a layer, norms of q and k, windows, GELU."""
    c = config.sizes
    head_dim, hidden, eps = c.head_dim, c.hidden_size, c.rms_norm_eps
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
    global_freq, local_freq = c.rope.inv_freq(head_dim), config.local_rope.inv_freq(head_dim)
    x = ops.embed("model.embed_tokens", c.vocab_size, hidden, scale=math.sqrt(hidden))
    for layer in ops.layers("model.layers", c.num_hidden_layers):
        slides = config.slides[layer.index]
        h = ops.rms_norm(x, layer / "input_layernorm", eps)
        q, k, v = (
            ops.linear(
                h, layer / f"self_attn.{n}_proj", count * head_dim, bias=c.attention_bias,
                shard="column",
            )
            for n, count in heads.items()
        )  # fmt: skip
        q, k = (
            ops.rms_norm(value, layer / f"self_attn.{n}_norm", eps, num_heads=heads[n])
            for n, value in (("q", q), ("k", k))
        )
        q, k = (
            ops.rope(value, head_dim, local_freq if slides else global_freq) for value in (q, k)
        )
        a = ops.paged_attention(
            q,
            k,
            v,
            layer.index,
            head_dim=head_dim,
            scale=config.attention_scale,
            window=config.window if slides else None,
            soft_cap=config.soft_cap,
        )
        a = ops.linear(a, layer / "self_attn.o_proj", hidden, bias=c.output_bias, shard="row")
        x = ops.add(x, ops.rms_norm(a, layer / "post_attention_layernorm", eps))
        h = ops.rms_norm(x, layer / "pre_feedforward_layernorm", eps)
        gate, up = (
            ops.linear(h, layer / f"mlp.{n}_proj", c.intermediate_size, shard="column")
            for n in ("gate", "up")
        )
        m = ops.linear(ops.gelu_mul(gate, up), layer / "mlp.down_proj", hidden, shard="row")
        x = ops.add(x, ops.rms_norm(m, layer / "post_feedforward_layernorm", eps))
    last = ops.rms_norm(x, "model.norm", eps)
    head = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
    logits = ops.linear(ops.select_rows(last), head, c.vocab_size)
    return ops.finish(logits=logits, hidden=last)


def folder_transforms(config: Gemma3Config) -> Mapping[str, AddOne]:
    """A folder stores norm - 1; a GGUF file has the norms as they are."""
    return dict.fromkeys(_NORMS, AddOne())


def from_folder(source: ConfigSource) -> Gemma3Config:
    """Read a config.json of Gemma3ForCausalLM, of transformers 4 or 5."""
    activation = source.text("hidden_activation", "gelu_pytorch_tanh")
    source.require("hidden_activation", activation, "gelu_pytorch_tanh")
    bidirectional = source.boolean("use_bidirectional_attention", False)
    source.require("use_bidirectional_attention", bidirectional, False)
    rope, local_rope = _ropes_of_folder(source)
    sizes = llama_config.sizes_from_folder(source, rope, tied=True)
    kinds = source.items("layer_types", str)
    if kinds is None:
        slides = _every(source.integer("sliding_window_pattern", _PATTERN), sizes)
    else:
        slides = llama_config.slides_of_types(kinds)
    return Gemma3Config(
        sizes=sizes,
        slides=slides,
        window=source.integer("sliding_window", 4096),
        local_rope=local_rope,
        attention_scale=source.number("query_pre_attn_scalar", 256.0) ** -0.5,
        soft_cap=_soft_cap(source),
    )


def from_gguf(source: ConfigSource) -> Gemma3Config:
    """Read GGUF metadata of architecture gemma3, with llama.cpp's word for what files leave out."""
    sizes = llama_config.sizes_from_gguf(source)
    pattern = "attention.sliding_window_pattern"
    if isinstance(source.values.get(source.prefix + pattern), list | tuple):
        slides = source.items(pattern, bool) or ()
    else:
        slides = _every(source.integer(pattern, _PATTERN), sizes)
    # The 27B model alone scales by its hidden size a head, and is known by its 62 layers.
    is_27b = sizes.num_hidden_layers == 62
    scaled_by = sizes.hidden_size / sizes.num_attention_heads if is_27b else sizes.head_dim
    return Gemma3Config(
        sizes=sizes,
        slides=slides,
        window=source.integer("attention.sliding_window"),
        local_rope=RopeConfig(source.number("rope.freq_base_swa", 10000.0)),
        attention_scale=source.number("attention.scale", scaled_by**-0.5),
        soft_cap=_soft_cap(source),
    )


def _soft_cap(source: ConfigSource) -> float | None:
    """The cap of attention's scores; keys of the same name stand in both kinds of file."""
    if source.has("final_logit_softcapping"):
        raise ModelFileError(
            f"{source.prefix}final_logit_softcapping: capping the logits is not supported, and "
            "without it the answers would be wrong"
        )
    key = "attn_logit_softcapping"
    return source.number(key) if source.has(key) else None


def _ropes_of_folder(source: ConfigSource) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embedding of the layers that see all, and of those that slide."""
    context = source.integer("max_position_embeddings")
    by_kind = source.section("rope_parameters")
    if by_kind is None:  # before transformers 5
        local = RopeConfig(source.number("rope_local_base_freq", 10000.0))
        return rope_from_folder(source, context, 1_000_000.0), local
    if unknown := by_kind.values.keys() - {"full_attention", "sliding_attention"}:
        raise ModelFileError(
            f"rope_parameters names {min(unknown)!r}; it must hold full_attention and "
            "sliding_attention"
        )
    full, sliding = (
        rope_from_folder(ConfigSource({"rope_parameters": by_kind.values.get(kind)}), context, base)
        for kind, base in (("full_attention", 1_000_000.0), ("sliding_attention", 10000.0))
    )
    return full, sliding


def _every(pattern: int, sizes: LlamaConfig) -> tuple[bool, ...]:
    return tuple((i + 1) % pattern != 0 for i in range(sizes.num_hidden_layers))

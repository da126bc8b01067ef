"""Llama and its kin (SmolLM2, Llama 2 and 3, TinyLlama, Mistral): the declaration, and what GGUF calls its parts."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.graph.trace import Graph, Ops
from octavo.models.rope import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The numbers of a Llama-like model, named as in its config.json."""

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


def llama(ops: Ops, config: LlamaConfig) -> Graph:
    """Declare the model: what makes Llama differ from its neighbours stands in these lines."""
    inv_freq = config.rope.inv_freq(config.head_dim)
    q_features = config.num_attention_heads * config.head_dim
    kv_features = config.num_key_value_heads * config.head_dim
    x = ops.embed("model.embed_tokens", config.vocab_size, config.hidden_size)
    for layer in ops.layers("model.layers", config.num_hidden_layers):
        h = ops.rms_norm(x, layer / "input_layernorm", config.rms_norm_eps)
        q = ops.linear(
            h, layer / "self_attn.q_proj", q_features, bias=config.attention_bias, shard="column"
        )
        k = ops.linear(
            h, layer / "self_attn.k_proj", kv_features, bias=config.attention_bias, shard="column"
        )
        v = ops.linear(
            h, layer / "self_attn.v_proj", kv_features, bias=config.attention_bias, shard="column"
        )
        q, k = (ops.rope(heads, config.head_dim, inv_freq) for heads in (q, k))
        a = ops.paged_attention(
            q, k, v, layer.index, head_dim=config.head_dim, scale=config.head_dim**-0.5
        )
        x = ops.add(x, ops.linear(a, layer / "self_attn.o_proj", config.hidden_size, shard="row"))
        h = ops.rms_norm(x, layer / "post_attention_layernorm", config.rms_norm_eps)
        gate = ops.linear(h, layer / "mlp.gate_proj", config.intermediate_size, shard="column")
        up = ops.linear(h, layer / "mlp.up_proj", config.intermediate_size, shard="column")
        x = ops.add(
            x,
            ops.linear(
                ops.silu_mul(gate, up), layer / "mlp.down_proj", config.hidden_size, shard="row"
            ),
        )
    hidden = ops.rms_norm(x, "model.norm", config.rms_norm_eps)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = ops.linear(ops.select_rows(hidden), head, config.vocab_size)
    return ops.finish(logits=logits, hidden=hidden)

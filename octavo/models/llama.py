"""Llama and its kin (SmolLM2, Llama 2 and 3, TinyLlama, Mistral): declaration and GGUF names."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.graph.trace import Graph, Ops
from octavo.models.llama_config import LlamaConfig
from octavo.models.transforms import UnpermuteRope

GGUF_NAMES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}


def llama(ops: Ops, config: LlamaConfig) -> Graph:
    """Declare the model: what makes Llama differ from its neighbours stands in these lines."""
    head_dim, hidden, inner = config.head_dim, config.hidden_size, config.intermediate_size
    inv_freq = config.rope.inv_freq(head_dim)
    sizes = {
        "q": config.num_attention_heads * head_dim,
        "k": config.num_key_value_heads * head_dim,
        "v": config.num_key_value_heads * head_dim,
    }
    x = ops.embed("model.embed_tokens", config.vocab_size, hidden)
    for layer in ops.layers("model.layers", config.num_hidden_layers):
        h = ops.rms_norm(x, layer / "input_layernorm", config.rms_norm_eps)
        q, k, v = (
            ops.linear(
                h, layer / f"self_attn.{n}_proj", size, bias=config.attention_bias, shard="column"
            )
            for n, size in sizes.items()
        )
        q, k = (ops.rope(heads, head_dim, inv_freq) for heads in (q, k))
        a = ops.paged_attention(
            q, k, v, layer.index,
            head_dim=head_dim, scale=head_dim**-0.5, window=config.window(layer.index),
        )  # fmt: skip
        a = ops.linear(a, layer / "self_attn.o_proj", hidden, bias=config.output_bias, shard="row")
        x = ops.add(x, a)
        h = ops.rms_norm(x, layer / "post_attention_layernorm", config.rms_norm_eps)
        gate, up = (
            ops.linear(h, layer / f"mlp.{n}_proj", inner, bias=config.mlp_bias, shard="column")
            for n in ("gate", "up")
        )
        m = ops.silu_mul(gate, up)
        m = ops.linear(m, layer / "mlp.down_proj", hidden, bias=config.mlp_bias, shard="row")
        x = ops.add(x, m)
    last = ops.rms_norm(x, "model.norm", config.rms_norm_eps)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = ops.linear(ops.select_rows(last), head, config.vocab_size)
    return ops.finish(logits=logits, hidden=last)


def gguf_transforms(config: LlamaConfig) -> Mapping[str, UnpermuteRope]:
    """The rows of q and k that llama.cpp's converter reorders, for this architecture alone."""
    return {
        "model.layers.{}.self_attn.q_proj": UnpermuteRope(
            config.num_attention_heads, config.head_dim
        ),
        "model.layers.{}.self_attn.k_proj": UnpermuteRope(
            config.num_key_value_heads, config.head_dim
        ),
    }

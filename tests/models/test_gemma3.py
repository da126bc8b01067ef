"""Gemma 3: both kinds of file say the same model, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import ModelFileError
from octavo.graph import ops as op
from octavo.models import gemma3, registry
from octavo.models.rope import LinearScaling, RopeConfig
from octavo.models.transforms import AddOne

LAYERS = 7
FOLDER: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
}
GGUF: dict[str, Any] = {
    "gemma3.vocab_size": 100,
    "gemma3.embedding_length": 36,
    "gemma3.feed_forward_length": 48,
    "gemma3.block_count": LAYERS,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 2,
    "gemma3.attention.key_length": 16,
    "gemma3.attention.value_length": 16,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 32,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.context_length": 128,
}
PARTS = [n.removeprefix("model.layers.{}.") for n in gemma3.GGUF_NAMES if ".layers." in n]
FOLDER_NAMES = frozenset(
    {"model.embed_tokens.weight", "model.norm.weight"}
    | {f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in PARTS}
)
GGUF_PARTS = (
    "attn_norm attn_q attn_k attn_v attn_q_norm attn_k_norm attn_output post_attention_norm "
    "ffn_norm ffn_gate ffn_up ffn_down post_ffw_norm"
)
GGUF_NAMES = frozenset(
    {"token_embd.weight", "output_norm.weight"}
    | {f"blk.{i}.{part}.weight" for i in range(LAYERS) for part in GGUF_PARTS.split()}
)


def folder(**changes: Any) -> registry.Model:
    return registry.build("folder", "Gemma3ForCausalLM", FOLDER | changes, FOLDER_NAMES)


def gguf(changes: dict[str, Any] | None = None) -> registry.Model:
    return registry.build("gguf", "gemma3", GGUF | (changes or {}), GGUF_NAMES)


def attention(model: registry.Model) -> list[op.PagedAttention]:
    return [n.operator for n in model.graph.nodes if isinstance(n.operator, op.PagedAttention)]


def test_both_files_say_the_same_model() -> None:
    assert folder().graph == gguf().graph
    assert {gguf().file_names(w) for w in gguf().graph.weights} == GGUF_NAMES
    windows = [a.window for a in attention(folder())]
    assert windows == [32, 32, 32, 32, 32, None, 32]
    assert {a.scale for a in attention(folder())} == {0.25}
    embed = folder().graph.nodes[0].operator
    assert isinstance(embed, op.Embed) and embed.scale == 6.0
    ropes = [n.operator for n in folder().graph.nodes if isinstance(n.operator, op.Rope)]
    local, full = RopeConfig(10000.0).inv_freq(16), RopeConfig(1e6).inv_freq(16)
    assert [r.inv_freq for r in ropes] == 10 * [local] + 2 * [full] + 2 * [local]


def test_norms_of_a_folder_alone_lack_one() -> None:
    norms = {w for w in folder().graph.weights if "norm" in w}
    assert len(norms) == 6 * LAYERS + 1
    assert folder().transforms == dict.fromkeys(norms, AddOne())
    assert gguf().transforms == {}


@pytest.mark.parametrize(
    "changes",
    [
        {
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ],
)
def test_two_rotary_embeddings_in_both_spellings(changes: dict[str, Any]) -> None:
    config = folder(**changes).config
    assert isinstance(config, gemma3.Gemma3Config)
    assert config.sizes.rope == RopeConfig(5e5, LinearScaling(8.0))
    assert config.local_rope == RopeConfig(2e4)
    linear = {
        "gemma3.rope.freq_base": 5e5,
        "gemma3.rope.freq_base_swa": 2e4,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    assert gguf(linear).graph == folder(**changes).graph


def test_which_layers_slide() -> None:
    alternate = [bool((i + 1) % 2) for i in range(LAYERS)]
    kinds = ["sliding_attention" if slides else "full_attention" for slides in alternate]
    key = "gemma3.attention.sliding_window_pattern"
    for model in (
        folder(sliding_window_pattern=2),
        folder(layer_types=kinds),
        gguf({key: 2}),
        gguf({key: alternate}),
    ):
        assert [a.window is not None for a in attention(model)] == alternate
    for fault in (
        lambda: folder(layer_types=kinds[1:]),
        lambda: gguf({key: alternate[1:]}),
    ):
        with pytest.raises(ModelFileError, match=r"of 6 layers .* the model has 7"):
            fault()


def test_the_27b_gguf_scales_by_its_hidden_size() -> None:
    """It has 62 layers and leaves query_pre_attn_scalar out; an explicit scale wins."""
    names = {f"blk.{i}.{part}.weight" for i in range(62) for part in GGUF_PARTS.split()}
    names |= {"token_embd.weight", "output_norm.weight"}
    config = GGUF | {"gemma3.block_count": 62}
    model = registry.build("gguf", "gemma3", config, names)
    assert attention(model)[0].scale == (36 / 4) ** -0.5
    assert attention(gguf({"gemma3.attention.scale": 0.5}))[0].scale == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: capping the logits"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"rope_parameters": {"rope_type": "default"}}, "names 'rope_type'"),
        ({"sliding_window": 0}, "sliding_window .* from 1"),
    ],
)
def test_faults_of_a_folder(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        folder(**changes)


def test_the_model_that_sees_is_refused_with_a_way_out() -> None:
    with pytest.raises(ModelFileError, match=r"images too.*use a GGUF file"):
        registry.build("folder", "Gemma3ForConditionalGeneration", FOLDER, FOLDER_NAMES)


def test_soft_cap() -> None:
    capped = folder(attn_logit_softcapping=50.0)
    assert {a.soft_cap for a in attention(capped)} == {50.0}
    assert {a.soft_cap for a in attention(folder())} == {None}

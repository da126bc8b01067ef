"""From a file's configuration to a declared model: names, shapes, transforms, and every fault."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import ModelFileError
from octavo.graph import ops as op
from octavo.models import registry
from octavo.models.rope import FrequencyDivisors, LinearScaling, Llama3Scaling
from octavo.models.transforms import UnpermuteRope

FOLDER: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.vocab_size": 100,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 128,
}
LAYER_WEIGHTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
FOLDER_NAMES = frozenset(
    {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    | {f"model.layers.{i}.{w}.weight" for i in (0, 1) for w in LAYER_WEIGHTS}
)
GGUF_PARTS = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
GGUF_NAMES = frozenset(
    {"token_embd.weight", "output_norm.weight", "output.weight"}
    | {f"blk.{i}.{part}.weight" for i in (0, 1) for part in GGUF_PARTS.split()}
)
BIASES = frozenset(f"model.layers.{i}.self_attn.{n}_proj.bias" for i in (0, 1) for n in "qkv")


def folder(
    architecture: str = "LlamaForCausalLM",
    names: frozenset[str] = FOLDER_NAMES,
    **changes: Any,
) -> registry.Model:
    return registry.build("folder", architecture, FOLDER | changes, names)


def gguf(
    changes: dict[str, Any] | None = None,
    names: frozenset[str] = GGUF_NAMES,
    **rest: Any,
) -> registry.Model:
    return registry.build("gguf", "llama", GGUF | (changes or {}), names, **rest)


def ropes(model: registry.Model) -> list[op.Rope]:
    return [n.operator for n in model.graph.nodes if isinstance(n.operator, op.Rope)]


def test_folder() -> None:
    model = folder()
    assert model.architecture == "LlamaForCausalLM"
    assert set(model.graph.weights) == FOLDER_NAMES
    assert model.graph.weights["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    assert model.file_names("model.layers.1.mlp.up_proj.weight") == (
        "model.layers.1.mlp.up_proj.weight"
    )
    assert model.transforms == {}
    assert (model.vocab_size, model.max_position_embeddings) == (100, 128)
    layer = 2 * 32 + 32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 48
    assert model.num_parameters == 2 * 100 * 32 + 32 + 2 * layer


def test_gguf_has_its_own_names_and_row_order() -> None:
    model = gguf()
    assert {model.file_names(w) for w in model.graph.weights} == GGUF_NAMES
    assert model.file_names("model.layers.1.mlp.down_proj.weight") == "blk.1.ffn_down.weight"
    assert model.file_names("lm_head.weight") == "output.weight"
    assert model.graph.weights == folder().graph.weights
    q = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    k = [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]
    assert model.transforms == {
        **dict.fromkeys(q, UnpermuteRope(4, 8)),
        **dict.fromkeys(k, UnpermuteRope(2, 8)),
    }


def test_qwen2_has_biases_and_keeps_its_rows() -> None:
    model = folder("Qwen2ForCausalLM", FOLDER_NAMES | BIASES)
    assert set(model.graph.weights) >= BIASES
    config = {k.replace("llama.", "qwen2."): v for k, v in GGUF.items()}
    names = GGUF_NAMES | {f"blk.{i}.attn_{n}.bias" for i in (0, 1) for n in "qkv"}
    from_gguf = registry.build("gguf", "qwen2", config, names)
    assert from_gguf.graph == model.graph
    assert from_gguf.transforms == {}
    with pytest.raises(ModelFileError, match=r"lacks 6 .*self_attn\.k_proj\.bias"):
        folder("Qwen2ForCausalLM")


def test_biases_of_llama() -> None:
    attention = BIASES | {f"model.layers.{i}.self_attn.o_proj.bias" for i in (0, 1)}
    mlp = {f"model.layers.{i}.mlp.{n}_proj.bias" for i in (0, 1) for n in ("gate", "up", "down")}
    model = folder(names=FOLDER_NAMES | attention | mlp, attention_bias=True, mlp_bias=True)
    assert set(model.graph.weights) == FOLDER_NAMES | attention | mlp
    in_gguf = {
        f"blk.{i}.{n}.bias" for i in (0, 1) for n in ("attn_q", "attn_k", "attn_v", "attn_output")
    }
    permuted = gguf(names=GGUF_NAMES | in_gguf)
    assert permuted.transforms["model.layers.0.self_attn.q_proj.bias"] == UnpermuteRope(4, 8)


def test_tied_embeddings() -> None:
    without_head = FOLDER_NAMES - {"lm_head.weight"}
    for model in (
        folder(names=without_head, tie_word_embeddings=True),
        folder(tie_word_embeddings=True),
        gguf(names=GGUF_NAMES - {"output.weight"}),
    ):
        assert "lm_head.weight" not in model.graph.weights
        logits = model.graph.nodes[model.graph.outputs["logits"]].operator
        assert isinstance(logits, op.Linear) and logits.weight == "model.embed_tokens.weight"
    with pytest.raises(ModelFileError, match=r"lacks 1 .*lm_head\.weight"):
        folder(names=without_head)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 3))
def test_unpermute_undoes_the_converter(num_heads: int, half: int, columns: int) -> None:
    wanted = np.arange(num_heads * half * 2 * columns).reshape(-1, columns)
    by_pairs = wanted.reshape(num_heads, 2, half, columns).swapaxes(1, 2).reshape(-1, columns)
    rows = UnpermuteRope(num_heads, 2 * half).rows()
    assert np.array_equal(by_pairs[list(rows)], wanted)


def test_head_dim_may_differ_from_the_quotient() -> None:
    for model in (
        folder(head_dim=16),
        gguf({"llama.attention.key_length": 16, "llama.attention.value_length": 16}),
    ):
        assert model.graph.weights["model.layers.0.self_attn.q_proj.weight"] == (64, 32)
        assert model.graph.weights["model.layers.0.self_attn.o_proj.weight"] == (32, 64)
        assert model.graph.cache_groups[0].head_dim == 16


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"rope_scaling": None, "rope_theta": 10000.0}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, LinearScaling(2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, LinearScaling(2.0)),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            Llama3Scaling(8.0, 1.0, 4.0, 64),
        ),
    ],
)
def test_rope_in_a_folder(changes: dict[str, Any], scaling: object) -> None:
    model = folder(**changes)
    assert model.config.rope.scaling == scaling  # type: ignore[attr-defined]
    assert ropes(model)[0].inv_freq == model.config.rope.inv_freq(8)  # type: ignore[attr-defined]
    assert folder(rope_theta=5e5).config.rope.theta == 5e5  # type: ignore[attr-defined]
    in_parameters = folder(rope_parameters={"rope_type": "default", "rope_theta": 7e5})
    assert in_parameters.config.rope.theta == 7e5  # type: ignore[attr-defined]


def test_rope_in_a_gguf() -> None:
    names = GGUF_NAMES | {"rope_freqs.weight"}
    model = gguf(names=names, read_numbers=lambda name: (1.0, 2.0, 4.0, 8.0))
    assert model.config.rope.scaling == FrequencyDivisors((1.0, 2.0, 4.0, 8.0))  # type: ignore[attr-defined]
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert gguf(linear).config.rope.scaling == LinearScaling(4.0)  # type: ignore[attr-defined]
    old = gguf({"llama.rope.scale_linear": 4.0})
    assert old.config.rope.scaling == LinearScaling(4.0)  # type: ignore[attr-defined]
    with pytest.raises(ModelFileError, match="has 3 values, not 4"):
        gguf(names=names, read_numbers=lambda name: (1.0, 2.0, 4.0))
    with pytest.raises(ModelFileError, match="holds a value outside"):
        gguf(names=names, read_numbers=lambda name: (1.0, 0.0, math.nan, 2.0))
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight"):
        gguf(names=names)


def windows(model: registry.Model) -> list[int | None]:
    found = [n.operator for n in model.graph.nodes if isinstance(n.operator, op.PagedAttention)]
    return [operator.window for operator in found]


def test_windows() -> None:
    assert windows(folder("MistralForCausalLM", sliding_window=100)) == [100, 100]
    assert windows(folder("MistralForCausalLM", sliding_window=128)) == [None, None]
    assert windows(folder("MistralForCausalLM", sliding_window=None)) == [None, None]
    assert windows(folder(sliding_window=32)) == [None, None], "Llama has no such key"
    assert windows(gguf({"llama.attention.sliding_window": 64})) == [64, 64]
    names = FOLDER_NAMES | BIASES
    kinds = ["sliding_attention", "full_attention"]
    for changes, expected in (
        ({"use_sliding_window": False}, [None, None]),
        ({"use_sliding_window": True}, [None, None]),  # the first 28 layers see all
        ({"use_sliding_window": True, "max_window_layers": 1}, [None, 32]),
        ({"use_sliding_window": True, "layer_types": kinds}, [32, None]),
    ):
        model = folder("Qwen2ForCausalLM", names, sliding_window=32, **changes)
        assert windows(model) == expected
        assert model.max_position_embeddings == 128


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (["full_attention"], "names 1 layers, but the model has 2"),
        (["full_attention", "strange"], "names 'strange'"),
        ([1, 2], "must be a list of str"),
        ("full_attention", "must be a list of str"),
    ],
)
def test_faults_of_layer_types(layer_types: Any, message: str) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 32, "layer_types": layer_types}
    with pytest.raises(ModelFileError, match=message):
        folder("Qwen2ForCausalLM", FOLDER_NAMES | BIASES, **settings)


def test_a_window_of_a_qwen2_gguf_is_refused() -> None:
    """It does not say of which layers; one as long as the context hides nothing."""
    config = {k.replace("llama.", "qwen2."): v for k, v in GGUF.items()}
    names = GGUF_NAMES | {f"blk.{i}.attn_{n}.bias" for i in (0, 1) for n in "qkv"}
    registry.build("gguf", "qwen2", config | {"qwen2.attention.sliding_window": 128}, names)
    with pytest.raises(ModelFileError, match="does not say which layers"):
        registry.build("gguf", "qwen2", config | {"qwen2.attention.sliding_window": 64}, names)


def test_unknown_architecture_names_the_known() -> None:
    for kind, known in (("folder", "LlamaForCausalLM, Mistral"), ("gguf", "llama, qwen2")):
        with pytest.raises(ModelFileError, match=f"'Strange'.*{known}"):
            registry.build(kind, "Strange", FOLDER, FOLDER_NAMES)  # type: ignore[arg-type]


def test_auto_map_runs_nothing() -> None:
    """A repository's own code is neither imported nor looked for."""
    auto_map = {"AutoModelForCausalLM": "this.Strange", "AutoConfig": "antigravity.Config"}
    assert folder(auto_map=auto_map).graph == folder().graph
    with pytest.raises(ModelFileError, match="is not supported"):
        folder("StrangeForCausalLM", auto_map=auto_map)
    assert not {"this", "antigravity"} & set(sys.modules)


@pytest.mark.parametrize("key", [k for k in FOLDER if k != "num_key_value_heads"])
def test_missing_key_of_a_folder(key: str) -> None:
    config = {k: v for k, v in FOLDER.items() if k != key}
    with pytest.raises(ModelFileError, match=f"lacks {key}"):
        registry.build("folder", "LlamaForCausalLM", config, FOLDER_NAMES)


@pytest.mark.parametrize(
    "key", sorted(set(GGUF) - {"general.architecture", "llama.attention.head_count_kv"})
)
def test_missing_key_of_a_gguf(key: str) -> None:
    config = {k: v for k, v in GGUF.items() if k != key}
    with pytest.raises(ModelFileError, match=f"lacks {key}"):
        registry.build("gguf", "llama", config, GGUF_NAMES)


def test_without_a_number_of_kv_heads_every_head_has_its_own() -> None:
    in_gguf = {k: v for k, v in GGUF.items() if k != "llama.attention.head_count_kv"}
    model = registry.build("gguf", "llama", in_gguf, GGUF_NAMES)
    assert model.graph.cache_groups[0].num_kv_heads == 4
    assert folder(num_key_value_heads=None).graph.cache_groups[0].num_kv_heads == 4


def test_gguf_vocabulary_may_be_told_by_the_tokens() -> None:
    config = {k: v for k, v in GGUF.items() if k != "llama.vocab_size"}
    config["tokenizer.ggml.tokens"] = ["x"] * 77
    model = registry.build("gguf", "llama", config, GGUF_NAMES)
    assert model.vocab_size == 77

    class Counted(dict[str, Any]):
        def length(self, key: str) -> int:
            return {"tokenizer.ggml.tokens": 78}[key]

    del config["tokenizer.ggml.tokens"]
    assert registry.build("gguf", "llama", Counted(config), GGUF_NAMES).vocab_size == 78


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size .* must be an integer, not 'many'"),
        ({"vocab_size": True}, "vocab_size .* must be an integer"),
        ({"hidden_size": 32.0}, "hidden_size .* must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .* from 1 to 1024"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* from 1 to 1024"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps .* from 1e-12 to 1e"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps .* from 1e-12 to 1e"),
        ({"rope_theta": 10**400}, "rope_theta .* from 1e-12 to 1e"),
        ({"head_dim": 10**6}, "head_dim .* from 1 to 4096"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings .* true or false"),
        ({"num_attention_heads": 3}, "3 attention heads cannot share 2 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": [1]}, "rope_scaling .* must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_faults_of_a_folder(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        folder(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count: mixtures"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4, but only 8"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length is 16"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv .* must be an integer"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
    ],
)
def test_faults_of_a_gguf(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        gguf(changes)


def test_files_with_too_little_or_too_much() -> None:
    with pytest.raises(ModelFileError, match=r"lacks 1 .*model\.norm\.weight"):
        folder(names=FOLDER_NAMES - {"model.norm.weight"})
    with pytest.raises(ModelFileError, match=r"does not use.*self_attn\.q_norm\.weight"):
        folder(names=FOLDER_NAMES | {"model.layers.0.self_attn.q_norm.weight"})
    folder(names=FOLDER_NAMES | {"model.layers.0.self_attn.rotary_emb.inv_freq"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
OPTIONAL = (
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "hidden_act",
)


@given(st.sampled_from(sorted(registry.FOLDERS)), st.sampled_from([*FOLDER, *OPTIONAL]), JSON)
def test_any_value_gives_a_model_or_a_named_fault(
    architecture: str, key: str, value: object
) -> None:
    try:
        model = folder(architecture, FOLDER_NAMES | BIASES, **{key: value})
    except ModelFileError:
        return
    assert model.graph.nodes


@given(
    st.dictionaries(
        st.sampled_from([*GGUF, "llama.rope.freq_base", "llama.rope.scaling.type"]), JSON
    )
)
def test_any_metadata_gives_a_model_or_a_named_fault(changes: dict[str, Any]) -> None:
    try:
        model = gguf(changes)
    except ModelFileError:
        return
    assert model.graph.nodes


def test_declaring_a_model_needs_no_numpy() -> None:
    code = "import sys, octavo.models.registry; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

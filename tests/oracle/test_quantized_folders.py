"""Whole models in quantized folders against transformers on the weights that codes stand for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo.cli.plan import make_plan
from tests.oracle.test_tiny_models import (
    LLAMA,
    QWEN2,
    SIZES,
    assert_greedy_follows,
    oracle_logits,
    random_ids,
)
from tests.weights.packers import (
    Tensors,
    pack_awq,
    pack_gptq,
    round_to_float8,
    round_to_integers,
)

INPUT_SCALES = {
    "q_proj": 0.009,
    "k_proj": 0.013,
    "v_proj": 0.011,
    "o_proj": 0.01,
    "gate_proj": 0.012,
    "up_proj": 0.01,
    "down_proj": 0.03,
}
"""What a calibration might find, but that it finds one for all that read the same input."""
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}

Pack = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A module's name and weight → its tensors and the weight that they stand for."""


def gptq(bits: int, group: int, version: int, *, symmetric: bool) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        integers = round_to_integers(weight, bits, group, symmetric=symmetric)
        bias = {f"{module}.bias": torch.zeros(len(weight))}  # as packers write for every module
        return pack_gptq(module, integers, version=version) | bias, integers.dequantized()

    return pack


def awq(group: int) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        integers = round_to_integers(weight, 4, group)
        return pack_awq(module, integers), integers.dequantized()

    return pack


def fp8(suffix: str, block: tuple[int, int] | None, *, static: bool = False) -> Pack:
    """Block None: the whole weight; a width of 0: a row."""

    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        size = tuple(weight.shape) if block is None else (block[0], block[1] or weight.shape[1])
        codes, scales, values = round_to_float8(weight, (size[0], size[1]))
        tensors = {f"{module}.weight": codes, f"{module}.{suffix}": scales}
        if block is None:
            tensors[f"{module}.{suffix}"] = scales.reshape(())
        if static:
            scale = INPUT_SCALES[module.rpartition(".")[2]]
            tensors |= {f"{module}.input_scale": torch.tensor(scale)}
        return tensors, values

    return pack


def compressed_tensors(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
CASES: dict[str, tuple[str, Pack, dict[str, Any]]] = {
    "gptq-32": (LLAMA, gptq(4, 32, 1, symmetric=True), GPTQ | {"group_size": 32, "sym": True}),
    "gptq-64": (
        LLAMA,
        gptq(4, 64, 2, symmetric=False),
        GPTQ | {"group_size": 64, "checkpoint_format": "gptq_v2"},
    ),
    "gptq-128": (LLAMA, gptq(4, 128, 1, symmetric=False), GPTQ | {"group_size": 128}),
    "gptq-rows": (
        QWEN2,
        gptq(8, -1, 1, symmetric=False),
        GPTQ | {"bits": 8, "group_size": -1},
    ),
    "awq-64": (QWEN2, awq(64), {"quant_method": "awq", "bits": 4, "group_size": 64}),
    "awq-128": (LLAMA, awq(128), {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "fp8-static": (
        LLAMA,
        fp8("weight_scale", None, static=True),
        FP8 | {"activation_scheme": "static"},
    ),
    "fp8-rows": (LLAMA, fp8("weight_scale", (1, 0)), compressed_tensors("channel")),
    "fp8-blocks": (
        QWEN2,
        fp8("weight_scale_inv", (128, 128)),
        FP8 | {"weight_block_size": [128, 128]},
    ),
}

# |logits| reach about 10. Minimums are rounded to float16; the CPU backend rounds the inputs of
# integer products to int8, FP8 weights to float16, and keeps K and V in float16.
TOLERANCES = {"reference": 1e-4, "cpu": 3e-2}


def make_folder(case: str, folder: Path) -> Any:
    """Write a model whose layers are quantized; the oracle has what the codes stand for."""
    architecture, pack, quantization = CASES[case]
    torch.manual_seed(3)
    config_class = getattr(transformers, architecture).config_class
    config = config_class(**(SIZES | WIDE), attn_implementation="eager")
    oracle = getattr(transformers, architecture)(config).eval()
    tensors: Tensors = {}
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            if name.endswith("_proj.weight"):
                packed, values = pack(name.removesuffix(".weight"), parameter)
                tensors = packed | tensors  # a bias of its own stays
                parameter.copy_(values)
            else:
                tensors[name] = parameter.detach().clone()
    for name, parameter in oracle.named_parameters():
        if parameter.dim() == 1:
            tensors[name] = parameter.detach().clone()
    settings = json.loads(config.to_json_string(use_diff=False))
    settings |= {"architectures": [architecture], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return oracle


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text(case: str, quality: ModuleType, tmp_path: Path) -> None:
    oracle = make_folder(case, tmp_path)
    model, weights = quality.load(tmp_path)
    assert model.num_parameters == sum(p.numel() for p in oracle.parameters())
    ids = random_ids(60)
    expected = oracle_logits(oracle, ids)
    assert np.abs(expected).max() > 3, "random weights too small to show a difference"
    exact = quality.Stream.compile(
        "reference", model, weights, max_len=64, round_activations=False, cache_dtype="fp32"
    )
    np.testing.assert_allclose(
        exact.logits([(0, ids)]), expected, atol=TOLERANCES["reference"], rtol=0
    )
    # The torch backend multiplies FP8 with inputs rounded to FP8, integers with unrounded ones.
    there = quality.Stream.compile(
        "torch", model, weights, max_len=64, cache_dtype="fp32", num_threads=1
    )
    error = np.abs(there.logits([(0, ids)]) - expected)
    assert error.max() < 2e-2 if not case.startswith("fp8") else 0.05 < error.mean() < 0.25
    ours = quality.Stream.compile("cpu", model, weights, max_len=128)
    logits = ours.logits([(0, ids)])
    plan = make_plan(str(tmp_path), 1 << 20)
    assert plan["weights_bytes"] == pytest.approx(ours.program.weights_bytes, rel=0.03)
    if case.startswith("fp8"):
        np.testing.assert_allclose(logits, expected, atol=TOLERANCES["cpu"], rtol=0)
        assert_greedy_follows(ours.greedy([ids], 40)[0], ids, oracle, TOLERANCES["cpu"])
        return
    rounded = quality.Stream.compile("reference", model, weights, max_len=128)
    for other, mean in ((rounded.logits([(0, ids)]), 0.01), (expected, 0.08)):
        assert np.abs(logits - other).mean() < mean  # a code of an input may round either way


def round_inputs(oracle: Any, scales: Mapping[str, float]) -> None:
    """Let the layers of a model multiply what FP8 leaves of their inputs."""

    def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor], scale: float) -> torch.Tensor:
        codes = (inputs[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.float() * scale

    for name, module in oracle.named_modules():
        last = name.rpartition(".")[2]
        if last in scales:
            module.register_forward_pre_hook(functools.partial(rounded, scale=scales[last]))


def test_static_input_scales(quality: ModuleType, tmp_path: Path) -> None:
    oracle = make_folder("fp8-static", tmp_path)
    model, weights = quality.load(tmp_path)
    ids = random_ids(60)
    there = quality.Stream.compile(
        "torch", model, weights, max_len=64, cache_dtype="fp32", num_threads=1
    )
    logits = there.logits([(0, ids)])
    joined = {name: max(INPUT_SCALES[n] for n in names) for names in JOINED for name in names}
    round_inputs(oracle, INPUT_SCALES | joined)
    error = np.abs(logits - oracle_logits(oracle, ids))
    # A sum that differs in its last bit may move a code, which moves some of later tokens: 0.02 at
    # most. Inputs that are not rounded, or by other scales, make 0.2.
    assert error[0].max() < 1e-3 and error.mean() < 0.06


def test_what_a_folder_leaves_dense_can_be_quantized(tmp_path: Path) -> None:
    oracle = make_folder("fp8-blocks", tmp_path)
    rows = oracle.lm_head.weight.shape[0] * 2  # and as many of the embedding
    plan, smaller = (make_plan(str(tmp_path), 1 << 20, q) for q in (None, "int8"))
    saved = plan["weights_bytes"] - smaller["weights_bytes"]  # type: ignore[operator]
    assert saved == rows * WIDE["hidden_size"] * 4 - rows * WIDE["hidden_size"] // 32 * 34


def test_how_files_are_shared_out_does_not_matter(quality: ModuleType, tmp_path: Path) -> None:
    """Parts of one weight in two files."""
    make_folder("gptq-128", tmp_path)
    ids = random_ids(20)

    def logits() -> np.ndarray:
        model, weights = quality.load(tmp_path)
        stream = quality.Stream.compile("cpu", model, weights, max_len=32)
        result: np.ndarray = stream.logits([(0, ids)])
        return result

    before = logits()
    tensors = load_file(tmp_path / "model.safetensors")
    parts: dict[str, Tensors] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        parts["a.safetensors" if "q" in name.rpartition(".")[2] else "b.safetensors"][name] = tensor
    for file, held in parts.items():
        save_file(held, tmp_path / file)
    index = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.safetensors").unlink()
    np.testing.assert_array_equal(logits(), before)

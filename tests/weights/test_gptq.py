"""GPTQ folders against what was packed, every code and zero point, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import ConfigError, ModelFileError
from octavo.graph.tensors import DenseTensor, GroupedTensor
from octavo.weights.loader import ModelFiles, open_model
from tests.weights.packers import Integers, Tensors, pack_gptq, random_integers

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}
OneSentence = Callable[[pytest.ExceptionInfo[ConfigError]], str]


def write(folder: Path, tensors: Tensors, quantization: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "m.safetensors"
    )
    return folder


def opened(folder: Path, tensors: Tensors, **changes: object) -> ModelFiles:
    return open_model(write(folder, tensors, GPTQ | changes))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_and_zero_point(bits: int, group: int, version: int, tmp_path: Path) -> None:
    weight = random_integers(64, 256, bits, group)
    packed = pack_gptq("a", weight, version=version)
    files = opened(
        tmp_path,
        packed,
        bits=bits,
        group_size=group,
        checkpoint_format=["gptq", "gptq_v2"][version - 1],
    )
    assert files.names() == {"a.weight"}
    found = files.tensor("a.weight")
    assert isinstance(found, GroupedTensor)
    assert (found.bits, found.group, found.format) == (bits, 256 if group == -1 else group, "GPTQ")
    assert found.shape == files.outline("a.weight").shape == (64, 256)
    codes = found.codes.values()
    np.testing.assert_array_equal(codes, weight.codes.numpy())
    expected = weight.dequantized().numpy()
    np.testing.assert_array_equal(found.dequantize(), expected)
    small = found.in_small_groups()
    assert small.group == min(32, found.group)
    step = weight.scales.float().repeat_interleave(found.group, 1).numpy()
    error = np.abs(small.dequantize() - expected) / step
    assert error.max() < {4: 1 / 256, 8: 1 / 16}[bits], "more than the minimums' rounding"
    rows = np.random.default_rng(0).permutation(64)
    reordered = files.tensor("a.weight", rows)
    np.testing.assert_array_equal(reordered.dequantize(), expected[rows])


def test_a_symmetric_weight_is_exact_and_has_no_minimums(tmp_path: Path) -> None:
    weight = random_integers(32, 128, 4, 64)
    weight = Integers(weight.codes, torch.full_like(weight.zeros, 8), weight.scales, 4)
    files = opened(tmp_path, pack_gptq("a", weight), sym=True)
    found = files.tensor("a.weight")
    assert isinstance(found, GroupedTensor) and found.minimums is None
    np.testing.assert_array_equal(found.dequantize(), weight.dequantized().numpy())
    outline = files.outline("a.weight")
    assert outline.nbytes == 32 * 128 // 2 + 2 * 32 // 2 + 2 * 32 * 2 + 128 * 4
    assert outline.widened_nbytes == 32 * 128 // 2 + 32 * 128 // 32 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = random_integers(32, 64, 4, 32)
    weight = Integers(weight.codes, weight.zeros, weight.scales.to(dtype).half(), 4)
    tensors = pack_gptq("a", weight)
    tensors["a.scales"] = tensors["a.scales"].to(dtype)
    found = opened(tmp_path, tensors).tensor("a.weight")
    np.testing.assert_array_equal(found.dequantize(), weight.dequantized().numpy())


def test_columns_out_of_order_are_refused(tmp_path: Path, one_sentence: OneSentence) -> None:
    tensors = pack_gptq("a", random_integers(32, 128, 4, 64))
    expected = opened(tmp_path, tensors, desc_act=True).tensor("a.weight").dequantize()
    for empty in (None, torch.zeros(0, dtype=torch.int32)):
        rest = {name: t for name, t in tensors.items() if name != "a.g_idx"}
        given = rest if empty is None else rest | {"a.g_idx": empty}
        found = opened(tmp_path, given).tensor("a.weight")
        np.testing.assert_array_equal(found.dequantize(), expected)
    tensors["a.g_idx"] = tensors["a.g_idx"].flip(0)
    files = opened(tmp_path, tensors, desc_act=True)
    for read in (files.outline, files.tensor):
        with pytest.raises(ModelFileError) as caught:
            read("a.weight")
        assert "static_groups" in one_sentence(caught)


def test_biases_of_zeros_are_spare(tmp_path: Path) -> None:
    packed = pack_gptq("a", random_integers(32, 64, 4, 32))
    packed |= pack_gptq("b", random_integers(32, 64, 4, 32))
    packed |= {"a.bias": torch.zeros(32), "b.bias": torch.ones(32), "n.weight": torch.ones(3)}
    files = opened(tmp_path, packed)
    assert files.names() == {"a.weight", "a.bias", "b.weight", "b.bias", "n.weight"}
    assert files.spare() == {"a.bias"}
    assert isinstance(files.tensor("n.weight"), DenseTensor)


def test_the_wrong_parts(tmp_path: Path, one_sentence: OneSentence) -> None:
    good = pack_gptq("a", random_integers(32, 96, 4, 32))

    def refusal(**changes: torch.Tensor | None) -> str:
        parts = {f"a.{name}": tensor for name, tensor in changes.items()}
        tensors = {n: t for n, t in (good | parts).items() if t is not None}
        with pytest.raises(ModelFileError) as caught:
            opened(tmp_path, tensors).tensor("a.weight")
        return one_sentence(caught)

    assert "has no qzeros" in refusal(qzeros=None)
    assert "has no scales" in refusal(scales=None)
    words = torch.zeros((12, 32), dtype=torch.int32)
    for changes in (
        {"qweight": words[:, :31]},
        {"qweight": words[:0]},
        {"qweight": words[0]},
        {"qweight": words.float()},
        {"qweight": words[:11]},  # 88 columns in three groups
        {"qweight": words[:6]},  # groups of 16 are right, and g_idx of 96 columns is not
        {"qzeros": words[:2, :4]},
        {"qzeros": words[:3, :3]},  # 3 bits
        {"scales": torch.zeros((3, 32), dtype=torch.int32)},
        {"scales": torch.zeros((3, 0), dtype=torch.float16)},
        {"scales": torch.zeros((4, 32), dtype=torch.float16), "qzeros": words[:4, :4]},
    ):
        assert "a." in refusal(**changes)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["quant_method is 'bitsandbytes'", "GPTQ, AWQ"]),
        ({"bits": 4}, ["quant_method is 'None'"]),
        (GPTQ | {"bits": 3}, ["bits is '3'", "4 or 8"]),
        (GPTQ | {"checkpoint_format": "marlin"}, ["'marlin'", "gptq_v2"]),
        (GPTQ | {"is_marlin_format": True}, ["'marlin'", "gptq_v2"]),
        ("gptq", ["quantization_config is 'gptq'"]),
    ],
)
def test_an_unknown_scheme_is_named(
    quantization: object, words: list[str], tmp_path: Path, one_sentence: OneSentence
) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_model(write(tmp_path, {"a.weight": torch.ones(3)}, quantization))
    text = one_sentence(caught)
    assert str(tmp_path / "config.json") in text
    assert all(word in text for word in words), text


def test_a_quantized_folder_whose_config_does_not_say_so(
    tmp_path: Path, one_sentence: OneSentence
) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_model(write(tmp_path, pack_gptq("a", random_integers(32, 64, 4, 32)), None))
    assert "a.qweight" in (text := one_sentence(caught)) and "quantization_config" in text

"""FP8 folders of every kind of scale against torch, and how well 16 bits keep them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError, ModelFileError
from octavo.graph.tensors import BlockFloatTensor
from octavo.weights.loader import open_model
from tests.weights.packers import round_to_float8
from tests.weights.test_gptq import write

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = FP8 | {"weight_block_size": [128, 128]}
OneSentence = Callable[[pytest.ExceptionInfo[ConfigError]], str]


def compressed(strategy: str, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True} | changes
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def random_weight(rows: int = 200, columns: int = 320, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn((rows, columns), generator=random) * 0.05


def opened(folder: Path, tensors: dict[str, torch.Tensor], quantization: Any) -> BlockFloatTensor:
    files = open_model(write(folder, tensors, quantization))
    assert files.names() == {"a.weight"}
    found = files.tensor("a.weight")
    assert isinstance(found, BlockFloatTensor)
    outline = files.outline("a.weight")
    assert outline.shape == found.shape
    assert outline.widened_nbytes == found.to_half().nbytes
    return found


KINDS: list[tuple[str, tuple[int, int], tuple[int, ...] | None, Any]] = [
    ("weight_scale", (200, 320), (), FP8),
    ("weight_scale", (200, 320), (1,), compressed("tensor")),
    ("weight_scale", (1, 320), (200, 1), compressed("channel")),
    ("weight_scale", (1, 320), (200,), FP8),
    ("weight_scale_inv", (128, 128), None, BLOCKS),
    ("weight_scale", (128, 128), None, compressed("block", block_structure=[128, 128])),
    ("weight_scale", (64, 32), None, compressed("block", block_structure="64x32")),
    ("weight_scale_inv", (200, 320), (), FP8 | {"weight_block_size": None}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "block", "shape", "quantization"), KINDS)
def test_every_kind_of_scale(
    name: str,
    block: tuple[int, int],
    shape: tuple[int, ...] | None,
    quantization: Any,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    codes, scales, _ = round_to_float8(random_weight(), block)
    scales = scales.to(dtype)
    stored = scales if shape is None else scales.reshape(shape)
    found = opened(tmp_path, {"a.weight": codes, f"a.{name}": stored}, quantization)
    by_row = scales.float().repeat_interleave(block[0], 0)[:200]
    expected = (codes.float() * by_row.repeat_interleave(block[1], 1)[:, :320]).numpy()
    np.testing.assert_array_equal(found.dequantize(), expected)
    rows = np.random.default_rng(0).permutation(200)[:77]
    np.testing.assert_array_equal(found.take_rows(rows).dequantize(), expected[rows])
    assert found.input_scale is None


def test_every_code(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(8, 32)
    found = opened(tmp_path, {"a.weight": codes, "a.weight_scale": torch.tensor(1.0)}, FP8)
    np.testing.assert_array_equal(found.dequantize(), codes.float().numpy())


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    codes, _, _ = round_to_float8(random_weight(), (128, 128))
    exponents = torch.randint(110, 140, (2, 3), dtype=torch.uint8)
    stored = exponents.view(torch.float8_e8m0fnu)
    found = opened(tmp_path, {"a.weight": codes, "a.weight_scale_inv": stored}, BLOCKS)
    np.testing.assert_array_equal(found.scales, stored.float().numpy())


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
def test_a_static_input_scale_is_kept(name: str, tmp_path: Path) -> None:
    codes, scales, _ = round_to_float8(random_weight(), (200, 320))
    tensors = {"a.weight": codes, "a.weight_scale": scales, f"a.{name}": torch.tensor([0.0625])}
    assert opened(tmp_path, tensors, FP8).input_scale == 0.0625


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf"), 1e-39])
def test_an_input_scale_that_rounds_nothing_is_named(
    value: float, tmp_path: Path, one_sentence: OneSentence
) -> None:
    codes, scales, _ = round_to_float8(random_weight(), (200, 320))
    tensors = {"a.weight": codes, "a.weight_scale": scales, "a.input_scale": torch.tensor(value)}
    with pytest.raises(ModelFileError) as caught:
        opened(tmp_path, tensors, FP8)
    assert "a.input_scale is " in one_sentence(caught)


def test_what_is_left_out_stays_dense_and_cache_scales_are_no_weights(tmp_path: Path) -> None:
    codes, scales, _ = round_to_float8(random_weight(), (200, 320))
    tensors = {"a.weight": codes, "a.weight_scale": scales, "lm_head.weight": random_weight()}
    tensors |= {f"a.{name}_scale": torch.tensor(1.0) for name in ("k", "v")}
    files = open_model(write(tmp_path, tensors, compressed("tensor")))
    assert files.names() == {"a.weight", "lm_head.weight"}
    np.testing.assert_array_equal(files.tensor("lm_head.weight").dequantize(), random_weight())


@pytest.mark.parametrize(
    ("magnitude", "dtype", "limit"),
    [(0.05, "f16", 3e-4), (3e-6, "bf16", 2.5e-3), (1e5, "bf16", 2.5e-3)],
)
@pytest.mark.parametrize("block", [(200, 320), (1, 320), (128, 128)])
def test_sixteen_bits_add_little_to_the_error(
    block: tuple[int, int], magnitude: float, dtype: str, limit: float
) -> None:
    weight = random_weight() / 0.05 * magnitude
    codes, scales, _ = round_to_float8(weight, block)
    scales = scales.bfloat16().float()  # so that some products lie half-way between two bfloat16
    found = BlockFloatTensor(codes.view(torch.uint8).numpy(), scales.numpy(), block)
    values, half = torch.tensor(found.dequantize()), found.to_half()
    assert half.dtype == dtype
    if dtype == "bf16":
        np.testing.assert_array_equal(half.dequantize(), values.bfloat16().float().numpy())

    def error(ours: np.ndarray, exact: torch.Tensor) -> float:
        difference = torch.tensor(ours).double() - exact.double()
        return float(difference.norm() / exact.double().norm())

    assert error(half.dequantize(), values) < limit
    assert error(values.numpy(), weight) > 2e-2, "FP8's own"


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (compressed("channel", type="int"), ["float-quantized, int of 8 bits", "FP8"]),
        (compressed("group", type="int", num_bits=4), ["int of 4 bits"]),
        (compressed("tensor") | {"config_groups": None}, ["config_groups is 'None'"]),
        (compressed("tensor") | {"config_groups": {"g": {}}}, ["config_groups.g.weights"]),
        (
            compressed("tensor") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            ["sparse-24-bitmask", "dense"],
        ),
        (compressed("tensor") | {"transform_config": {"config_groups": {}}}, ["transform_config"]),
        (FP8 | {"weight_block_size": [128]}, ["weight_block_size is '[128]'"]),
        (FP8 | {"weight_block_size": [0, 128]}, ["weight_block_size"]),
        (compressed("block", block_structure="axb"), ["'axb'"]),
    ],
)
def test_other_schemes_are_named(
    quantization: Any, words: list[str], tmp_path: Path, one_sentence: OneSentence
) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_model(write(tmp_path, {"n.weight": torch.ones(3)}, quantization))
    text = one_sentence(caught)
    assert all(word in text for word in words), text


def test_scales_that_do_not_fit(tmp_path: Path, one_sentence: OneSentence) -> None:
    codes, scales, _ = round_to_float8(random_weight(), (128, 128))
    for stored, quantization in (
        (scales, FP8),
        (scales.T.contiguous(), BLOCKS),
        (scales.int(), BLOCKS),
        (torch.ones(320), BLOCKS),
    ):
        with pytest.raises(ModelFileError) as caught:
            tensors = {"a.weight": codes, "a.weight_scale": stored}
            open_model(write(tmp_path, tensors, quantization)).outline("a.weight")
        assert "a.weight F8_E4M3 [200, 320]" in one_sentence(caught)
    with pytest.raises(ModelFileError, match=r"no a\.weight_scale beside it; "):
        open_model(write(tmp_path, {"a.weight": codes}, FP8))
    with pytest.raises(ModelFileError, match=r"a\.weight F8_E5M2"):
        narrow = {"a.weight": torch.ones((2, 2)).to(torch.float8_e5m2)}
        narrow["a.weight_scale"] = torch.tensor(1.0)
        open_model(write(tmp_path, narrow, FP8)).outline("a.weight")

"""AWQ folders against what was packed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError, ModelFileError
from octavo.graph.tensors import GroupedTensor
from octavo.weights.loader import open_model
from tests.weights.packers import pack_awq, random_integers
from tests.weights.test_gptq import write

AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
OneSentence = Callable[[pytest.ExceptionInfo[ConfigError]], str]


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_every_code_and_zero_point(group: int, tmp_path: Path) -> None:
    weight = random_integers(48, 256, 4, group)
    files = open_model(write(tmp_path, pack_awq("a", weight), AWQ | {"group_size": group}))
    assert files.names() == {"a.weight"}
    found = files.tensor("a.weight")
    assert isinstance(found, GroupedTensor)
    assert (found.bits, found.group, found.format) == (4, 256 if group == -1 else group, "AWQ")
    np.testing.assert_array_equal(found.codes.values(), weight.codes.numpy())
    np.testing.assert_array_equal(found.dequantize(), weight.dequantized().numpy())
    outline = files.outline("a.weight")
    assert outline.shape == (48, 256)
    assert outline.widened_nbytes == 48 * 256 // 2 + 48 * 256 // 32 * 4


def test_one_word_as_autoawq_draws_it(tmp_path: Path) -> None:
    """Nibble i of a word, counted from its low end, is row 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    tensors = {
        "a.qweight": torch.full((32, 1), 0x76543210, dtype=torch.int32),
        "a.qzeros": torch.zeros((1, 1), dtype=torch.int32),
        "a.scales": torch.ones((1, 8), dtype=torch.float16),
    }
    found = open_model(write(tmp_path, tensors, AWQ)).tensor("a.weight").dequantize()
    assert found[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "gemv_fast"}, ["version is 'gemv_fast'", '"gemm"']),
        ({"backend": "llm-awq"}, ["version is 'llm-awq'"]),
        ({"bits": 8}, ["bits is '8'"]),
    ],
)
def test_other_versions_are_named(
    changes: dict[str, Any], words: list[str], tmp_path: Path, one_sentence: OneSentence
) -> None:
    tensors = pack_awq("a", random_integers(32, 64, 4, 32))
    with pytest.raises(ModelFileError) as caught:
        open_model(write(tmp_path, tensors, AWQ | changes))
    text = one_sentence(caught)
    assert all(word in text for word in words), text


def test_an_older_config_needs_no_version(tmp_path: Path) -> None:
    tensors = pack_awq("a", random_integers(32, 64, 4, 32))
    config = {"quant_method": "awq", "w_bit": 4, "version": "GEMM"}
    assert open_model(write(tmp_path, tensors, config)).names() == {"a.weight"}


def test_shapes_that_do_not_fit(tmp_path: Path, one_sentence: OneSentence) -> None:
    good = pack_awq("a", random_integers(32, 64, 4, 32))
    for name, tensor in (
        ("a.qweight", good["a.qweight"][:, :3]),
        ("a.qweight", good["a.qweight"][:63]),
        ("a.qzeros", good["a.qzeros"][:1]),
        ("a.scales", good["a.scales"][:, :31]),
    ):
        with pytest.raises(ModelFileError) as caught:
            open_model(write(tmp_path, good | {name: tensor}, AWQ)).outline("a.weight")
        assert "AWQ" in one_sentence(caught)

"""One model from its files: both kinds, many files, and what a user may give by mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from octavo.errors import ModelFileError
from octavo.graph.tensors import DenseTensor
from octavo.weights.loader import open_model

OneSentence = Callable[[pytest.ExceptionInfo[ModelFileError]], str]


def write_folder(folder: Path, parts: dict[str, dict[str, np.ndarray]]) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in parts.items():
        safetensors.numpy.save_file(tensors, folder / name)
    if len(parts) > 1:
        files = {tensor: name for name, tensors in parts.items() for tensor in tensors}
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refusal(path: Path, one_sentence: OneSentence) -> str:
    with pytest.raises(ModelFileError) as caught:
        open_model(path)
    return one_sentence(caught)


def test_a_gguf_file(small_gguf: Path) -> None:
    files = open_model(small_gguf)
    assert (files.kind, files.architecture) == ("gguf", "llama")
    assert files.config["test.string"] == "grüße 你好 🐙"
    assert {"norm", "half", "Q4_1", "Q6_K"} <= files.names()
    norm = files.tensor("norm")
    files.close()
    assert norm.shape == (5,)
    assert np.isfinite(norm.dequantize()).all(), "a tensor outlives its file"
    assert isinstance(norm, DenseTensor)
    assert not norm.data.flags.writeable


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    files = open_model(write_folder(tmp_path / "m", {"model.safetensors": {"a": matrix}}))
    assert (files.kind, files.architecture) == ("folder", "LlamaForCausalLM")
    assert files.config["hidden_size"] == 4
    np.testing.assert_array_equal(files.tensor("a").dequantize(), matrix)
    files.close()


def test_a_folder_with_many_files(tmp_path: Path) -> None:
    parts = {
        "model-00001-of-00002.safetensors": {"a": np.ones(3, np.float32)},
        "model-00002-of-00002.safetensors": {"b": np.full(2, 2, np.float16)},
    }
    files = open_model(str(write_folder(tmp_path / "m", parts)))
    assert files.names() == {"a", "b"}
    assert files.tensor("a").dequantize().tolist() == [1, 1, 1]
    assert files.tensor("b").dequantize().tolist() == [2, 2]
    with pytest.raises(ModelFileError, match="no tensor 'c'; "):
        files.tensor("c")


def test_a_missing_part_and_a_tensor_in_two_parts(
    tmp_path: Path, one_sentence: OneSentence
) -> None:
    parts = {
        "1.safetensors": {"a": np.ones(3, np.float32)},
        "2.safetensors": {"b": np.ones(3, np.float32)},
    }
    folder = write_folder(tmp_path / "m", parts)
    safetensors.numpy.save_file({"a": np.ones(1), "b": np.ones(1)}, folder / "2.safetensors")
    assert "tensor 'a' in two files" in refusal(folder, one_sentence)
    (folder / "2.safetensors").unlink()
    assert "2.safetensors does not exist" in refusal(folder, one_sentence)


def test_an_unsupported_dtype_names_file_and_tensor(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"model.safetensors": {"ids": np.arange(3)}})
    files = open_model(folder)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: tensor ids .* I64"):
        files.tensor("ids")


def test_what_is_no_model(tmp_path: Path, one_sentence: OneSentence) -> None:
    assert "does not exist" in refusal(tmp_path / "none", one_sentence)
    (tmp_path / "empty.gguf").touch()
    assert "is empty" in refusal(tmp_path / "empty.gguf", one_sentence)
    (tmp_path / "page.gguf").write_text("\n<!doctype html><html><body>Sign in</body></html>")
    assert "web page" in refusal(tmp_path / "page.gguf", one_sentence)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no config.json" in refusal(folder, one_sentence)
    (folder / "q4.gguf").touch()
    assert f"such as {folder / 'q4.gguf'}" in refusal(folder, one_sentence)
    for text, cause in (("{", "JSON"), ("[]", "object"), ("{}", '"architectures"')):
        (folder / "config.json").write_text(text)
        assert cause in refusal(folder, one_sentence)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}")
    assert "never read" in refusal(folder, one_sentence)
    safetensors.numpy.save_file({"a": np.ones(3)}, folder / "model.safetensors")
    assert "looks like safetensors" in refusal(folder / "model.safetensors", one_sentence)
    open_model(folder).close()


def test_a_split_gguf_is_refused(tmp_path: Path, one_sentence: OneSentence) -> None:
    path = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "one of 3 parts" in refusal(path, one_sentence)


def test_a_gguf_without_architecture(tmp_path: Path, one_sentence: OneSentence) -> None:
    path = tmp_path / "nameless.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    assert "general.architecture" in refusal(path, one_sentence)

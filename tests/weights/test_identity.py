"""The name of a model's weights: the same for the same files, another for others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from octavo.weights.identity import NUM_PIECES, PIECE_BYTES
from octavo.weights.loader import open_model


def digest(path: Path) -> str:
    files = open_model(path)
    try:
        return files.digest()
    finally:
        files.close()


def change(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two files: a large tensor, and small ones."""
    (tmp_path / "a").mkdir()
    random = np.random.default_rng(1)
    parts = {
        "one.safetensors": {"large": random.normal(size=(1024, 1024)).astype(np.float32)},
        "two.safetensors": {"norm": np.ones(64, np.float32), "bias": np.zeros(3, np.float32)},
    }
    for name, tensors in parts.items():
        safetensors.numpy.save_file(tensors, tmp_path / "a" / name)
    files = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    index = {"weight_map": files}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    return tmp_path / "a"


def test_a_copy_has_the_same_name(folder: Path, small_gguf: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "b")
    assert digest(tmp_path / "b") == digest(folder)
    shutil.copy(small_gguf, tmp_path / "copy.gguf")
    assert digest(tmp_path / "copy.gguf") == digest(small_gguf)
    assert digest(folder) != digest(small_gguf)
    assert len(digest(folder)) == 64


def test_the_configuration_counts_and_its_spaces_do_not(folder: Path) -> None:
    before = digest(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config, indent=4))
    assert digest(folder) == before
    path.write_text(json.dumps(config | {"rope_theta": 10001.0}))
    assert digest(folder) != before


def test_other_weights_of_equal_shapes_have_another_name(folder: Path) -> None:
    before = digest(folder)
    tensors = safetensors.numpy.load_file(folder / "one.safetensors")
    tensors["large"] *= np.float32(1.001)
    safetensors.numpy.save_file(tensors, folder / "one.safetensors")
    assert digest(folder) != before


def test_every_byte_of_a_small_tensor_and_of_the_head_counts(folder: Path) -> None:
    path = folder / "two.safetensors"
    size = path.stat().st_size
    seen = {digest(folder)}
    for offset in (size - 1, size - 12, size - 13, size - 100, size - 64 * 4 - 12):
        change(path, offset)
        seen.add(digest(folder))
    assert len(seen) == 6


def test_pieces_of_a_large_tensor_are_spread_over_its_length(folder: Path) -> None:
    """Changing a stretch that no piece leaves out shows, wherever it lies."""
    path = folder / "one.safetensors"
    size = path.stat().st_size
    stretch = 3 * 4 * 1024 * 1024 // NUM_PIECES  # Three tensors share the pieces.
    assert stretch > PIECE_BYTES
    original, before = path.read_bytes(), digest(folder)
    for start in range(size - 4 * 1024 * 1024, size - stretch, 37 * stretch):
        changed = bytearray(original)
        changed[start : start + stretch] = bytes(b ^ 1 for b in changed[start : start + stretch])
        path.write_bytes(changed)
        assert digest(folder) != before, start


def test_a_gguf_files_metadata_counts(small_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(small_gguf, path)
    change(path, path.read_bytes().index("grüße".encode()))
    assert digest(path) != digest(small_gguf)

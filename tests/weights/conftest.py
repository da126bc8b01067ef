"""A small GGUF file with every kind of metadata and every format, written by the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.errors import ConfigError

Blocks = Callable[[str, int, int], NDArray[np.uint8]]

# Where the float16 numbers stand in a block of each format.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def make_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes of a format with finite float16 numbers (zeros, negative and tiny ones too)."""
    random = np.random.default_rng([seed, rows, blocks, len(name), ord(name[1])])
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = random.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    for start in HALVES[name]:
        halves = (random.normal(size=(rows, blocks)) * 0.1).astype(np.float16)
        halves[random.random((rows, blocks)) < 0.1] = 0
        halves[random.random((rows, blocks)) < 0.1] = 3e-6  # subnormal
        data[:, :, start : start + 2] = halves[:, :, None].view(np.uint8)
    return data.reshape(rows, blocks * block_bytes)


def write_gguf(path: Path, *, arrays: bool = True, alignment: int = 32) -> None:
    """Write the small file."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        number = 100 if kind.startswith("u") else -100
        getattr(writer, f"add_{kind}")(f"test.{kind}", number)
    writer.add_float32("test.float32", 0.1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.true", True)
    writer.add_bool("test.false", False)
    writer.add_string("test.string", "grüße 你好 🐙")
    if arrays:
        writer.add_array("test.strings", ["", "a", "ä", "🐙" * 100])
        writer.add_array("test.ints", [1, -2, 3])
        writer.add_array("test.floats", [0.5, -0.25])
        writer.add_array("test.bools", [True, False, True])
        writer.add_array("test.nested", [[1, 2], [3]])
    random = np.random.default_rng(7)
    writer.add_tensor("norm", random.normal(size=5).astype(np.float32))
    writer.add_tensor("half", random.normal(size=(3, 7)).astype(np.float16))
    for name in HALVES:
        data = make_blocks(name, 2, 1 if name.endswith("K") else 2)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def blocks() -> Blocks:
    """Random blocks: (format, rows, blocks a row) → bytes [rows, bytes]."""
    return make_blocks


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small file."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    home = tmp_path / "cache"
    monkeypatch.setenv("OCTAVO_HOME", str(home))
    return home


@pytest.fixture
def one_sentence() -> Callable[[pytest.ExceptionInfo[ConfigError]], str]:
    """Checks that a refusal is one line with a cause and a remedy; gives its text."""

    def check(caught: pytest.ExceptionInfo[ConfigError]) -> str:
        text = str(caught.value)
        assert "\n" not in text
        assert ";" in text, "no remedy"
        assert not text.endswith(".")
        assert len(text) < 1000
        return text

    return check

"""The safetensors parser against the safetensors package, and against a file's lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFileError
from octavo.weights.formats.registry import SUPPORTED, read_tensor
from octavo.weights.safetensors import SafetensorsFile, find_files

OneSentence = Callable[[pytest.ExceptionInfo[ModelFileError]], str]


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(begin: int, end: int, shape: list[object] | None = None) -> dict[str, object]:
    if shape is None:
        shape = [(end - begin) // 4]
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the supported dtypes, an integer, a scalar and an empty tensor."""
    random = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("safetensors") / "model.safetensors"
    safetensors.numpy.save_file(
        {
            "matrix": random.normal(size=(3, 5)).astype(np.float32),
            "half": random.normal(size=(2, 3, 2)).astype(np.float16),
            "ids": np.arange(5),
            "scalar": np.array(4.5, np.float32),
            "empty": np.zeros((0, 4), np.float32),
        },
        path,
        metadata={"format": "pt"},
    )
    return path


def test_agrees_with_the_safetensors_package(small: Path) -> None:
    theirs = safetensors.numpy.load_file(small)
    file = SafetensorsFile.open(small)
    assert set(file.tensors) == set(theirs)
    for name, info in file.tensors.items():
        if info.type not in SUPPORTED:
            with pytest.raises(ModelFileError, match="I64"):
                read_tensor(info, file.buffer)
            continue
        tensor = read_tensor(info, file.buffer)
        assert tensor.shape == theirs[name].shape
        np.testing.assert_array_equal(tensor.dequantize(), theirs[name].astype(np.float32))
    file.close()


def test_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    data = struct.pack("<3H", 0x3F80, 0xC000, 0x0001)
    path.write_bytes(file_of({"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, data))
    file = SafetensorsFile.open(path)
    values = read_tensor(file.tensors["x"], file.buffer).dequantize()
    assert values.tolist() == [1.0, -2.0, 2.0**-133]
    assert safetensors.deserialize(path.read_bytes())[0][1]["dtype"] == "BF16"


HUGE = 1 << 63
LIES: dict[str, tuple[bytes, str]] = {
    "seven bytes": (bytes(7), "only 7 bytes"),
    "header of 2**63 bytes": (file_of({}, length=HUGE), f"header of {HUGE} bytes"),
    "header past the end": (file_of({}, length=3), "header of 3 bytes"),
    "header cut": (file_of({"x": f32(0, 4)}, bytes(4), length=20), "not JSON"),
    "header of zeros": (bytes(100), "not JSON"),
    "not UTF-8": (file_of(b"{\xff}"), "not JSON"),
    "a list": (file_of([]), "not an object"),
    "nested deep": (file_of(b"[" * 100_000), "not JSON"),
    "number of a million digits": (file_of(b'{"x":' + b"9" * 10**6 + b"}"), "not JSON"),
    "name twice": (
        file_of(b'{"x":%b,"x":%b}' % ((json.dumps(f32(0, 4)).encode(),) * 2), bytes(4)),
        "same name twice",
    ),
    "entry is text": (file_of({"x": "F32"}), "no known way"),
    "entry lacks a field": (file_of({"x": {"dtype": "F32", "shape": []}}), "no known way"),
    "entry has another field": (file_of({"x": f32(0, 4) | {"y": 1}}, bytes(4)), "no known way"),
    "unknown dtype": (
        file_of({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "unknown dtype 'F31'",
    ),
    "dtype is a list": (
        file_of({"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "unknown dtype",
    ),
    "shape of floats": (file_of({"x": f32(0, 4, [1.0])}, bytes(4)), "impossible shape"),
    "shape of booleans": (file_of({"x": f32(0, 4, [True])}, bytes(4)), "impossible shape"),
    "negative shape": (file_of({"x": f32(0, 4, [-1, -1])}, bytes(4)), "impossible shape"),
    "shape is a number": (
        file_of({"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, bytes(4)),
        "impossible shape",
    ),
    "negative offset": (file_of({"x": f32(-4, 0)}, bytes(4)), "offsets"),
    "three offsets": (
        file_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)),
        "offsets",
    ),
    "end before begin": (file_of({"x": f32(8, 4, [1])}, bytes(8)), "in -4 bytes"),
    "shape too large": (file_of({"x": f32(0, 4, [2])}, bytes(4)), "in 4 bytes"),
    "shape that wraps": (
        file_of({"x": f32(0, 4, [(1 << 62) + 1, 4])}, bytes(4)),
        "in 4 bytes",
    ),
    "past the end": (file_of({"x": f32(0, 8)}, bytes(4)), "overlap of 4 bytes at its end"),
    "overlap": (
        file_of({"x": f32(0, 8), "y": f32(4, 12)}, bytes(12)),
        "overlap of 4 bytes before the tensor 'y'",
    ),
    "hole": (file_of({"x": f32(0, 4), "y": f32(8, 12)}, bytes(12)), "hole of 4 bytes"),
    "hole at the start": (file_of({"x": f32(4, 8)}, bytes(8)), "hole of 4 bytes"),
    "bytes left over": (file_of({"x": f32(0, 4)}, bytes(5)), "hole of 1 bytes at its end"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_sentence(tmp_path: Path, one_sentence: OneSentence, lie: str) -> None:
    data, cause = LIES[lie]
    path = tmp_path / "lie.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        SafetensorsFile.open(path)
    assert cause in one_sentence(caught)


def test_every_cut_of_a_file_is_refused(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            SafetensorsFile.open(path)


PIECES = [b"{", b"}", b"[", b"]", b"0", b"-", b"9", b",", b":", b'"', b"F32", b"I64", b"\xff", b" "]


@settings(max_examples=400, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 600), st.one_of(st.sampled_from(PIECES), st.binary(max_size=9))),
        max_size=5,
    ),
    added=st.integers(-20, 20),
)
@example(changes=[], added=0)
def test_fuzz(
    tmp_path_factory: pytest.TempPathFactory,
    small: Path,
    changes: list[tuple[int, bytes]],
    added: int,
) -> None:
    """Any change is read or refused; what we read, the safetensors package reads alike."""
    data = bytearray(small.read_bytes())
    for position, new in changes:
        data[position : position + len(new)] = new
    data = data[:added] if added < 0 else data + bytes(added)
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile.open(path)
    except ModelFileError as error:
        assert "\n" not in str(error)
        return
    theirs = dict(safetensors.deserialize(bytes(data)))
    assert set(theirs) == set(file.tensors)
    for name, info in file.tensors.items():
        assert list(info.shape) == theirs[name]["shape"]
        if info.type in SUPPORTED:
            found = file.buffer[info.offset : info.offset + info.nbytes]
            assert found == bytes(theirs[name]["data"])
            assert read_tensor(info, file.buffer).shape == info.shape
    file.close()


def index_of(folder: Path, files: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(files))
    return path


def test_which_files_belong_to_a_model(tmp_path: Path, one_sentence: OneSentence) -> None:
    def refusal() -> str:
        with pytest.raises(ModelFileError) as caught:
            find_files(tmp_path)
        return one_sentence(caught)

    assert "no safetensors file" in refusal()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "never read" in refusal()
    (tmp_path / "other.safetensors").touch()
    assert [f.name for f in find_files(tmp_path)] == ["other.safetensors"]
    (tmp_path / "more.safetensors").touch()
    assert "no model.safetensors.index.json" in refusal()
    (tmp_path / "model.safetensors").touch()
    assert [f.name for f in find_files(tmp_path)] == ["model.safetensors"]
    names = {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}
    index_of(tmp_path, {"weight_map": names})
    assert [f.name for f in find_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"x": 1}},
        {"weight_map": {"x": "../a.safetensors"}},
        {"weight_map": {"x": "/etc/a.safetensors"}},
        {"weight_map": {"x": "sub/a.safetensors"}},
        {"weight_map": {"x": "a.bin"}},
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, one_sentence: OneSentence, index: object) -> None:
    index_of(tmp_path, index)
    with pytest.raises(ModelFileError) as caught:
        find_files(tmp_path)
    one_sentence(caught)


def test_an_index_that_is_not_json(tmp_path: Path) -> None:
    index_of(tmp_path, {}).write_bytes(b"[" * 100_000)
    with pytest.raises(ModelFileError, match="not readable JSON"):
        find_files(tmp_path)

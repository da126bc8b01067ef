"""The GGUF reader against the gguf package, and against every lie that a file can tell."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFileError
from octavo.weights.formats.registry import SUPPORTED, read_tensor
from octavo.weights.gguf import TENSOR_TYPES, GGUFFile, TensorType

OneSentence = Callable[[pytest.ExceptionInfo[ModelFileError]], str]


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = tuple(dims)
    return (
        string(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def document(
    *,
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    num_entries: int | None = None,
    num_tensors: int | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


LLAMA = entry("general.architecture", 8, string("llama"))


def array(element: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + data


def test_agrees_with_the_gguf_package(small_gguf: Path) -> None:
    reference = gguf.GGUFReader(small_gguf)
    with GGUFFile.open(small_gguf) as file:
        names = [name for name in reference.fields if not name.startswith("GGUF.")]
        assert list(file.metadata) == names
        for name in names:
            if name != "test.nested":
                assert file.metadata[name] == reference.fields[name].contents(), name
        assert [t.name for t in reference.tensors] == list(file.tensors)
        for theirs in reference.tensors:
            ours = file.tensors[theirs.name]
            assert ours.shape == tuple(int(d) for d in theirs.shape[::-1])
            assert ours.type == theirs.tensor_type.name
            assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)


def test_values_and_types_of_metadata(small_gguf: Path) -> None:
    with GGUFFile.open(small_gguf) as file:
        metadata = file.metadata
        assert metadata["test.true"] is True
        assert metadata["test.false"] is False
        assert metadata["test.int64"] == -100
        assert metadata["test.float64"] == 0.1
        assert metadata["test.float32"] == float(np.float32(0.1))
        assert metadata["test.strings"] == ["", "a", "ä", "🐙" * 100]
        assert metadata["test.strings"] is metadata["test.strings"]
        assert metadata["test.bools"] == [True, False, True]
        assert metadata["test.nested"] == [[1, 2], [3]]
        assert "test.none" not in metadata
        assert metadata.get("test.none", 3) == 3
        assert dict(metadata).keys() == metadata.keys()


def test_every_type_has_the_size_that_the_format_says() -> None:
    ours = {
        number: TensorType(t.name, t.block_len, t.block_bytes) for number, t in TENSOR_TYPES.items()
    }
    theirs = {
        kind.value: TensorType(kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()
    }
    assert {k: v for k, v in ours.items() if k in theirs} == {
        k: v for k, v in theirs.items() if k in ours
    }
    assert {kind.name for kind in TENSOR_TYPES.values()} >= set(SUPPORTED)


def test_the_default_model_opens_quickly(smollm2_path: Path) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with GGUFFile.open(smollm2_path) as file:
            seconds.append(time.perf_counter() - start)
            assert len(file.tensors) == 272
            tokens = file.metadata["tokenizer.ggml.tokens"]
            assert isinstance(tokens, list)
            assert (len(tokens), tokens[1]) == (49152, "<|im_start|>")
    assert min(seconds) < 0.15


def test_versions_two_and_three(tmp_path: Path) -> None:
    for version in (2, 3):
        path = tmp_path / f"{version}.gguf"
        data = np.arange(4, dtype="<f4")
        path.write_bytes(
            document(
                entries=[LLAMA], tensors=[tensor("x", [2, 2])], data=data.tobytes(), version=version
            )
        )
        with GGUFFile.open(path) as file:
            info = file.tensors["x"]
            assert info.shape == (2, 2)
            assert bytes(file.buffer[info.offset : info.offset + info.nbytes]) == data.tobytes()


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    aligned = entry("general.alignment", 4, struct.pack("<I", alignment))
    path.write_bytes(
        document(
            entries=[aligned], tensors=[tensor("x", [2])], data=b"abcdefgh", alignment=alignment
        )
    )
    with GGUFFile.open(path) as file:
        assert file.tensors["x"].offset % alignment == 0
        assert file.buffer[file.tensors["x"].offset :] == b"abcdefgh"


HUGE = 1 << 63
LIES: dict[str, tuple[bytes, str]] = {
    "version 1": (document(version=1), "version 1"),
    "version 4": (document(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "magic": (b"GGML" + bytes(100), "not a GGUF file"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "zip": (b"PK\x03\x04" + bytes(30), "zip"),
    "only magic": (b"GGUF", "ends at byte 4"),
    "cut header": (document()[:20], "ends at byte 20"),
    "a million tensors": (document(num_tensors=10**6), "1000000 tensors"),
    "many tensors": (document(num_tensors=50_000), "ends at byte"),
    "2**63 tensors": (document(num_tensors=HUGE), "tensors"),
    "2**63 entries": (document(num_entries=HUGE), "metadata entries"),
    "many entries": (document(num_entries=50_000), "ends at byte"),
    "key of 2**63 bytes": (
        document(entries=[struct.pack("<Q", HUGE)]),
        f"a metadata key of {HUGE} bytes",
    ),
    "string of 2**63 bytes": (
        document(entries=[entry("k", 8, struct.pack("<Q", HUGE))]),
        "ends at byte",
    ),
    "string of 2**64-1 bytes": (
        document(entries=[entry("k", 8, struct.pack("<Q", 2 * HUGE - 1))]),
        "ends at byte",
    ),
    "key twice": (document(entries=[LLAMA, LLAMA]), "'general.architecture' twice"),
    "unknown value type": (document(entries=[entry("k", 99, b"")]), "unknown type 99"),
    "bool of 2": (document(entries=[entry("k", 7, b"\x02")]), "2 as a boolean"),
    "key not UTF-8": (
        document(entries=[string(b"\xff") + struct.pack("<I", 0) + b"\0"]),
        "not UTF-8",
    ),
    "string not UTF-8": (document(entries=[entry("k", 8, string(b"\xc3"))]), "not UTF-8"),
    "array of 2**63 numbers": (document(entries=[entry("k", 9, array(4, HUGE))]), "ends at byte"),
    "array of 2**63 strings": (document(entries=[entry("k", 9, array(8, HUGE))]), "claims"),
    "array of 2**63 arrays": (document(entries=[entry("k", 9, array(9, HUGE))]), "claims"),
    "array of unknown": (document(entries=[entry("k", 9, array(13, 1))]), "unknown type 13"),
    "string in array of 2**63 bytes": (
        document(entries=[entry("k", 9, array(8, 2, struct.pack("<QQ", HUGE, 0)))]),
        "ends at byte",
    ),
    "strings that end past the file": (
        document(entries=[entry("k", 9, array(8, 1, struct.pack("<Q", 1000)))]),
        "ends at byte",
    ),
    "arrays too deep": (
        document(entries=[entry("k", 9, array(9, 1) * 8 + array(0, 1, b"\0"))]),
        "nested deeper",
    ),
    "alignment 0": (document(entries=[entry("general.alignment", 4, bytes(4))]), "alignment 0"),
    "alignment 24": (
        document(entries=[entry("general.alignment", 4, struct.pack("<I", 24))]),
        "alignment 24",
    ),
    "alignment as text": (
        document(entries=[entry("general.alignment", 8, string("32"))]),
        "alignment '32'",
    ),
    "no dimensions": (document(tensors=[tensor("x", [])]), "0 dimensions"),
    "five dimensions": (document(tensors=[tensor("x", [1] * 5)]), "5 dimensions"),
    "2**32-1 dimensions": (
        document(tensors=[string("x") + struct.pack("<I", 2**32 - 1)]),
        "dimensions",
    ),
    "dimension of 0": (document(tensors=[tensor("x", [0, 4])]), "impossible shape"),
    "dimensions that overflow": (
        document(tensors=[tensor("x", [1 << 32, 1 << 32, 1 << 32])]),
        "inside the tensor 'x'",
    ),
    "dimensions that wrap to 0": (
        document(tensors=[tensor("x", [1 << 62, 4, 1 << 62, 16])], data=bytes(64)),
        "inside the tensor 'x'",
    ),
    "part of a block": (
        document(tensors=[tensor("x", [33], 2)], data=bytes(64)),
        "impossible shape",
    ),
    "unknown tensor type": (document(tensors=[tensor("x", [32], 77)]), "unknown type 77"),
    "tensor twice": (
        document(tensors=[tensor("x", [1]), tensor("x", [1], 0, 32)], data=bytes(64)),
        "'x' twice",
    ),
    "offset not aligned": (
        document(tensors=[tensor("x", [1], 0, 4)], data=bytes(64)),
        "not a multiple of 32",
    ),
    "offset past the end": (
        document(tensors=[tensor("x", [1], 0, 64)], data=bytes(64)),
        "inside the tensor 'x'",
    ),
    "offset of 2**63": (document(tensors=[tensor("x", [1], 0, HUGE)]), "inside the tensor 'x'"),
    "overlap": (
        document(tensors=[tensor("x", [16]), tensor("y", [8], 0, 32)], data=bytes(64)),
        "overlap",
    ),
    "same place": (
        document(tensors=[tensor("x", [8]), tensor("y", [8])], data=bytes(64)),
        "overlap",
    ),
    "cut data": (document(tensors=[tensor("x", [16])], data=bytes(63)), "inside the tensor 'x'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_sentence(tmp_path: Path, one_sentence: OneSentence, lie: str) -> None:
    data, cause = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        GGUFFile.open(path)
    text = one_sentence(caught)
    assert text.startswith(str(path))
    assert cause in text


def test_missing_empty_and_no_file(tmp_path: Path, one_sentence: OneSentence) -> None:
    (tmp_path / "empty.gguf").touch()
    for name, cause in (("none.gguf", "does not exist"), ("empty.gguf", "is empty"), (".", "read")):
        with pytest.raises(ModelFileError) as caught:
            GGUFFile.open(tmp_path / name)
        assert cause in one_sentence(caught)
    with pytest.raises(ModelFileError, match="not a regular file"):
        GGUFFile.open("/dev/null")
    with pytest.raises(ModelFileError, match="cannot be read"):
        GGUFFile.open("a\0b")


def test_a_late_refusal_names_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "late.gguf"
    strings = array(8, 2, string("ok") + string(b"\xff"))
    path.write_bytes(
        document(entries=[entry("words", 9, strings), entry("flags", 9, array(7, 2, b"\x01\x02"))])
    )
    with GGUFFile.open(path) as file:
        assert "words" in file.metadata
        assert file.metadata.length("words") == 2, "counted, not decoded"
        with pytest.raises(ModelFileError, match=r"'words' has a string at index 1 .* not UTF-8"):
            file.metadata["words"]
        with pytest.raises(ModelFileError, match="'flags'"):
            file.metadata["flags"]


def test_every_cut_of_a_file_is_refused(small_gguf: Path, tmp_path: Path) -> None:
    """A file without its last byte of data, or cut anywhere before, never opens."""
    whole = small_gguf.read_bytes()
    with GGUFFile.open(small_gguf) as file:
        needed = max(info.offset + info.nbytes for info in file.tensors.values())
    path = tmp_path / "cut.gguf"
    for length in [*range(1, 700), *range(700, needed, 97), needed - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            GGUFFile.open(path)
    path.write_bytes(whole[:needed])
    GGUFFile.open(path).close()


INTERESTING = [
    0,
    1,
    7,
    0xFF,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    HUGE - 1,
    HUGE,
    2 * HUGE - 1,
]
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 3000),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([struct.pack("<Q", n) for n in INTERESTING]),
            st.sampled_from([struct.pack("<I", n) for n in range(16)]),
        ),
    ),
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(changes=CHANGES, cut=st.integers(0, 4000), splice=st.integers(0, 40))
@example(changes=[], cut=0, splice=0)
def test_fuzz(
    tmp_path_factory: pytest.TempPathFactory,
    small_gguf: Path,
    changes: list[tuple[int, bytes]],
    cut: int,
    splice: int,
) -> None:
    """Any change of a valid file is read or refused; nothing else may come of it."""
    data = bytearray(small_gguf.read_bytes())
    for position, new in changes:
        data[position : position + len(new)] = new
    if splice:
        del data[100 : 100 + splice]
    if cut and changes:
        del data[max(1, len(data) - cut) :]
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(data)
    try:
        file = GGUFFile.open(path)
    except ModelFileError as error:
        assert "\n" not in str(error)
        return
    for key in file.metadata:
        try:
            assert file.metadata[key] is not None
        except ModelFileError:
            continue
    with np.errstate(all="ignore"):
        for info in file.tensors.values():
            try:
                assert read_tensor(info, file.buffer).dequantize().shape == info.shape
            except ModelFileError:
                continue
    file.close()

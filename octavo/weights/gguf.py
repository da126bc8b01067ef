"""GGUF files (versions 2 and 3, little endian) over mmap, every length and offset checked.

Layout: header (magic, version, number of tensors, number of metadata entries), metadata, tensor
table, padding to `general.alignment`, tensor data. Strings are UTF-8 with a 64-bit length; a
tensor's offset counts from the data's start.

Opening a file verifies its whole structure but decodes arrays (a vocabulary has up to 500,000
strings) only when somebody asks for them. Knows nothing of what tensors mean (`formats` does) and
imports no numpy, so that the HTTP process can read a vocabulary.

Source: the GGUF specification of the ggml project.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path

from octavo.errors import ModelFileError
from octavo.weights.mapping import TensorInfo, close_mapping, map_file

_MAX_ENTRIES = 1 << 16  # metadata entries, and tensors: the largest models have a few thousand
_MAX_NAME_BYTES = 1024
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a type of tensor is stored: blocks of `block_len` elements in `block_bytes` bytes."""

    name: str
    block_len: int
    block_bytes: int


# Every type in use is known by size, so that a file's table can be checked; `formats` says which
# are supported.
TENSOR_TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 40),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
}


@dataclass(frozen=True, slots=True)
class _ArraySpan:
    """An array whose extent has been checked and whose elements are still in the file."""

    element: int
    count: int
    start: int


class _CorruptError(Exception):
    """What is wrong, without the file's name; becomes a ModelFileError inside this module."""


class Metadata(Mapping[str, object]):
    """A file's metadata: numbers, booleans, strings and lists of them.

    Arrays are decoded on first access and kept; ask for them before the file is closed.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, values: dict[str, object]) -> None:
        """Take the values as scanned, arrays still as spans."""
        self._path = path
        self._buffer = buffer
        self._values = values

    def __getitem__(self, key: str) -> object:
        """The value, decoded if it is still in the file.

        Raises:
            KeyError: the file has no such entry.
            ModelFileError: a string of an array is not UTF-8.
        """
        value = self._values[key]
        if isinstance(value, _ArraySpan):
            try:
                value = _decode_array(self._buffer, value)[0]
            except _CorruptError as error:
                raise _refusal(self._path, f"metadata entry {key!r} {error}") from None
            self._values[key] = value
        return value

    def length(self, key: str) -> int:
        """How many elements an array has, decoding none; 0 if there is no such array."""
        value = self._values.get(key)
        if isinstance(value, _ArraySpan):
            return value.count
        return len(value) if isinstance(value, list) else 0

    def __iter__(self) -> Iterator[str]:
        """The keys in the file's order."""
        return iter(self._values)

    def __len__(self) -> int:
        """The number of entries."""
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        """Whether the file has the entry; decodes nothing."""
        return key in self._values


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: the file.
        metadata: see Metadata.
        tensors: name → TensorInfo, in the file's order.
        buffer: the whole file, mapped read-only.
    """

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        """Scan a mapped file; use `open`."""
        self.path = path
        self.buffer = buffer
        scan = _Scan(buffer)
        num_tensors, num_entries = scan.header()
        self.metadata = Metadata(path, buffer, scan.metadata(num_entries))
        self.tensors = scan.tensors(num_tensors, _alignment(self.metadata))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map a file and check its structure.

        Raises:
            ModelFileError: the file is missing, cut, corrupt, or of another version or byte order.
        """
        path = Path(path)
        buffer = map_file(path)
        try:
            return cls(path, buffer)
        except _CorruptError as error:
            buffer.close()
            raise _refusal(path, str(error)) from None
        except BaseException:
            buffer.close()
            raise

    def close(self) -> None:
        """Unmap the file, or leave that to the last tensor that is still a view of it."""
        close_mapping(self.buffer)

    def __enter__(self) -> GGUFFile:
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class _Scan:
    """One pass over the head of a file; every read is checked against the file's size."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._size = len(buffer)
        self._position = 0

    def header(self) -> tuple[int, int]:
        """Check magic and version; return the numbers of tensors and metadata entries."""
        magic = self._buffer[:4]
        if magic != b"GGUF":
            raise _CorruptError(_what_instead(self._buffer[:256]))
        self._position = 4
        version = self._u32()
        if version & 0xFFFF == 0 and version != 0:
            raise _CorruptError("is big-endian; take the little-endian file of the model")
        if version not in (2, 3):
            raise _CorruptError(
                f"has GGUF version {version}, only 2 and 3 are supported; convert the model anew"
            )
        num_tensors, num_entries = self._u64(), self._u64()
        for what, count in (("tensors", num_tensors), ("metadata entries", num_entries)):
            if count > _MAX_ENTRIES:
                raise _CorruptError(f"claims {count} {what}, more than {_MAX_ENTRIES}")
        return num_tensors, num_entries

    def metadata(self, count: int) -> dict[str, object]:
        """Read the entries; arrays stay in the file as spans."""
        values: dict[str, object] = {}
        for _ in repeat(None, count):
            key = self._string("a metadata key", _MAX_NAME_BYTES)
            if key in values:
                raise _CorruptError(f"has the metadata entry {key!r} twice")
            kind = self._u32()
            if kind == _ARRAY:
                values[key] = self._skip_array(key, depth=1)
            elif kind == _STRING:
                values[key] = self._string(f"metadata entry {key!r}")
            elif kind in _NUMBERS:
                values[key] = self._number(key, kind)
            else:
                raise _CorruptError(f"has the metadata entry {key!r} of the unknown type {kind}")
        return values

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """Read the tensor table and check every tensor's place."""
        relative: dict[str, TensorInfo] = {}
        for _ in repeat(None, count):
            info = self._tensor(alignment)
            if info.name in relative:
                raise _CorruptError(f"has the tensor {info.name!r} twice")
            relative[info.name] = info
        start = -(-self._position // alignment) * alignment
        tensors = {
            i.name: TensorInfo(i.name, i.shape, i.type, start + i.offset, i.nbytes)
            for i in relative.values()
        }
        ordered = sorted(tensors.values(), key=lambda info: info.offset)
        for info in ordered:
            if info.offset + info.nbytes > self._size:
                raise _CorruptError(
                    f"ends at byte {self._size} inside the tensor {info.name!r}, "
                    f"which needs {info.offset + info.nbytes} bytes"
                )
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise _CorruptError(f"has the tensors {before.name!r} and {after.name!r} overlap")
        return tensors

    def _tensor(self, alignment: int) -> TensorInfo:
        """Read one row of the table; its offset still counts from the data's start."""
        name = self._string("a tensor's name", _MAX_NAME_BYTES)
        num_dimensions = self._u32()
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise _CorruptError(f"has the tensor {name!r} with {num_dimensions} dimensions")
        dimensions = tuple(self._u64() for _ in range(num_dimensions))
        type_id, offset = self._u32(), self._u64()
        kind = TENSOR_TYPES.get(type_id)
        if kind is None:
            raise _CorruptError(
                f"has the tensor {name!r} of the unknown type {type_id}; take a file in another "
                "quantization, such as Q4_K_M or Q8_0"
            )
        elements = math.prod(dimensions)
        if elements == 0 or dimensions[0] % kind.block_len:
            raise _CorruptError(
                f"has the {kind.name} tensor {name!r} of impossible shape {dimensions}"
            )
        if offset % alignment:
            raise _CorruptError(
                f"has the tensor {name!r} at offset {offset}, not a multiple of {alignment}"
            )
        nbytes = elements // kind.block_len * kind.block_bytes
        return TensorInfo(name, dimensions[::-1], kind.name, offset, nbytes)

    def _advance(self, count: int, what: str = "its head") -> int:
        """Claim the next `count` bytes; return where they start."""
        start = self._position
        if count > self._size - start:
            raise _CorruptError(f"ends at byte {self._size} inside {what}")
        self._position = start + count
        return start

    def _u32(self) -> int:
        return int(_U32.unpack_from(self._buffer, self._advance(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack_from(self._buffer, self._advance(8))[0])

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._u64()
        if limit is not None and length > limit:
            raise _CorruptError(f"has {what} of {length} bytes, more than {limit}")
        start = self._advance(length, what)
        return _text(self._buffer[start : start + length], what)

    def _number(self, key: str, kind: int) -> int | float | bool:
        code = _NUMBERS[kind]
        start = self._advance(struct.calcsize(code))
        value: int | float = struct.unpack_from("<" + code, self._buffer, start)[0]
        if kind != _BOOL:
            return value
        if value not in (0, 1):
            raise _CorruptError(f"has the metadata entry {key!r} with {value} as a boolean")
        return bool(value)

    def _skip_array(self, key: str, depth: int) -> _ArraySpan:
        """Check an array's extent and go past it."""
        what = f"metadata entry {key!r}"
        if depth > _MAX_ARRAY_DEPTH:
            raise _CorruptError(f"has the {what} nested deeper than {_MAX_ARRAY_DEPTH} arrays")
        element, count = self._u32(), self._u64()
        span = _ArraySpan(element, count, self._position)
        if element in _NUMBERS:
            self._advance(count * struct.calcsize(_NUMBERS[element]), what)
        elif element == _STRING:
            self._skip_strings(count, what)
        elif element == _ARRAY:
            if count * 12 > self._size - self._position:
                raise _CorruptError(f"claims {count} arrays in the {what}, more than fit")
            for _ in repeat(None, count):
                self._skip_array(key, depth + 1)
        else:
            raise _CorruptError(f"has the {what} with elements of the unknown type {element}")
        return span

    def _skip_strings(self, count: int, what: str) -> None:
        """Go past `count` strings: the hot loop of opening a file.

        The position only grows and `unpack_from` refuses to read outside the mapping, so one check
        at the end is enough.
        """
        if count * 8 > self._size - self._position:
            raise _CorruptError(f"claims {count} strings in the {what}, more than fit")
        unpack, buffer, position = _U64.unpack_from, self._buffer, self._position
        try:
            for _ in repeat(None, count):
                position += unpack(buffer, position)[0] + 8
        except (struct.error, OverflowError):
            position = self._size + 1
        self._advance(position - self._position, what)


def _decode_array(buffer: mmap.mmap, span: _ArraySpan) -> tuple[list[object], int]:
    """The elements of an array whose extent `_Scan` has checked, and where it ends."""
    position = span.start
    values: list[object] = []
    if span.element == _STRING:
        unpack, append = _U64.unpack_from, values.append
        try:
            for _ in repeat(None, span.count):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                append(buffer[start:position].decode())
        except UnicodeDecodeError:
            raise _CorruptError(f"has a string at index {len(values)} that is not UTF-8") from None
        return values, position
    if span.element == _ARRAY:
        for _ in repeat(None, span.count):
            element, count = struct.unpack_from("<IQ", buffer, position)
            inner, position = _decode_array(buffer, _ArraySpan(element, count, position + 12))
            values.append(inner)
        return values, position
    code = _NUMBERS[span.element]
    end = position + span.count * struct.calcsize(code)
    values.extend(struct.unpack_from(f"<{span.count}{code}", buffer, position))
    if span.element == _BOOL:
        if not set(values) <= {0, 1}:
            raise _CorruptError("has a boolean that is neither 0 nor 1")
        values = [bool(value) for value in values]
    return values, end


def _alignment(metadata: Metadata) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1) or value > 1 << 30:
        raise _CorruptError(f"has the alignment {value!r}, which is not a power of two")
    return value


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _CorruptError(f"has {what} that is not UTF-8") from None


def _what_instead(head: bytes) -> str:
    """What a file that should be GGUF is in truth, as far as its first bytes tell."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` or download the file"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a GGUF file; download the file itself, not the page about it"
    if head[:4] == b"FUGG":
        return "is big-endian; take the little-endian file of the model"
    if head[8:9] == b"{":
        return "looks like safetensors, not GGUF; give the folder that holds it and config.json"
    if head[:2] in (b"PK", b"\x80\x02"):
        return "is a zip or pickled file, not GGUF; give a GGUF file or a folder with safetensors"
    return "is not a GGUF file; give a GGUF file or a folder with config.json"


def _refusal(path: Path, what: str) -> ModelFileError:
    """One sentence: the cause, and a remedy where the cause brings none."""
    remedy = "" if ";" in what else "; the file is damaged: download it again"
    return ModelFileError(f"{path} {what}{remedy}")

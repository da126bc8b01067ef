"""Safetensors files over mmap, one or many, every length and offset checked before it is used.

Layout: 64-bit length of the header, header (JSON: name → dtype, shape, data_offsets from the data's
start, and perhaps "__metadata__"), tensor data without holes. Many files of one model are joined by
model.safetensors.index.json. Nothing of a file is ever executed or unpickled.

Source: the format description of the safetensors project.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ModelFileError
from octavo.weights.mapping import TensorInfo, close_mapping, map_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_INDEX_BYTES = 100_000_000

# Bits an element; `formats` says which dtypes are supported.
_DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """An open file.

    Attributes:
        path: the file.
        buffer: the whole file, mapped read-only.
        tensors: name → TensorInfo.
    """

    path: Path
    buffer: mmap.mmap
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Map a file and check its structure.

        Raises:
            ModelFileError: the file is missing, cut or corrupt.
        """
        buffer = map_file(path)
        try:
            return cls(path, buffer, _read_table(buffer))
        except (_CorruptError, ValueError, RecursionError) as error:
            buffer.close()
            cause = (
                str(error) if isinstance(error, _CorruptError) else "has a header that is not JSON"
            )
            raise ModelFileError(
                f"{path} {cause}; the file is damaged or no safetensors file: download it again"
            ) from None
        except BaseException:
            buffer.close()
            raise

    def close(self) -> None:
        """Unmap the file, or leave that to the last tensor that is still a view of it."""
        close_mapping(self.buffer)


class _CorruptError(Exception):
    """What is wrong, without the file's name; becomes a ModelFileError inside this module."""


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder.

    Raises:
        ModelFileError: there are none, or several without an index that says what belongs together.
    """
    if (folder / INDEX_NAME).is_file():
        return [folder / name for name in sorted(set(read_index(folder / INDEX_NAME).values()))]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise ModelFileError(
            f"{folder} has {len(files)} safetensors files ({names}) but no {INDEX_NAME}; "
            "download the index too"
        )
    pickles = sorted(
        p.name for end in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{end}")
    )
    if pickles:
        raise ModelFileError(
            f"{folder} has its weights only pickled ({pickles[0]}), which can run code and is "
            "never read; take a safetensors or GGUF version of the model"
        )
    raise ModelFileError(f"{folder} has no safetensors file; download the model's weights into it")


def read_index(path: Path) -> dict[str, str]:
    """The index of a model in many files: tensor → file name.

    Raises:
        ModelFileError: it is no such index, or names a file outside its folder.
    """
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("too large")
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise ModelFileError(f"{path} is not readable JSON; download it again") from None
    files = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(files, dict) or not files:
        raise ModelFileError(f'{path} has no "weight_map"; download it again')
    for name in files.values():
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or Path(name).name != name
        ):
            raise ModelFileError(
                f"{path} names the file {name!r}, which is not a safetensors file beside it; "
                "download the model again"
            )
    return files


def _read_table(buffer: mmap.mmap) -> dict[str, TensorInfo]:
    if len(buffer) < 8:
        raise _CorruptError(f"has only {len(buffer)} bytes")
    (length,) = struct.unpack_from("<Q", buffer)
    if length > min(_MAX_HEADER_BYTES, len(buffer) - 8):
        raise _CorruptError(f"claims a header of {length} bytes in a file of {len(buffer)} bytes")
    header = json.loads(buffer[8 : 8 + length].decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise _CorruptError("has a header that is not an object")
    start = 8 + int(length)
    tensors = {
        name: _tensor(name, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_cover(list(tensors.values()), start, len(buffer))
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _CorruptError("has the same name twice in its header")
    return entries


def _tensor(name: str, entry: object, start: int) -> TensorInfo:
    """Check one entry of the header; offsets become absolute."""
    what = f"the tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _CorruptError(f"describes {what} in no known way")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _CorruptError(f"has {what} with an impossible shape or offsets")
    bits = _DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _CorruptError(f"has {what} of the unknown dtype {str(dtype)[:40]!r}")
    begin, end = offsets
    if math.prod(shape) * bits != (end - begin) * 8:
        raise _CorruptError(f"has {what} of shape {shape} ({dtype}) in {end - begin} bytes")
    return TensorInfo(name, tuple(shape), dtype, start + begin, end - begin)


def _naturals(values: object) -> bool:
    """Whether this is a list of at most 64 integers from 0 to 2**63 (booleans are none)."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )


def _check_cover(tensors: list[TensorInfo], start: int, size: int) -> None:
    """Check that the tensors lie side by side and fill the file."""
    ordered = sorted(tensors, key=lambda info: (info.offset, info.nbytes))
    ends = [start, *(info.offset + info.nbytes for info in ordered)]
    begins = [*(info.offset for info in ordered), size]
    for (end, begin), info in zip(zip(ends, begins, strict=True), [*ordered, None], strict=True):
        if begin != end:
            where = f"before the tensor {info.name!r}" if info else "at its end"
            kind = "an overlap" if begin < end else "a hole"
            raise _CorruptError(f"has {kind} of {abs(begin - end)} bytes {where}")

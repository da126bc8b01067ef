"""A file mapped read-only, and the place of a tensor in it. Imports no numpy."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Attributes:
        name: the file's own name of it.
        shape: numpy's order, outermost dimension first.
        type: the name of its type, such as "Q4_1".
        offset: bytes from the start of the file, checked to lie inside together with `nbytes`.
        nbytes: bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Outline:
    """What a weight will be, without reading it.

    Attributes:
        shape: as the model declares it.
        nbytes: of all its tensors in the file.
        widened_nbytes: once FP8 has become 16 bits and groups of more than 32 columns small ones,
            as the CPU backend does.
    """

    shape: tuple[int, ...]
    nbytes: int
    widened_nbytes: int


def map_file(path: Path) -> mmap.mmap:
    """Map a regular, non-empty file read-only.

    Raises:
        ModelFileError: it is missing, unreadable, empty or not a regular file.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(f"{path} is not a regular file; give the model's file itself")
            if status.st_size == 0:
                raise ModelFileError(f"{path} is empty; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(
            f"{path} cannot be read ({reason}); check the file and its permissions"
        ) from None


def close_mapping(buffer: mmap.mmap) -> None:
    """Unmap now, or when the last array that looks into the mapping goes away."""
    with contextlib.suppress(BufferError):  # numpy views hold it, and free it with themselves
        buffer.close()

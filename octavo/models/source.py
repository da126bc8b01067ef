"""What a model's declaration is made from: the typed reading of a file's configuration.

Every fault raises ModelFileError and names the key. Imports no numpy and opens no file: the caller
hands in the parsed config.json or GGUF metadata, the names of the tensors, and a way to read a
small tensor as numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from octavo.errors import ModelFileError

T = TypeVar("T")

MAX_LAYERS = 1024
MAX_HEAD_DIM = 4096
MAX_SIZE = 1 << 24
MAX_NUMBER = 1e12
"""No model has more layers or larger dimensions and numbers: a file that says so is corrupt."""


def is_sensible(value: float) -> bool:
    """Whether a number is neither so small nor so large (nor NaN) that float32 would lose it."""
    return 1 / MAX_NUMBER <= value <= MAX_NUMBER


@runtime_checkable
class _KnowsLengths(Protocol):
    """GGUF metadata: a vocabulary that is only counted need not be decoded."""

    def length(self, key: str) -> int: ...


def _no_numbers(name: str) -> tuple[float, ...]:
    raise ModelFileError(f"the values of tensor {name} are needed to declare this model")


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """A model's configuration as its file tells it.

    Attributes:
        values: config.json, or the GGUF metadata.
        names: the tensors in the file.
        read_numbers: the values of a small tensor of the file.
        prefix: stands before every key that the methods are asked for ("llama." in a GGUF).
    """

    values: Mapping[str, object]
    names: Set[str] = frozenset()
    read_numbers: Callable[[str], tuple[float, ...]] = _no_numbers
    prefix: str = ""

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(self.prefix + key) is not None

    def section(self, key: str) -> ConfigSource | None:
        """The object under the key, or None."""
        if not self.has(key):
            return None
        value = self.values[self.prefix + key]
        if not isinstance(value, Mapping):
            raise self._fault(key, "an object", value)
        return ConfigSource(value, self.names, self.read_numbers)

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE
    ) -> int:
        """An integer in [least, most]; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._fault(key, "an integer", value)
        if not least <= value <= most:
            raise self._fault(key, f"an integer from {least} to {most}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number of sensible size; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fault(key, "a number", value)
        if not is_sensible(value):
            raise self._fault(key, f"a number from {1 / MAX_NUMBER:g} to {MAX_NUMBER:g}", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._fault(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default the key must be there."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._fault(key, "a string", value)
        return value

    def items(self, key: str, kind: type[T]) -> tuple[T, ...] | None:
        """A list of values of one type, or None if the key is not there."""
        if not self.has(key):
            return None
        values = self.values[self.prefix + key]
        if not isinstance(values, list | tuple) or not all(isinstance(v, kind) for v in values):
            raise self._fault(key, f"a list of {kind.__name__}", values)
        return tuple(values)

    def length(self, key: str) -> int:
        """The elements of a list, 0 if there is none; the key is without the prefix."""
        if isinstance(self.values, _KnowsLengths):
            return self.values.length(key)
        value = self.values.get(key)
        return len(value) if isinstance(value, list | tuple) else 0

    def require(self, key: str, actual: object, supported: object) -> None:
        """Refuse a value other than the one that is supported."""
        if actual != supported:
            raise ModelFileError(
                f"{self.prefix}{key} is {actual!r}, but only {supported!r} is supported"
            )

    def _get(self, key: str, default: T | None) -> object:
        # A null is an absent key: config.json files use both for "the default".
        if self.has(key):
            return self.values[self.prefix + key]
        if default is None:
            raise ModelFileError(f"the model's configuration lacks {self.prefix + key}")
        return default

    def _fault(self, key: str, wanted: str, value: object) -> ModelFileError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ModelFileError(
            f"{self.prefix + key} in the model's configuration must be {wanted}, not {shown}"
        )

"""The weights of a folder that lie there in several tensors: codes, scales, zero points.

Of `X.qweight`, `X.qzeros`, `X.scales` and `X.g_idx`, or an FP8 `X.weight` and `X.weight_scale`,
the rest of Octavo sees one weight `X.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.graph.tensors import SMALL_GROUP, StoredTensor
from octavo.weights.formats.float8 import SCALE_TYPES, read_float8, read_scales
from octavo.weights.formats.packed_words import read_awq, read_gptq
from octavo.weights.mapping import Outline, TensorInfo
from octavo.weights.schemes import Scheme

ReadBytes = Callable[[TensorInfo], NDArray[np.uint8]]
"""The bytes of a tensor, whichever of the folder's files it lies in."""

CACHE_SCALE = re.compile(r"\.(?:[kqv]|kv|prob|output)_scale$")
"""Scales for a KV cache in FP8, of which Octavo measures its own."""

_INPUT_SCALES = 2.0**-126, 2.0**126
"""The least and the greatest scale of inputs: within these, 1 / scale is as exact as the scale."""

_SIGNS = (".qweight", ".weight_scale", ".weight_scale_inv", ".weight_packed")


class Recipe(Protocol):
    """How one weight is made of the folder's tensors."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors that make it."""
        ...

    def outline(self, read: ReadBytes) -> Outline:
        """What the weight will be; reads little.

        Raises:
            ModelFileError: the parts do not fit together, or are of no supported form.
        """
        ...

    def make(self, read: ReadBytes) -> StoredTensor:
        """The weight; raises as `outline` does."""
        ...


def find_recipes(scheme: Scheme | None, infos: Mapping[str, TensorInfo]) -> Mapping[str, Recipe]:
    """The weights of several tensors, by the name that a model declares: "….weight".

    Raises:
        ModelFileError: a part is missing, or the folder is quantized and does not say how.
    """
    if scheme is None:
        strange = min((name for name in infos if name.endswith(_SIGNS)), default=None)
        if strange is not None:
            raise ModelFileError(
                f"the tensor {strange!r} is part of a quantized weight, but config.json has no "
                '"quantization_config"; take a version of the model that says how it is quantized'
            )
        return {}
    if scheme.method == "fp8":
        return {
            name: _Float8.find(scheme, name, infos)
            for name, info in infos.items()
            if info.type in ("F8_E4M3", "F8_E5M2") and name.endswith(".weight")
        }
    modules = [name.removesuffix(".qweight") for name in infos if name.endswith(".qweight")]
    return {f"{module}.weight": _Packed.find(scheme, module, infos) for module in modules}


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight of GPTQ or AWQ (formats/packed_words)."""

    scheme: Scheme
    qweight: TensorInfo
    qzeros: TensorInfo
    scales: TensorInfo
    g_idx: TensorInfo | None

    @classmethod
    def find(cls, scheme: Scheme, module: str, infos: Mapping[str, TensorInfo]) -> _Packed:
        for part in ("qzeros", "scales"):
            if f"{module}.{part}" not in infos:
                raise ModelFileError(
                    f"{module}.qweight has no {part} beside it; download the model again"
                )
        return cls(
            scheme,
            infos[f"{module}.qweight"],
            infos[f"{module}.qzeros"],
            infos[f"{module}.scales"],
            infos.get(f"{module}.g_idx"),
        )

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        given = (self.qweight, self.qzeros, self.scales)
        return given if self.g_idx is None else (*given, self.g_idx)

    def outline(self, read: ReadBytes) -> Outline:
        bits, rows, columns, group = self._geometry()
        self._check_order(read, columns, group)
        halves = 1 if self.scheme.is_symmetric else 2
        scale_bytes = 2 * halves * rows * columns // min(group, SMALL_GROUP)
        return Outline(
            shape=(rows, columns),
            nbytes=sum(part.nbytes for part in self.parts),
            widened_nbytes=rows * columns * bits // 8 + scale_bytes,
        )

    def make(self, read: ReadBytes) -> StoredTensor:
        *_, columns, group = self._geometry()
        self._check_order(read, columns, group)
        qweight, qzeros = (_words(info, read) for info in (self.qweight, self.qzeros))
        scales = read_scales(self.scales.type, read(self.scales), self.scales.shape)
        if self.scheme.method == "awq":
            return read_awq(qweight, qzeros, scales)
        return read_gptq(qweight, qzeros, scales, stores_less_1=self.scheme.stores_less_1)

    def _geometry(self) -> tuple[int, int, int, int]:
        """Bits, rows, columns and columns a group, once all shapes are found to fit."""
        shapes = [info.shape for info in (self.qweight, self.qzeros, self.scales)]
        types = (self.qweight.type, self.qzeros.type)
        if (
            any(len(shape) != 2 or 0 in shape for shape in shapes)
            or types != ("I32", "I32")
            or self.scales.type not in SCALE_TYPES
        ):
            raise self._misfit()
        (_, words), zeros, (groups, rows) = shapes
        bits, columns = 4, self.qweight.shape[0]
        if self.scheme.method == "gptq":
            bits = 32 * zeros[1] // rows
            columns = columns * 32 // max(1, bits)
        row_words = rows * bits // 32
        fits = (
            bits in (4, 8)
            and rows * bits % 32 == 0
            and words == (rows if self.scheme.method == "gptq" else row_words)
            and zeros == (groups, row_words)
            and columns % groups == 0
        )
        group = columns // groups
        if not fits or (group != 16 and group % SMALL_GROUP):
            raise self._misfit()
        return bits, rows, columns, group

    def _misfit(self) -> ModelFileError:
        shapes = ", ".join(f"{p.name} {p.type} {list(p.shape)}" for p in self.parts[:3])
        return ModelFileError(
            f"{shapes} are no weight of {self.scheme.method.upper()} in 4 or 8 bits with groups of "
            f"16 columns or a multiple of {SMALL_GROUP}; take another version of the model"
        )

    def _check_order(self, read: ReadBytes, columns: int, group: int) -> None:
        """Columns sorted by activation would need their inputs permuted at each product."""
        if self.g_idx is None or 0 in self.g_idx.shape:
            return
        owner = read(self.g_idx).view("<i4")
        if not np.array_equal(owner, np.arange(columns) // group):
            raise ModelFileError(
                f"{self.g_idx.name} puts columns into groups out of order (desc_act), which is not "
                'supported; take a version quantized with "desc_act": false or '
                '"static_groups": true'
            )


@dataclass(frozen=True, slots=True)
class _Float8:
    """A weight in FP8 (formats/float8)."""

    scheme: Scheme
    weight: TensorInfo
    scale: TensorInfo
    input_scale: TensorInfo | None

    @classmethod
    def find(cls, scheme: Scheme, name: str, infos: Mapping[str, TensorInfo]) -> _Float8:
        module = name.removesuffix(".weight")
        scale = infos.get(f"{name}_scale") or infos.get(f"{name}_scale_inv")
        if scale is None:
            raise ModelFileError(f"{name} has no {name}_scale beside it; download the model again")
        given = infos.get(f"{module}.input_scale") or infos.get(f"{module}.activation_scale")
        return cls(scheme, infos[name], scale, given)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        given = (self.weight, self.scale)
        return given if self.input_scale is None else (*given, self.input_scale)

    def outline(self, read: ReadBytes) -> Outline:
        shape, _ = self._geometry()
        return Outline(
            shape=shape,
            nbytes=sum(part.nbytes for part in self.parts),
            widened_nbytes=2 * shape[0] * shape[1],
        )

    def make(self, read: ReadBytes) -> StoredTensor:
        shape, block = self._geometry()
        scales = read_scales(self.scale.type, read(self.scale), self.scale.shape)
        given = self.input_scale
        input_scale = None
        if given is not None:
            input_scale = float(read_scales(given.type, read(given), given.shape).max())
            if not _INPUT_SCALES[0] <= input_scale <= _INPUT_SCALES[1]:
                raise ModelFileError(
                    f"{given.name} is {input_scale}, by which no input can be rounded; take "
                    "another version of the model"
                )
        return read_float8(read(self.weight), shape, scales, block, input_scale)

    def _geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shape and the blocks, once the scales are found to fit."""
        scales, given, block = self.scale, self.input_scale, self.scheme.block
        types = {scales.type} if given is None else {scales.type, given.type}
        sizes = [*self.weight.shape] if given is None else [*self.weight.shape, *given.shape]
        is_sound = self.weight.type == "F8_E4M3" and types <= {*SCALE_TYPES}
        if is_sound and len(self.weight.shape) == 2 and 0 not in sizes:
            rows, columns = self.weight.shape
            if scales.shape in ((), (1,), (1, 1)):
                return (rows, columns), (rows, columns)
            if scales.shape in ((rows,), (rows, 1)):
                return (rows, columns), (1, columns)
            if block and scales.shape == (-(-rows // block[0]), -(-columns // block[1])):
                return (rows, columns), block
        raise ModelFileError(
            f"{self.weight.name} {self.weight.type} {list(self.weight.shape)} with scales "
            f"{scales.type} {list(scales.shape)} is no F8_E4M3 scaled as a whole, by rows or in "
            f"the blocks of config.json ({block}); take another version of the model"
        )


def _words(info: TensorInfo, read: ReadBytes) -> NDArray[np.uint32]:
    return read(info).view("<u4").reshape(info.shape)

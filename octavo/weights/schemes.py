"""How a folder's config.json says that its weights are quantized. Imports no numpy.

Which weights are quantized, and in how many bits, the tensors show themselves; lists of modules
that were left out (`ignore`, `modules_to_not_convert`, `dynamic`) need not be read. Read is what no
tensor shows: the method, its layout in the file, the size of FP8's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from octavo.errors import ModelFileError

Method = Literal["gptq", "awq", "fp8"]

_SUPPORTED = "GPTQ, AWQ (gemm), FP8 (fp8, or compressed-tensors float-quantized), or none"
_MAX_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Scheme:
    """How quantized weights lie in a folder.

    Attributes:
        method: "fp8" whatever tool wrote it.
        stores_less_1: GPTQ's first convention: zero points lie in the file less 1.
        is_symmetric: zero points are in the middle, as the file says.
        block: rows and columns of FP8's blocks, if it has any.
    """

    method: Method
    stores_less_1: bool = False
    is_symmetric: bool = False
    block: tuple[int, int] | None = None


def read_scheme(config: Mapping[str, object]) -> Scheme | None:
    """The scheme that config.json names; None: the weights are not quantized.

    Raises:
        ModelFileError: it is malformed, or none that is supported.
    """
    section = config.get("quantization_config") or config.get("compression_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise _fault("quantization_config", section, "take config.json from the model again")
    method = section.get("quant_method")
    match method:
        case "gptq":
            return _gptq(section)
        case "awq":
            return _awq(section)
        case "fp8":
            return Scheme("fp8", block=_block(section.get("weight_block_size")))
        case "compressed-tensors":
            return _compressed_tensors(section)
    raise _fault("quantization_config.quant_method", method, _OTHER)


_OTHER = f"take a version of the model that is quantized in one of these ways: {_SUPPORTED}"


def _gptq(section: Mapping[str, object]) -> Scheme:
    layout = section.get("checkpoint_format") or section.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or section.get("is_marlin_format"):
        shown = "marlin" if section.get("is_marlin_format") else layout
        raise _fault(
            "quantization_config.checkpoint_format", shown, "take a version in gptq or gptq_v2"
        )
    if section.get("bits") not in (4, 8):
        raise _fault(
            "quantization_config.bits", section.get("bits"), "take a version of 4 or 8 bits"
        )
    return Scheme("gptq", layout == "gptq", section.get("sym") is True)


def _awq(section: Mapping[str, object]) -> Scheme:
    layout = section.get("version") or section.get("checkpoint_format") or "gemm"
    if str(layout).lower() != "gemm" or section.get("backend") == "llm-awq":
        shown = layout if str(layout).lower() != "gemm" else "llm-awq"
        raise _fault("quantization_config.version", shown, 'take a version packed as "gemm"')
    bits = section.get("bits", section.get("w_bit", 4))
    if bits != 4:
        raise _fault("quantization_config.bits", bits, "take a version of 4 bits")
    return Scheme("awq", is_symmetric=section.get("zero_point") is False)


def _compressed_tensors(section: Mapping[str, object]) -> Scheme:
    """FP8 alone: every group of modules must hold floats of 8 bits."""
    sparsity = section.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise _fault("sparsity_config.format", sparsity["format"], "take a version that is dense")
    if section.get("transform_config"):
        raise _fault("transform_config", section["transform_config"], "take a version without it")
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping):
        raise _fault("quantization_config.config_groups", groups, _OTHER)
    block: tuple[int, int] | None = None
    for name, group in groups.items():
        key = f"quantization_config.config_groups.{name}.weights"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise _fault(key, weights, _OTHER)
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            kind = f"{weights.get('type')} of {weights.get('num_bits')} bits"
            shown = f"{group.get('format') or section.get('format')}, {kind}"
            raise _fault(key, shown, _OTHER)
        if weights.get("strategy") == "block":
            block = _block(weights.get("block_structure"))
    return Scheme("fp8", block=block)


def _block(value: object) -> tuple[int, int] | None:
    """[128, 128], or "128x128"."""
    if value is None:
        return None
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list | tuple) and len(sizes) == 2:
        numbers = tuple(int(size) for size in sizes if str(size).isdecimal())
        if len(numbers) == 2 and all(1 <= n <= _MAX_BLOCK for n in numbers):
            return numbers[0], numbers[1]
    raise _fault("weight_block_size", value, "take config.json from the model again")


def _fault(key: str, value: object, remedy: str) -> ModelFileError:
    return ModelFileError(f"{key} is {str(value)[:80]!r}, which is not supported; {remedy}")

"""How files say which rotary embedding a model uses: config.json (old and new form) and GGUF."""

from __future__ import annotations

from octavo.errors import ModelFileError
from octavo.models.rope import (
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    Scaling,
)
from octavo.models.source import ConfigSource, is_sensible

GGUF_DIVISORS = "rope_freqs.weight"


def rope_from_folder(
    source: ConfigSource, max_position_embeddings: int, default_theta: float = 10000.0
) -> RopeConfig:
    """Read rope_parameters (transformers 5), or rope_theta and rope_scaling (before)."""
    parameters = source.section("rope_parameters") or source.section("rope_scaling")
    if parameters is None:
        return RopeConfig(source.number("rope_theta", default_theta))
    holder = parameters if parameters.has("rope_theta") else source
    theta = holder.number("rope_theta", default_theta)
    for holder in (source, parameters):
        holder.require("partial_rotary_factor", holder.number("partial_rotary_factor", 1.0), 1.0)
    return RopeConfig(theta, _scaling(parameters, max_position_embeddings))


def _scaling(parameters: ConfigSource, max_position_embeddings: int) -> Scaling | None:
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(parameters.number("factor"))
        case "llama3":
            low, high = (parameters.number(f"{n}_freq_factor") for n in ("low", "high"))
            if low >= high:
                raise ModelFileError(
                    f"rope scaling: high_freq_factor {high} must exceed low_freq_factor {low}"
                )
            return Llama3Scaling(
                parameters.number("factor"),
                low,
                high,
                parameters.integer("original_max_position_embeddings", max_position_embeddings),
            )
        case _:
            raise ModelFileError(
                f"rope scaling of type {kind!r} is not supported; default, linear and llama3 are"
            )


def rope_from_gguf(source: ConfigSource) -> RopeConfig:
    """Read base and scaling of a GGUF; llama3 scaling lies in it as a tensor of divisors."""
    theta = source.number("rope.freq_base", 10000.0)
    kind = source.text("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelFileError(
            f"{source.prefix}rope.scaling.type {kind!r} is not supported; none and linear are"
        )
    # rope.scale_linear is the older spelling; a file with it alone scales linearly.
    factor = source.number("rope.scaling.factor", source.number("rope.scale_linear", 1.0))
    has_divisors = GGUF_DIVISORS in source.names
    if kind == "linear" or (factor != 1.0 and source.has("rope.scale_linear")):
        if has_divisors:
            raise ModelFileError(f"linear scaling together with {GGUF_DIVISORS} is not supported")
        return RopeConfig(theta, LinearScaling(factor))
    if has_divisors:
        divisors = source.read_numbers(GGUF_DIVISORS)
        if not all(is_sensible(d) for d in divisors):
            raise ModelFileError(f"{GGUF_DIVISORS} holds a value outside the sensible range")
        return RopeConfig(theta, FrequencyDivisors(divisors))
    return RopeConfig(theta)

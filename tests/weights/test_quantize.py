"""Quantizing while loading: against an independent numpy check, and the bounds of its errors."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.graph.tensors import DenseTensor, GroupScales
from octavo.weights.formats.quantize import LAYOUTS, can_quantize, quantize, quantized_nbytes

Float32 = NDArray[np.float32]
FORMATS = ("Q8_0", "Q4_1")


def dense(values: Any) -> DenseTensor:
    return DenseTensor(np.asarray(values, np.float32), "f32")


def samples() -> dict[str, Float32]:
    random = np.random.default_rng(1)
    shape = (67, 160)
    return {
        "normal": random.normal(0, 0.05, shape).astype(np.float32),
        "heavy tails": random.standard_t(3, shape).astype(np.float32),
        "far from zero": (5 + 0.01 * random.normal(size=shape)).astype(np.float32),
        "of every size": (
            random.normal(size=shape) * 10.0 ** random.uniform(-8, 3, (67, 1))
        ).astype(np.float32),
    }


def range_codes(values: Float32) -> Float32:
    """Plain Q4_1 of a matrix, back in float32: scale and minimum of each group's range."""
    groups = values.reshape(-1, 32).astype(np.float64)
    low = groups.min(axis=1, keepdims=True)
    scale = ((groups.max(axis=1, keepdims=True) - low) / 15).astype(np.float16).astype(np.float64)
    minimum = low.astype(np.float16).astype(np.float64)
    codes = np.rint((groups - minimum) / np.where(scale > 0, scale, 1)).clip(0, 15)
    return (codes * scale + minimum).astype(np.float32).reshape(values.shape)


def relative_rms(values: Float32, others: Float32) -> float:
    error = np.square(others.astype(np.float64) - values).sum()
    return float(np.sqrt(error / np.square(values.astype(np.float64)).sum()))


@pytest.mark.parametrize("kind", samples())
def test_8_bits_round_to_the_nearest_code(kind: str) -> None:
    values = samples()[kind]
    weight = quantize(dense(values), "Q8_0")
    assert (weight.format, weight.bits, weight.group, weight.codes.zero) == ("Q8_0", 8, 32, 128)
    assert weight.shape == values.shape and isinstance(weight.scales, GroupScales)
    assert weight.minimums is None
    half_steps = np.repeat(weight.scales.values().astype(np.float64), 32, axis=1) / 2
    assert (np.abs(weight.dequantize() - values) <= half_steps * (1 + 1e-5)).all()
    assert weight.codes.values().min() >= 1, "symmetric"


def test_8_bits_are_those_of_the_gguf_package() -> None:
    # The package makes codes against the scale before it is rounded: a step apart at most.
    values = samples()["normal"]
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = LAYOUTS["Q8_0"].read(gguf.quants.quantize(values, kind).reshape(-1), values.shape)
    ours = quantize(dense(values), "Q8_0")
    np.testing.assert_array_equal(ours.scales.values(), theirs.scales.values())
    apart = np.abs(ours.codes.values().astype(int) - theirs.codes.values().astype(int))
    assert apart.max() <= 1 and apart.mean() < 0.05
    error, theirs_error = (relative_rms(values, w.dequantize()) for w in (ours, theirs))
    assert error <= theirs_error


@pytest.mark.parametrize("kind", samples())
def test_4_bits_beat_the_range_of_the_group(kind: str) -> None:
    values = samples()[kind]
    weight = quantize(dense(values), "Q4_1")
    assert (weight.format, weight.bits, weight.group, weight.codes.zero) == ("Q4_1", 4, 32, 0)
    assert isinstance(weight.scales, GroupScales) and weight.minimums is not None
    result, plain = weight.dequantize(), range_codes(values)
    if kind in ("normal", "heavy tails"):  # elsewhere few groups make all the error
        assert relative_rms(values, result) < 0.94 * relative_rms(values, plain)
    errors, plain_errors = (
        np.square(w.astype(np.float64) - values).reshape(-1, 32).sum(axis=1)
        for w in (result, plain)
    )
    tiny = 32 * 2.0**-46  # a scale of a few subnormal steps is rounded up, so that it covers
    assert (errors <= plain_errors * 1.001 + tiny).all(), "group by group"


def test_4_bit_codes_are_the_nearest_ones() -> None:
    values = samples()["normal"]
    weight = quantize(dense(values), "Q4_1")
    assert weight.minimums is not None
    levels = (
        weight.scales.values().astype(np.float64)[:, :, None] * np.arange(16)
        + weight.minimums.values().astype(np.float64)[:, :, None]
    )
    distance = np.abs(values.reshape(67, 5, 32, 1).astype(np.float64) - levels[:, :, None, :])
    codes = weight.codes.values().reshape(67, 5, 32, 1)
    chosen = np.take_along_axis(distance, codes.astype(int), axis=3)[..., 0]
    assert (chosen <= distance.min(axis=3) + 1e-8).all()


def test_4_bits_give_back_what_fits() -> None:
    random = np.random.default_rng(2)
    codes = random.integers(0, 16, (5, 3, 32))
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    values = (codes * 0.25 - 2.0).astype(np.float32).reshape(5, 96)
    np.testing.assert_array_equal(quantize(dense(values), "Q4_1").dequantize(), values)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_constants_and_tiny_groups(name: str) -> None:
    values = np.zeros((6, 64), np.float32)
    values[1] = 0.5
    values[2] = -3.0
    values[3] = np.linspace(-1e-6, 1e-6, 64)  # scales are subnormal
    values[4] = np.linspace(-1e-7, 1e-7, 64)
    values[5] = 1e-30
    result = quantize(dense(values), name).dequantize()
    assert not result[[0, 5]].any()
    np.testing.assert_allclose(result[1:3], values[1:3], rtol=1e-3)
    assert np.abs(result[3:5] - values[3:5]).max() <= 2.0**-24, "a step of the subnormal float16"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_what_no_scale_can_hold_becomes_nan_in_its_group_alone(name: str, value: float) -> None:
    values = samples()["normal"]
    values[3, 40] = value
    result = quantize(dense(values), name).dequantize()
    assert np.isnan(result[3, 32:64]).all()
    result[3, 32:64] = 0
    assert np.isfinite(result).all()
    others = np.delete(values, 3, axis=0)
    clean = quantize(dense(others), name).dequantize()
    np.testing.assert_array_equal(np.delete(result, 3, axis=0), clean)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_dense_dtype_and_unaligned_views(name: str, dtype: Any) -> None:
    values = samples()["normal"]
    if dtype == "bf16":
        stored: NDArray[Any] = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        stored = values.astype(np.float16)
    raw = np.frombuffer(b"x" + stored.tobytes(), np.uint8)[1:].view(stored.dtype)
    tensor = DenseTensor(raw.reshape(stored.shape), dtype)
    expected = quantize(dense(tensor.dequantize()), name)
    result = quantize(tensor, name)
    np.testing.assert_array_equal(result.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_neither_chunks_nor_threads_change_a_byte(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = dense(samples()["heavy tails"])
    whole = quantize(tensor, name)
    monkeypatch.setattr("octavo.weights.formats.quantize._CHUNK", 1000)
    parts = quantize(tensor, name, num_threads=3)
    np.testing.assert_array_equal(parts.codes.planes[0].data, whole.codes.planes[0].data)
    np.testing.assert_array_equal(parts.scales.values(), whole.scales.values())


def test_which_tensors_and_how_large() -> None:
    assert can_quantize(dense(np.zeros((3, 64))))
    assert not can_quantize(dense(np.zeros((3, 48))))
    assert not can_quantize(dense(np.zeros(64)))
    for name in FORMATS:
        tensor = dense(np.zeros((3, 64)))
        assert quantized_nbytes(tensor.shape, name) == quantize(tensor, name).nbytes

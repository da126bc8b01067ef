"""Norms, gated activations and rounding to codes against the reference backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.backends.reference import operators
from octavo.backends.torch.kernels import Normed, Quantized, QuantizeMode, StaticScale
from octavo.backends.torch.plain import rows as plain
from octavo.backends.torch.triton.gated import gated
from octavo.backends.torch.triton.quantize import quantize
from octavo.backends.torch.triton.rms_norm import rms_norm
from octavo.graph.batch import Float32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEASURED: tuple[QuantizeMode, ...] = ("int8 token", "fp8 token", "fp8 group")
"""Modes whose scales are made of x."""
MODES: tuple[QuantizeMode, ...] = (*MEASURED, StaticScale(0.0078125), StaticScale(0.3))
NAN, INF = math.nan, math.inf

# Triton's interpreter computes with numpy, which warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@dataclass(frozen=True)
class Rows:
    """One implementation."""

    rms_norm: Callable[..., Normed]
    gated: Callable[..., Tensor | Quantized]
    quantize: Callable[..., Quantized]


IMPLEMENTATIONS = {
    "plain": Rows(plain.rms_norm, plain.gated, plain.quantize),
    "triton": Rows(rms_norm, gated, quantize),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def rows(request: pytest.FixtureRequest) -> Rows:
    return IMPLEMENTATIONS[request.param]


def random(rng: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows that lie apart in a wider matrix, of rather different sizes."""
    wide = rng.normal(size=(shape[0], shape[1] + 24)) * 2.0 ** rng.integers(-3, 4, (shape[0], 1))
    return torch.from_numpy(wide).to(dtype)[:, 8 : 8 + shape[1]]


def tolerance(dtype: torch.dtype) -> float:
    """One rounding to dtype and some of float32."""
    return torch.finfo(dtype).eps / 2 + 2e-6


def e4m3fn() -> NDArray[np.float64]:
    """The finite values of float8_e4m3fn that are at least zero, by code."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa * 2.0**-9, normal)


def nearest_fp8(x: Float32) -> Float32:
    """The nearest value of float8_e4m3fn, of two the one with an even code."""
    values = e4m3fn()
    distance = np.abs(np.abs(x.astype(np.float64))[..., None] - values)
    odd = np.arange(len(values)) % 2
    best = np.lexsort((np.broadcast_to(odd, distance.shape), distance), axis=-1)[..., 0]
    return np.copysign(values[best], x).astype(np.float32)


def expected_codes(x: Float32, mode: QuantizeMode) -> tuple[Float32, Float32]:
    """Codes [T, F] in float32 and scales [T, groups], for finite x."""
    if isinstance(mode, StaticScale):
        scale = np.float32(mode.scale)
        scaled = np.clip(x * (np.float32(1) / scale), -448, 448)
        return nearest_fp8(scaled), np.full((len(x), 1), scale)
    group = 128 if mode == "fp8 group" else x.shape[1]
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % group)))
    if mode == "int8 token":
        codes, scales = operators.round_to_int8(padded, group)
        return codes[0], scales[0]
    groups = padded.reshape(len(x), -1, group)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    peak[peak < np.float32(2.0**-119)] = 0
    factor = np.divide(np.float32(448), peak, out=np.zeros_like(peak), where=peak > 0)
    codes = nearest_fp8(groups * factor).reshape(len(x), -1)[:, : x.shape[1]]
    return codes, (peak / np.float32(448))[:, :, 0]


def check_codes(got: Quantized, x: Float32, mode: QuantizeMode) -> None:
    """Exact but for what the last bits of x leave open."""
    codes, scales = expected_codes(x, mode)
    assert got.codes.dtype == (torch.int8 if mode == "int8 token" else torch.float8_e4m3fn)
    assert got.codes.is_contiguous() and got.scales.is_contiguous()
    np.testing.assert_allclose(got.scales.numpy(), scales, rtol=4e-6)
    step = 1 if mode == "int8 token" else np.maximum(2.0**-9, np.abs(codes) / 8)
    off = np.abs(got.codes.float().numpy() - codes)
    assert (off <= step).all()
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "features"), [(1, 40), (1, 129), (5, 24), (9, 128)])
def test_norm(
    rows: Rows, rng: np.random.Generator, dtype: torch.dtype, heads: int, features: int
) -> None:
    x = random(rng, (3, heads * features), dtype)
    weight = torch.from_numpy(rng.normal(size=features).astype(np.float32))

    normed = rows.rms_norm(x, weight, 1e-5, None, None)

    expected = operators.rms_norm(x.float().numpy(), weight.numpy(), 1e-5)
    assert isinstance(normed.values, Tensor) and normed.values.dtype == dtype
    np.testing.assert_allclose(normed.values.float().numpy(), expected, rtol=tolerance(dtype))
    assert torch.equal(normed.total, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [None, *MODES])
def test_norm_of_a_sum(
    rows: Rows, rng: np.random.Generator, dtype: torch.dtype, mode: QuantizeMode | None
) -> None:
    x, residual = random(rng, (2, 300), dtype), random(rng, (2, 300), dtype).contiguous()
    weight = torch.from_numpy(rng.normal(size=300).astype(np.float32))
    before = x.clone(), residual.clone()

    normed = rows.rms_norm(x, weight, 1e-6, residual, mode)

    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert torch.equal(normed.total, x + residual)
    expected = operators.rms_norm((x + residual).float().numpy(), weight.numpy(), 1e-6)
    if mode is None:
        np.testing.assert_allclose(normed.values.float().numpy(), expected, rtol=tolerance(dtype))
    else:
        check_codes(normed.values, expected, mode)


def test_norm_of_zeros_and_of_what_is_not_finite(rows: Rows) -> None:
    x = torch.ones(4, 130)
    x[0] = 0
    x[1, 129] = NAN
    x[2, 3] = INF

    plain = rows.rms_norm(x, torch.ones(130), 1e-6, None, None).values
    codes = rows.rms_norm(x, torch.ones(130), 1e-6, None, "int8 token").values

    assert (plain[0] == 0).all()
    assert plain[1].isnan().all()
    assert plain[2, 3].isnan() and (plain[2, 4:] == 0).all()
    assert codes.scales[0] == 0 and codes.scales[1:3].isnan().all() and codes.scales[3] > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_gated(
    rows: Rows,
    rng: np.random.Generator,
    dtype: torch.dtype,
    activation: str,
    mode: QuantizeMode | None,
) -> None:
    both = random(rng, (2, 600), dtype)
    gate, up = both.chunk(2, dim=1)

    out = rows.gated(gate, up, activation, mode)

    oracle = operators.silu_mul if activation == "silu" else operators.gelu_mul
    expected = oracle(gate.double().numpy(), up.double().numpy()).astype(np.float32)
    if mode is None:
        assert out.dtype == dtype and out.is_contiguous()
        np.testing.assert_allclose(
            out.float().numpy(), expected, rtol=tolerance(dtype), atol=5e-7 * np.abs(expected).max()
        )
    else:
        check_codes(out, expected, mode)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_at_the_ends(rows: Rows, activation: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 1e4, -1e4, INF, NAN, 1e-30, -200.0]])

    out = rows.gated(gate, torch.full_like(gate, 2.0), activation, None)

    assert out[0, :5].tolist() == [0, 0, 2e4, 0, INF]
    assert out[0, 5].isnan()
    assert out[0, 6] == pytest.approx(1e-30) and out[0, 7].item() == pytest.approx(0, abs=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", [1, 100, 128, 129, 384])
def test_quantize(
    rows: Rows, rng: np.random.Generator, dtype: torch.dtype, mode: QuantizeMode, features: int
) -> None:
    x = random(rng, (3, features), dtype)

    got = rows.quantize(x, mode)

    codes, scales = expected_codes(x.float().numpy(), mode)
    assert got.codes.is_contiguous() and got.codes.shape == x.shape
    np.testing.assert_array_equal(got.codes.float().numpy(), codes)
    np.testing.assert_array_equal(got.scales.numpy(), scales)


@pytest.mark.parametrize("mode", [None, "fp8 group", StaticScale(0.011)])
def test_rows_of_several_tiles(
    rows: Rows, rng: np.random.Generator, mode: QuantizeMode | None
) -> None:
    gate, up = random(rng, (4, 2 * 2305), torch.float32).chunk(2, dim=1)

    out = rows.gated(gate, up.contiguous(), "silu", mode)

    expected = operators.silu_mul(gate.double().numpy(), up.double().numpy()).astype(np.float32)
    if mode is None:
        np.testing.assert_allclose(out.numpy(), expected, rtol=2e-6, atol=5e-6)
    else:
        check_codes(out, expected, mode)
        codes = rows.quantize(gate, mode)
        np.testing.assert_array_equal(
            codes.codes.float().numpy(), expected_codes(gate.numpy(), mode)[0]
        )


def test_int8_rounds_halves_to_even(rows: Rows) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -125.5, 127.0]])

    got = rows.quantize(x, "int8 token")

    assert got.codes.tolist() == [[0, 2, 2, 0, -2, 126, -126, 127]]
    assert got.scales.tolist() == [[1.0]]


def test_factors_are_quotients(rows: Rows) -> None:
    # Products with 1 / max|x| put these on the other side of a half.
    x = torch.tensor([[1.2697867, 0.8348597], [1.6066358, 0.84126997]])

    assert rows.quantize(x, "int8 token").codes.tolist() == [[127, 84], [127, 67]]


@pytest.mark.parametrize("mode", ["fp8 token", "fp8 group"])
def test_fp8_rounds_halves_to_even(rows: Rows, mode: QuantizeMode) -> None:
    x = torch.tensor([[17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 432.0, -448.0, 440.0, 2.0**-11]])

    got = rows.quantize(x, mode)

    expected = [16.0, 20.0, -16.0, 0.0, 2.0**-8, 448.0, -448.0, 448.0, 0.0]
    assert got.codes.float().tolist() == [expected]
    assert got.scales.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MEASURED)
def test_scales_at_the_ends(rows: Rows, dtype: torch.dtype, mode: QuantizeMode) -> None:
    x = torch.zeros(7, 96, dtype=dtype)
    least = 2.0 ** (-120 if mode == "int8 token" else -119)
    x[1, 5] = least / 2
    x[2, 5] = least
    x[3, 5], x[3, 6] = NAN, 1.0
    x[4, 95] = -INF
    x[5, 0], x[5, 1] = INF, NAN
    x[6, 7] = -(2.0**127)

    got = rows.quantize(x, mode)

    most = 127 if mode == "int8 token" else 448
    scales = got.scales.numpy()[:, 0]
    assert scales[:2].tolist() == [0, 0]
    assert scales[2] == np.float32(least) / np.float32(most)
    assert np.isnan(scales[3:6]).all()
    assert scales[6] == np.float32(2.0**127) / np.float32(most)
    codes = got.codes.float()
    assert (codes[:2] == 0).all()
    assert codes[2, 5] == most and codes[6, 7] == -most
    assert codes[2].abs().sum() == most and codes[6].abs().sum() == most


def test_codes_of_a_static_scale_at_the_ends(rows: Rows) -> None:
    x = torch.tensor(
        [[100.0, 111.99, 112.0, 113.0, 1e38, INF, -INF, NAN, -0.0, 2.0**-11, 2.0**-12]]
    )

    got = rows.quantize(x.repeat(3, 1), StaticScale(0.25))

    assert got.scales.tolist() == [[0.25]] * 3
    expected = [384.0, 448.0, 448.0, 448.0, 448.0, 448.0, -448.0, NAN, -0.0, 2.0**-9, 0.0]
    for codes in got.codes.float().numpy():
        np.testing.assert_array_equal(codes, expected)
        assert np.signbit(codes[8])


@pytest.mark.parametrize("scale", [2.0**-126, 3.4e-7, 0.1, 12345.6, 2.0**126])
def test_every_static_scale_is_a_product_with_its_reciprocal(
    rows: Rows, rng: np.random.Generator, scale: float
) -> None:
    """Division, or a reciprocal in float64, puts some of these on the other side of a half."""
    mode = StaticScale(float(np.float32(scale)))
    halves = (e4m3fn()[1:] + e4m3fn()[:-1]) / 2
    x = rng.choice(halves, (64, 61)).astype(np.float32) * np.float32(scale)

    got = rows.quantize(torch.from_numpy(x), mode)

    codes, scales = expected_codes(x, mode)
    np.testing.assert_array_equal(got.codes.float().numpy(), codes)
    np.testing.assert_array_equal(got.scales.numpy(), scales)


def test_nan_of_a_static_scale_stays_one(rows: Rows) -> None:
    x = torch.ones(3, 40)
    x[1, 7] = NAN

    codes = (
        rows.quantize(x, StaticScale(0.1)).codes,
        rows.gated(x, x, "silu", StaticScale(0.1)).codes,
        rows.rms_norm(x, torch.ones(40), 1e-5, None, StaticScale(0.1)).values.codes,
    )

    for number, got in enumerate(codes):
        expected = torch.zeros(3, 40, dtype=torch.bool)
        expected[1, slice(None) if number == 2 else 7] = True
        assert torch.equal(got.float().isnan(), expected)


def test_nan_spoils_its_own_group_only(rows: Rows) -> None:
    x = torch.ones(1, 300)
    x[0, 130] = NAN

    scales = rows.quantize(x, "fp8 group").scales

    assert scales.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_row_depends_on_no_other(
    rows: Rows, rng: np.random.Generator, mode: QuantizeMode | None
) -> None:
    gate, up = random(rng, (9, 200), torch.float32), random(rng, (9, 200), torch.float32)
    weight = torch.from_numpy(rng.normal(size=200).astype(np.float32))

    def both(part: slice) -> list[Tensor]:
        results = [
            rows.gated(gate[part], up[part], "gelu", mode),
            rows.rms_norm(gate[part], weight, 1e-5, up[part], mode).values,
            rows.rms_norm(gate[part], weight[:40], 1e-5, None, None).values,
        ]
        return [t for r in results for t in ((r,) if isinstance(r, Tensor) else r)]

    whole = both(slice(0, 9))
    for one in (0, 4, 8):
        for single, every in zip(both(slice(one, one + 1)), whole, strict=True):
            assert torch.equal(single[0].float(), every[one].float())


def test_no_rows(rows: Rows) -> None:
    x = torch.zeros(0, 200)

    normed = rows.rms_norm(x, torch.ones(200), 1e-5, x, "fp8 group")

    assert normed.values.codes.shape == (0, 200) and normed.values.scales.shape == (0, 2)
    assert rows.gated(x, x, "silu", None).shape == (0, 200)
    assert rows.quantize(x, "int8 token").scales.shape == (0, 1)
    assert rows.quantize(x, StaticScale(0.5)).scales.shape == (0, 1)

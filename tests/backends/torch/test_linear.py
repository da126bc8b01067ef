"""Linear operators, plain and in Triton, against products in float64."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.backends.torch import weights
from octavo.backends.torch.kernels import Quantized, QuantizedWeight
from octavo.backends.torch.plain import linear as plain
from octavo.backends.torch.triton import grouped_linear as grouped_file
from octavo.backends.torch.triton import matmul as matmul_file
from octavo.backends.torch.triton import quantized_linear as quantized_file
from octavo.backends.torch.triton import row_linear as row_file
from octavo.backends.torch.triton.grouped_linear import grouped_linear
from octavo.backends.torch.triton.grouped_matmul import grouped_matmul
from octavo.backends.torch.triton.matmul import matmul
from octavo.backends.torch.triton.parts import sum_parts
from octavo.backends.torch.triton.quantized_linear import quantized_linear
from octavo.backends.torch.triton.row_linear import linear
from octavo.backends.torch.uploads import Uploads
from octavo.weights.formats.layout import BlockLayout
from octavo.weights.formats.registry import BLOCKS

CPU = Uploads(torch.device("cpu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATMUL = {"plain": plain.matmul, "triton": matmul}
GROUPED = {"plain": plain.grouped_linear, "triton": grouped_linear}
QUANTIZED = {"plain": plain.quantized_linear, "triton": quantized_linear}


def random(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32))


def rows_of(rng: np.random.Generator, tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """Rows that stand apart, NaN between them."""
    wide = torch.full((tokens, features + 16), torch.nan, dtype=dtype)
    wide[:, :features] = random(rng, tokens, features).to(dtype)
    return wide[:, :features]


def assert_close(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Of a product whose weights and result may be rounded to the dtype of the result."""
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    unit = torch.finfo(actual.dtype).eps / 2
    spread = (x.double() ** 2 @ weight.double().T ** 2).sqrt()
    bound = unit * (expected.abs() + 3 * spread) + size * 2.0**-20
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


def assert_rows_alone(product: Any, x: Tensor, whole: Tensor) -> None:
    """A row's bits do not depend on the rows beside it."""
    for start, stop in ((len(x) - 1, len(x)), (1, len(x))):
        assert torch.equal(product(x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("matmul", MATMUL.values(), ids=MATMUL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 5, 7), (33, 131, 200)])
def test_matmul(
    rng: np.random.Generator, matmul: Any, dtype: torch.dtype, tokens: int, n: int, k: int
) -> None:
    x = rows_of(rng, tokens, k, dtype)
    weight, bias = random(rng, n, k).to(dtype), random(rng, n).to(dtype)
    actual = matmul(x, weight, bias)
    assert actual.dtype == dtype
    assert_close(actual, x, weight, bias)
    assert_close(matmul(x, weight, None), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 7), (5, 1024), (131, 1100), (8, 2064)])
def test_linear_of_one_row(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    n: int,
    k: int,
) -> None:
    x, bias = rows_of(rng, 1, k, dtype), random(rng, n).to(dtype)
    weight = rows_of(rng, n, k, dtype)
    for rows, given in ((x, bias), (x, None), (x[:0], bias)):
        actual = linear(rows, weight, given)
        assert actual.dtype == dtype
        assert_close(actual, rows, weight, given)
    monkeypatch.setattr(row_file, "row_linear_kernel", None)
    assert_close(linear(x.expand(2, k), weight, None), x.expand(2, k), weight)
    monkeypatch.setattr(row_file, "_MANY_OUTPUTS", n)
    assert_close(linear(x, weight, None), x, weight)


@pytest.mark.parametrize("matmul", MATMUL.values(), ids=MATMUL)
def test_matmul_rows_alone(rng: np.random.Generator, matmul: Any) -> None:
    x, weight = rows_of(rng, 67, 1100, torch.bfloat16), random(rng, 9, 1100).bfloat16()
    whole = matmul(x, weight, None)
    assert_rows_alone(lambda rows: matmul(rows, weight, None), x, whole)


@pytest.mark.parametrize("grouped_linear", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "k"), [(4, 16, 48), (3, 32, 160), (4, 128, 256), (8, 16, 80), (6, 64, 192)]
)
def test_grouped_linear(
    kit: Any,
    rng: np.random.Generator,
    grouped_linear: Any,
    minimums: bool,
    bits: int,
    group: int,
    k: int,
) -> None:
    tensor = kit.grouped(rng, 37, k, bits, group, minimums=minimums)
    weight = weights.pack_grouped(tensor, CPU)
    dense = torch.from_numpy(tensor.dequantize())
    bias = random(rng, 37).bfloat16()
    for tokens, deterministic in ((1, False), (17, False), (1, True)):
        x = rows_of(rng, tokens, k, torch.bfloat16)
        actual = grouped_linear(x, weight, bias, deterministic)
        assert actual.dtype == x.dtype
        assert_close(actual, x, dense, bias)


@pytest.mark.parametrize("grouped_linear", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_dtypes(
    kit: Any, rng: np.random.Generator, grouped_linear: Any, dtype: torch.dtype
) -> None:
    tensor = kit.grouped(rng, 70, 192, 4, 32, minimums=True)
    weight = weights.pack_grouped(tensor, CPU)
    for tokens in (1, 9):
        x = rows_of(rng, tokens, 192, dtype)
        actual = grouped_linear(x, weight, None, False)
        assert_close(actual, x, torch.from_numpy(tensor.dequantize()))


@pytest.mark.parametrize("grouped_linear", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("layout", BLOCKS.values(), ids=BLOCKS)
def test_grouped_linear_every_format(
    rng: np.random.Generator, grouped_linear: Any, layout: BlockLayout
) -> None:
    rows, per_row = 5, max(1, 256 // layout.block_len)
    data = rng.integers(0, 256, (rows, per_row, layout.block_bytes), np.uint8)
    for halves in (layout.scales, layout.minimums):
        if halves is not None:
            values = rng.normal(0, 1, (rows, per_row, 1)).astype("<f2")
            data[:, :, halves.start : halves.start + 2] = values.view(np.uint8)
    tensor = layout.read(data.reshape(-1), (rows, per_row * layout.block_len))
    weight = weights.pack_grouped(tensor, CPU)
    x = rows_of(rng, 2, tensor.shape[1], torch.float16) / 64
    actual = grouped_linear(x, weight, None, False)
    assert_close(actual, x, torch.from_numpy(tensor.dequantize()))


@pytest.mark.parametrize("grouped_linear", GROUPED.values(), ids=GROUPED)
def test_grouped_linear_rows_alone(kit: Any, rng: np.random.Generator, grouped_linear: Any) -> None:
    weight = weights.pack_grouped(kit.grouped(rng, 9, 1056, 4, 32, minimums=False), CPU)
    x = rows_of(rng, 17, 1056, torch.bfloat16)
    whole = grouped_linear(x, weight, None, True)
    assert_rows_alone(lambda rows: grouped_linear(rows, weight, None, True), x, whole)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ascending", [False, True])
def test_grouped_linear_of_each_order_of_dimensions(
    kit: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, bits: int, ascending: bool
) -> None:
    """Whatever Triton's version is here."""
    monkeypatch.setattr(grouped_file, "ASCENDING", ascending)
    tensor = kit.grouped(rng, 37, 160, bits, 16, minimums=True)
    weight = weights.pack_grouped(tensor, CPU)
    for tokens in (1, 2):
        x = rows_of(rng, tokens, 160, torch.bfloat16)
        actual = grouped_linear(x, weight, None, False)
        assert_close(actual, x, torch.from_numpy(tensor.dequantize()))


@pytest.mark.parametrize(("has_bias", "ascending"), [(False, True), (True, False)])
def test_grouped_linear_of_many_tokens(
    kit: Any,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    has_bias: bool,
    ascending: bool,
) -> None:
    """By way of the written out weight, some rows at a time."""
    monkeypatch.setattr(grouped_file, "ASCENDING", ascending)
    monkeypatch.setattr(grouped_file, "_MAX_TOKENS", 2)
    monkeypatch.setattr(grouped_file, "_SCRATCH_NUMBERS", 64 * 160)
    tensor = kit.grouped(rng, 70, 160, 4, 32, minimums=True)
    weight = weights.pack_grouped(tensor, CPU)
    x = rows_of(rng, 3, 160, torch.bfloat16)
    bias = random(rng, 70).bfloat16() if has_bias else None
    actual = grouped_file.grouped_linear(x, weight, bias, False)
    assert_close(actual, x, torch.from_numpy(tensor.dequantize()), bias)
    monkeypatch.setattr(grouped_file, "unpack_kernel", None)
    assert_close(
        grouped_file.grouped_linear(x, weight, bias, True),
        x,
        torch.from_numpy(tensor.dequantize()),
        bias,
    )


def quantized(rng: np.random.Generator, mode: str, tokens: int, k: int) -> Quantized:
    scales = torch.rand(tokens, -(-k // 128) if mode == "fp8 block" else 1) + 0.5
    values = random(rng, tokens, k)
    if mode.startswith("int8"):
        return Quantized((values * 40).clamp(-127, 127).to(torch.int8), scales)
    return Quantized(values.to(torch.float8_e4m3fn), scales)


def quantized_weight(rng: np.random.Generator, mode: str, n: int, k: int) -> QuantizedWeight:
    values = random(rng, n, k)
    if mode.endswith("whole"):
        dtype = torch.int8 if mode.startswith("int8") else torch.float8_e4m3fn
        return QuantizedWeight((values * 30).to(dtype), torch.tensor([[0.01]]))
    return weights.quantize_dense(values, mode)


MODES = ["int8 row", "int8 whole", "fp8 row", "fp8 block", "fp8 whole"]


@pytest.mark.parametrize("quantized_linear", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("tokens", "n", "k", "dtype"),
    [
        (1, 5, 16, torch.float32),
        (1, 6, 1040, torch.bfloat16),
        (2, 131, 144, torch.bfloat16),
        (67, 5, 272, torch.float16),
    ],
)
def test_quantized_linear(
    rng: np.random.Generator,
    quantized_linear: Any,
    mode: str,
    tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> None:
    x, weight = quantized(rng, mode, tokens, k), quantized_weight(rng, mode, n, k)
    scales = x.scales.repeat_interleave(128, 1)[:, :k] if mode == "fp8 block" else x.scales
    dense = x.codes.float().double() * scales
    bias = random(rng, n).to(dtype)
    actual = quantized_linear(x, weight, bias, dtype, False)
    assert actual.dtype == dtype
    assert_close(actual, dense, weights.dequantize(weight), bias)
    assert_close(quantized_linear(x, weight, None, dtype, True), dense, weights.dequantize(weight))


@pytest.mark.parametrize("quantized_linear", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("mode", ["int8 row", "fp8 row", "fp8 block"])
def test_quantized_linear_rows_alone(
    rng: np.random.Generator, quantized_linear: Any, mode: str
) -> None:
    x, weight = quantized(rng, mode, 67, 1040), quantized_weight(rng, mode, 9, 1040)
    whole = quantized_linear(x, weight, None, torch.bfloat16, True)
    for start, stop in ((66, 67), (1, 67)):
        rows = Quantized(x.codes[start:stop], x.scales[start:stop])
        alone = quantized_linear(rows, weight, None, torch.bfloat16, True)
        assert torch.equal(alone, whole[start:stop])


@pytest.mark.parametrize(
    ("capability", "takes"), [((8, 0), False), ((8, 9), True), ((10, 3), True), ((12, 0), False)]
)
def test_which_devices_take_scaled_mm(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], takes: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    codes: Any = SimpleNamespace(
        shape=(65, 32), is_cuda=True, dtype=torch.float8_e4m3fn, device="cuda"
    )
    weight = QuantizedWeight(torch.zeros(16, 32, dtype=torch.float8_e4m3fn), torch.ones(16, 1))
    x = Quantized(codes, torch.ones(65, 1))
    assert quantized_file._takes_scaled_mm(x, weight, torch.bfloat16) == takes


@pytest.mark.parametrize("product", [plain.grouped_matmul, grouped_matmul], ids=["plain", "triton"])
@pytest.mark.parametrize(
    ("counts", "n", "k"),
    [((1,), 5, 16), ((0, 3, 0, 17, 1), 131, 64), ((130, 0, 65), 9, 72), ((0, 0, 2), 8, 16)],
)
def test_grouped_matmul(
    rng: np.random.Generator, product: Any, counts: tuple[int, ...], n: int, k: int
) -> None:
    x = rows_of(rng, sum(counts), k, torch.bfloat16)
    weight = random(rng, len(counts), n, k).bfloat16()
    offsets = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    actual = product(x, weight, offsets)
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        assert_close(actual[start:stop], x[start:stop], weight[expert])


@pytest.mark.parametrize("num_parts", [1, 3, 8])
def test_sum_parts(rng: np.random.Generator, num_parts: int) -> None:
    """In order, from 0.0 on."""
    sums = random(rng, num_parts, 2, 515)
    sums[:, :, :3] = -0.0
    scales, row_scales, bias = random(rng, 515), random(rng, 2), random(rng, 515).bfloat16()
    expected = torch.zeros(2, 515)
    for part in sums:
        expected = expected + part
    out = torch.empty(2, 515)
    sum_parts(sums, out, None)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
    sum_parts(sums, out, bias, scales, row_scales)
    scaled = (expected * row_scales[:, None]).double() * scales + bias.double()
    torch.testing.assert_close(out, scaled.float(), rtol=1e-6, atol=1e-5)


def test_parts_of_one_program_or_of_several(
    kit: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sums the parts of a row does not change its bits."""
    x, dense = random(rng, 3, 1056).bfloat16(), random(rng, 5, 1056).bfloat16()
    bias = random(rng, 5).bfloat16()
    grouped = weights.pack_grouped(kit.grouped(rng, 5, 1056, 4, 32, minimums=True), CPU)
    codes, fp8 = quantized(rng, "fp8 row", 3, 1056), quantized_weight(rng, "fp8 row", 5, 1056)

    def results() -> list[Tensor]:
        return [
            matmul(x, dense, bias),
            grouped_linear(x, grouped, bias, True),
            quantized_linear(codes, fp8, bias, torch.bfloat16, True),
        ]

    asked = []

    def share(answer: bool) -> Any:
        return lambda parts, *_: asked.append(parts.num) or answer

    for file in (matmul_file, grouped_file, quantized_file):
        monkeypatch.setattr(file, "are_shared", share(True))
    shared = results()
    for file in (matmul_file, grouped_file, quantized_file):
        monkeypatch.setattr(file, "are_shared", share(False))
    for one, other in zip(shared, results(), strict=True):
        assert torch.equal(one, other)
    assert asked == 2 * [2, 2, 2]

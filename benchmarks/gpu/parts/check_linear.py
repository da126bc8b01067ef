"""Part A: products with dense, grouped and quantized weights, against products in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.backends.torch import weights
from octavo.backends.torch.kernels import GroupedWeight, Kernels, Quantized
from octavo.backends.torch.plain.table import KERNELS as PLAIN
from octavo.backends.torch.tables import choose_kernels
from parts.check import BF16, F16, F32, NAMES, Checks, generator, unlike
from parts.machine import Setup
from parts.record import Recorder

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (
    (1, 4096, 4096),
    (2, 131, 400),
    (17, 6144, 4096),
    (64, 512, 14336),
    (67, 4096, 1104),
    (300, 1024, 4096),
)
QUICK: tuple[Shape, ...] = ((1, 33, 64), (19, 40, 144))
PREFILL: Shape = (130, 1024, 4096)
"""In bfloat16 it goes to torch's product of FP8 (see triton/quantized_linear.py)."""
COUNTS = (1, 2, 16, 17, 64, 65, 129)
MODES: tuple[tuple[weights.WeightMode, str], ...] = (
    ("int8 row", "int8 token"),
    ("fp8 row", "fp8 token"),
    ("fp8 block", "fp8 group"),
)
GROUPED = (  # bits, columns a group, minimums
    (4, 32, True), (4, 32, False), (4, 128, False), (4, 16, True), (8, 16, False), (8, 32, False),
)  # fmt: skip


def run(setup: Setup, recorder: Recorder, kind: str) -> None:
    """Weights of one kind of those in `cases`; then the bytes of rows alone."""
    checks = Checks(setup, recorder, "Products")
    kernels = choose_kernels(setup.table, setup.device)
    for name, case in cases(setup, kernels)[kind].items():
        checks.add(name, case)
    rows = Checks(setup, recorder, "Bytes of products, deterministic")
    for name, product in products(setup, kernels).get(kind, {}).items():
        rows.add(name, lambda p=product: alone(setup, p))


def cases(setup: Setup, kernels: Kernels) -> dict[str, dict[str, Callable[[], float]]]:
    """What is checked, by kind and name; each of GROUPED is a kind, which compiles for long."""
    found: dict[str, dict[str, Callable[[], float]]] = {}
    found["dense"] = {
        f"matmul and linear {NAMES[dtype]}": lambda d=dtype: dense(setup, kernels, d)
        for dtype in (BF16, F16, F32)
    }
    for number, kind in enumerate(GROUPED, 1):
        name = f"{kind[0]} bits, groups of {kind[1]}, {'' if kind[2] else 'no '}minimums"
        found[f"grouped {number}"] = {
            f"grouped_linear {NAMES[dtype]}, {name}": lambda k=kind, d=dtype: grouped(
                setup, kernels, k, d
            )
            for dtype in ((BF16, F32) if number == 1 else (BF16,))
        }
    found["quantized"] = {
        f"quantized_linear {weight_mode}": lambda w=weight_mode, i=input_mode: quantized(
            setup, kernels, w, i
        )
        for weight_mode, input_mode in MODES
    }
    return found


def shapes(setup: Setup) -> tuple[Shape, ...]:
    """Tokens, outputs, inputs."""
    return QUICK if setup.quick else SHAPES


def random(setup: Setup, rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Strided rows, NaN between them."""
    wide = torch.full((rows, columns + 16), torch.nan, dtype=dtype, device=setup.device)
    values = torch.randn((rows, columns), generator=generator(setup, seed), device=setup.device)
    wide[:, :columns] = values.to(dtype)
    return wide[:, :columns]


def product_error(
    actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sums: float = 2.0**-20
) -> float:
    """By a rounding of weights and of the result, and `sums` of all that is summed."""
    wide, matrix = x.double(), weight.double()
    expected, size = wide @ matrix.T, wide.abs() @ matrix.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    unit = torch.finfo(actual.dtype).eps / 2
    spread = ((wide**2) @ (matrix**2).T).sqrt()
    allowed = unit * (expected.abs() + 4 * spread) + size * sums
    parts = (actual.double() - expected).abs() / allowed
    return float(torch.where(parts.isnan(), torch.inf, parts).max())


def dense(setup: Setup, kernels: Kernels, dtype: torch.dtype) -> float:
    """With a bias and without, in turn."""
    worst = 0.0
    for number, (tokens, n, k) in enumerate((*shapes(setup), (3, 5, 7))):
        x = random(setup, tokens, k, dtype)
        weight = random(setup, n, k, dtype, 2).contiguous()
        bias = random(setup, 1, n, dtype, 3)[0].contiguous() if number % 2 else None
        for multiply in (kernels.matmul, kernels.linear):
            worst = max(worst, product_error(multiply(x, weight, bias), x, weight, bias))
    return worst


def grouped_weight(setup: Setup, n: int, k: int, kind: tuple[int, int, bool]) -> GroupedWeight:
    """Random words; groups beyond the columns have scale 0."""
    bits, group, has_minimums = kind
    device = setup.device
    blocks = -(-k // weights.block_columns(bits))
    words = torch.randint(
        -(2**31), 2**31, (blocks, n, weights.WORDS), dtype=torch.int32, device=device,
        generator=generator(setup),
    )  # fmt: skip
    groups = -(-blocks * weights.block_columns(bits) // group)
    scales = torch.rand((groups, n), generator=generator(setup), device=device) + 0.5
    scales[k // group :] = 0
    minimums = (-scales * 2 ** (bits - 1) * 0.9).half() if has_minimums else None
    factors = 2.0 ** torch.randint(-9, -6, (n,), device=device).float()
    zero = 0 if has_minimums else 2 ** (bits - 1)
    pairs = weights.pack_scales(scales.half(), minimums)
    return GroupedWeight(words, pairs, has_minimums, factors, bits, zero, group, (n, k))


def grouped(
    setup: Setup, kernels: Kernels, kind: tuple[int, int, bool], dtype: torch.dtype
) -> float:
    """Both modes."""
    worst = 0.0
    for tokens, n, k in shapes(setup):
        k = -(-k // kind[1]) * kind[1]
        weight = grouped_weight(setup, n, k, kind)
        exact = weights.unpack_grouped(weight)
        x = random(setup, tokens, k, dtype)
        bias = random(setup, 1, n, dtype, 3)[0].contiguous()
        for deterministic in (False, True):
            actual = kernels.grouped_linear(x, weight, bias, deterministic)
            worst = max(worst, product_error(actual, x, exact, bias))
    return worst


def quantized(
    setup: Setup, kernels: Kernels, weight_mode: weights.WeightMode, input_mode: str
) -> float:
    """Both modes; the tensor cores keep fewer bits of sums of FP8."""
    worst = 0.0
    sums = 2.0**-20 if weight_mode == "int8 row" else 2.0**-13
    sizes = [(*shape, (BF16, F16, F32)[n % 3], n % 2 > 0) for n, shape in enumerate(shapes(setup))]
    prefill = (67, 48, 64) if setup.quick else PREFILL
    sizes += [(*prefill, BF16, has_bias) for has_bias in (False, True)]
    for tokens, n, k, dtype, has_bias in sizes:
        k = -(-k // 16) * 16
        weight = weights.quantize_dense(random(setup, n, k, F32, 2), weight_mode)
        x = PLAIN.quantize(random(setup, tokens, k, F32), input_mode)  # type: ignore[arg-type]
        exact = meaning(x, k)
        bias = random(setup, 1, n, dtype, 3)[0].contiguous() if has_bias else None
        for deterministic in (False, True):
            actual = kernels.quantized_linear(x, weight, bias, dtype, deterministic)
            error = product_error(actual, exact, weights.dequantize(weight), bias, sums)
            worst = max(worst, error)
    return worst


def meaning(x: Quantized, columns: int) -> Tensor:
    """What codes mean, in float64."""
    scales = x.scales.double()
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(128, 1)[:, :columns]
    return x.codes.float().double() * scales


Product = Callable[[Tensor], Tensor]


def products(setup: Setup, kernels: Kernels) -> dict[str, dict[str, Product]]:
    """Products of rows of bfloat16, in deterministic mode, by kind and name."""
    n, k = (40, 160) if setup.quick else (4096, 4096)
    matrix = random(setup, n, k, BF16, 2).contiguous()

    def grouped_of(kind: tuple[int, int, bool]) -> Product:
        weight = grouped_weight(setup, n, k, kind)
        return lambda x: kernels.grouped_linear(x, weight, None, True)

    def quantized_of(mode: weights.WeightMode, rounding: str) -> Product:
        weight = weights.quantize_dense(matrix, mode)

        def multiply(x: Tensor) -> Tensor:
            codes = kernels.quantize(x, rounding)  # type: ignore[arg-type]
            return kernels.quantized_linear(codes, weight, None, BF16, True)

        return multiply

    return {
        "dense": {"matmul": lambda x: kernels.matmul(x, matrix, None)},
        "grouped 1": {"grouped_linear, 4 bits": grouped_of(GROUPED[0])},
        "grouped 5": {"grouped_linear, 8 bits": grouped_of(GROUPED[4])},
        "quantized": {f"quantized_linear, {w}": quantized_of(w, i) for w, i in MODES},
    }


def alone(setup: Setup, product: Callable[[Tensor], Tensor]) -> float:
    """Rows in steps of other sizes, beside those of the largest step."""
    columns = 160 if setup.quick else 4096
    x = random(setup, 33 if setup.quick else 300, columns, BF16)
    whole = product(x)
    worst = 0.0
    for count in (1, 17) if setup.quick else COUNTS:
        for start in (0, len(x) - count):
            part = slice(start, start + count)
            worst = max(worst, unlike(product(x[part]), whole[part]))
    return worst

"""Products ready to run: concatenated weights with their bias, whatever their kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.backends.torch import weights as there
from octavo.backends.torch.int4 import round_to_int4
from octavo.backends.torch.kernels import (
    GroupedWeight,
    Kernels,
    Quantized,
    QuantizedWeight,
    QuantizeMode,
    StaticScale,
)
from octavo.backends.torch.lowering import Form, LinearCall
from octavo.backends.torch.uploads import Uploads
from octavo.graph.tensors import BlockFloatTensor, GroupedTensor, StoredTensor


@dataclass(frozen=True, slots=True)
class Product:
    """What a LinearCall multiplies with.

    Attributes:
        weight: [N, K]: dense in the dtype of the activations, or as codes.
        bias: [N] in the dtype of the activations, or None.
        sizes: the features of each operator's result; N is their sum.
        quantize: how its input is rounded.
    """

    weight: Tensor | GroupedWeight | QuantizedWeight
    bias: Tensor | None
    sizes: tuple[int, ...]
    quantize: QuantizeMode | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        if isinstance(self.weight, Tensor):
            tensors = [self.weight, self.bias]
        elif isinstance(self.weight, GroupedWeight):
            weight = self.weight
            tensors = [weight.codes, weight.scales, weight.factors, self.bias]
        else:
            tensors = [self.weight.codes, self.weight.scales, self.bias]
        return sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)

    def multiply(
        self, x: Tensor | Quantized, kernels: Kernels, dtype: torch.dtype, deterministic: bool
    ) -> Tensor:
        """X @ weight.T + bias, [T, N] of `dtype`."""
        if isinstance(self.weight, QuantizedWeight):
            assert self.quantize is not None
            codes = x if isinstance(x, Quantized) else kernels.quantize(x, self.quantize)
            return kernels.quantized_linear(codes, self.weight, self.bias, dtype, deterministic)
        assert not isinstance(x, Quantized), "only a product with codes reads codes"
        if isinstance(self.weight, GroupedWeight):
            return kernels.grouped_linear(x, self.weight, self.bias, deterministic)
        multiply = kernels.matmul if deterministic else kernels.linear
        return multiply(x, self.weight, self.bias)


ROUNDED: Mapping[str, tuple[there.WeightMode, QuantizeMode]] = {
    "int8": ("int8 row", "int8 token"),
    "fp8": ("fp8 row", "fp8 token"),
}
"""How weights are rounded while loading, and their inputs in each step."""


def form_of(name: str, tensor: StoredTensor, rounding: str | None, has_fp8: bool) -> Form:
    """How a stored matrix is multiplied.

    Args:
        name: the weight's.
        tensor: the matrix.
        rounding: how it is rounded while loading, if it is (see DeviceOptions.quantization).
        has_fp8: what `device.has_fp8` says of the device.
    """
    if isinstance(tensor, GroupedTensor):
        bits = 4 if tensor.bits <= 4 else 8
        has_minimums = tensor.minimums is not None
        return Form(("grouped", bits, tensor.codes.zero, tensor.group, has_minimums))
    if isinstance(tensor, BlockFloatTensor) and has_fp8 and there.can_pack_fp8(tensor):
        if there.has_row_scales(tensor):
            if tensor.input_scale is not None:
                return Form(("fp8 static",), StaticScale(tensor.input_scale))
            return Form(("fp8",), "fp8 token")
        # Only whole blocks can be joined.
        whole = "" if tensor.shape[0] % there.BLOCK == 0 else name
        return Form(("fp8 blocks", whole), "fp8 group")
    if rounding is not None and rounding in ROUNDED:
        weight_mode, input_mode = ROUNDED[rounding]
        return Form((weight_mode,), input_mode)
    return Form(("dense", rounding))


def make_product(call: LinearCall, weights: Sequence[there.Weight], bias: Tensor | None) -> Product:
    """Join the weights of a product, which are on the device."""
    sizes = tuple(operator.out_features for operator in call.operators)
    weight = weights[0] if len(weights) == 1 else there.concat(weights)
    return Product(weight, bias, sizes, call.quantize)


def bring(
    tensor: StoredTensor, form: Form, rounding: str | None, dtype: torch.dtype, uploads: Uploads
) -> there.Weight:
    """A matrix on the device, in its form."""
    if isinstance(tensor, GroupedTensor):
        return there.pack_grouped(tensor, uploads)
    if isinstance(tensor, BlockFloatTensor) and form.quantize is not None:
        return there.pack_fp8(tensor, uploads)
    weight = there.dense(tensor, dtype, uploads)
    if rounding is not None and rounding in ROUNDED:
        return there.quantize_dense(weight, ROUNDED[rounding][0])
    return round_to_int4(weight) if rounding == "int4" else weight

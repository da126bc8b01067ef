"""Runs the calls of a lowered graph over the arrays of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.backends.torch.cache import KVCache
from octavo.backends.torch.kernels import Kernels, Quantized, StepArrays
from octavo.backends.torch.lowering import (
    AddCall,
    AttentionCall,
    Call,
    EmbedCall,
    GatedCall,
    InputCall,
    LinearCall,
    NormCall,
    SelectCall,
    last_reads,
    reads,
)
from octavo.backends.torch.products import Product
from octavo.graph import ops as op
from octavo.graph.trace import Graph

Values = dict[int, Tensor | Quantized]


class Weights:
    """The weights on the device, by how they are used.

    Attributes:
        tables: embeddings in the dtype of the activations, by name.
        norms: float32, by name.
        products: by the LinearCall.
        angles: float32 [max_model_len, head_dim]: cosines, then sines, by inv_freq.
        key_factors: float32 [num_kv_heads, head_dim], for a cache of codes.
    """

    def __init__(self) -> None:
        """Start without any."""
        self.tables: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.products: dict[LinearCall, Product] = {}
        self.angles: dict[tuple[float, ...], Tensor] = {}
        self.key_factors: dict[op.PagedAttention, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        products = [p.nbytes for p in self.products.values()]
        dense = (*self.tables.values(), *self.norms.values(), *self.angles.values())
        return sum(products) + sum(int(tensor.nbytes) for tensor in dense)


class GraphExecutor:
    """A lowered graph with its weights.

    Attributes:
        kernels: the table that is used.
        dtype: of the activations.
        weights_bytes: memory of the weights.
        vocabulary: how many tokens can be embedded; None without an embedding.
    """

    def __init__(
        self,
        graph: Graph,
        calls: tuple[Call, ...],
        weights: Weights,
        cache: KVCache | None,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        deterministic: bool,
    ) -> None:
        """Join calls, weights and cache."""
        self.kernels = kernels
        self.dtype = dtype
        self.weights_bytes = weights.nbytes
        self.vocabulary = min((len(table) for table in weights.tables.values()), default=None)
        self._outputs = graph.outputs
        self._calls = calls
        self._weights = weights
        self._cache = cache
        self._deterministic = deterministic
        self._last_reads = last_reads(calls)

    def run(
        self,
        step: StepArrays,
        token_ids: Tensor,
        logits_rows: Tensor,
        inputs: Mapping[str, Tensor],
        names: set[str],
    ) -> dict[str, Tensor]:
        """Compute a step; return the graph's outputs of these names, in the dtype computed in."""
        wanted = {self._outputs[name] for name in names}
        values: Values = {}
        for number, call in enumerate(self._calls):
            match call:
                case InputCall(name, out):
                    values[out] = inputs[name]
                case EmbedCall(weight, scale, out):
                    values[out] = _embed(self._weights.tables[weight], token_ids, scale)
                case SelectCall(x, out):
                    values[out] = _dense(values, x).index_select(0, logits_rows)
                case AttentionCall():
                    values[call.out] = self._attend(call, values, step)
                case _:
                    self._apply(call, values)
            for value in reads(call):
                if self._last_reads[value] == number and value not in wanted:
                    values.pop(value, None)
        return {name: _dense(values, self._outputs[name]) for name in names}

    def _apply(self, call: NormCall | LinearCall | GatedCall | AddCall, values: Values) -> None:
        kernels = self.kernels
        match call:
            case NormCall(operator, x, out, residual, total, quantize):
                added = None if residual is None else _dense(values, residual)
                weight = self._weights.norms[operator.weight]
                normed = kernels.rms_norm(_dense(values, x), weight, operator.eps, added, quantize)
                values[out] = normed.values
                if total is not None:
                    values[total] = normed.total
            case LinearCall(_, x, outs):
                product = self._weights.products[call]
                result = product.multiply(values[x], kernels, self.dtype, self._deterministic)
                parts = result.split(product.sizes, dim=1)
                values.update(zip(outs, parts, strict=True))
            case GatedCall(activation, (gate, up), out, quantize):
                values[out] = kernels.gated(
                    _dense(values, gate), _dense(values, up), activation, quantize
                )
            case AddCall((a, b), out):
                values[out] = _dense(values, a) + _dense(values, b)

    def _attend(self, call: AttentionCall, values: Values, step: StepArrays) -> Tensor:
        assert self._cache is not None
        query, key, value = (_dense(values, number) for number in call.inputs)
        cache = self._cache.layers[call.operator.layer]
        angles = None if call.inv_freq is None else self._weights.angles[call.inv_freq]
        factors = self._weights.key_factors.get(call.operator)
        rotated = self.kernels.rope_write(query, key, value, angles, step, cache, factors)
        return self.kernels.attention(
            rotated, cache, step, call.operator, self.dtype, self._deterministic
        )


def _embed(table: Tensor, token_ids: Tensor, scale: float) -> Tensor:
    rows = torch.nn.functional.embedding(token_ids, table)
    # A number of Python is rounded to float32 by the product, as the contract says.
    return rows if scale == 1.0 else (rows.float() * scale).to(rows.dtype)


def _dense(values: Values, number: int) -> Tensor:
    value = values[number]
    assert isinstance(value, Tensor), "codes are read by products alone"
    return value

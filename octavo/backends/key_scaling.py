"""Static factors that make the RoPE pairs of K of like size before K is rounded to int8.

A head's K shares one scale a token, so a pair that is much greater than the others (the biases of
Qwen2's keys are) costs the others their last bits. How large a pair becomes can be told from the
weights: the bias is there always, the product varies about the norm of the weight row times the
gains of the norm before it; normed heads vary about that norm's gains. K is divided by the factors
and the query multiplied: q·k stays but for rounding. Both elements of a pair share a factor, which
therefore commutes with the rotation.

Source: Xiao et al. 2023 (SmoothQuant), section 4, with statistics of the weights instead of
samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from octavo.graph import ops as op
from octavo.graph.batch import Float32
from octavo.graph.tensors import (
    BlockScales,
    Codes,
    GroupedTensor,
    GroupScales,
    Scales,
    StoredTensor,
)
from octavo.graph.trace import Graph, Node

_LEAST_BLOCKS = 4
"""Of a row of a grouped weight are read: a norm needs no more, and loading stays quick."""

_PEAK = 6.0
"""A product's greatest values over its root mean square (measured: 4 to 6 are equally good)."""

_SMALLEST = 2.0**-24
"""The least factor of a head whose greatest is 1, against division by zero."""


def key_factors(
    graph: Graph, weights: Mapping[str, StoredTensor]
) -> Mapping[op.PagedAttention, Float32]:
    """Of every attention operator, factors [num_kv_heads, head_dim]: K is divided by them."""
    makers = {node.output: node for node in graph.nodes}
    factors: dict[op.PagedAttention, Float32] = {}
    for node in graph.nodes:
        if isinstance(node.operator, op.PagedAttention):
            peaks = _peaks(makers[node.inputs[1]], makers, weights)
            factors[node.operator] = _factors(node.operator, peaks)
    return factors


def _factors(operator: op.PagedAttention, peaks: Float32) -> Float32:
    pairs = np.sqrt((peaks * peaks).reshape(operator.num_kv_heads, 2, -1).mean(axis=1))
    greatest = pairs.max(axis=1, keepdims=True)
    if not (np.isfinite(greatest).all() and (greatest > 0).all()):
        return np.ones((operator.num_kv_heads, operator.head_dim), np.float32)
    relative = np.maximum(pairs / greatest, np.float32(_SMALLEST))
    return np.tile(relative, (1, 2)).astype(np.float32)


def _peaks(node: Node, makers: Mapping[int, Node], weights: Mapping[str, StoredTensor]) -> Float32:
    """How large each feature is likely to become, up to a common factor; 1 if unknown."""
    match node.operator:
        case op.Rope():
            return _peaks(makers[node.inputs[0]], makers, weights)
        case op.RmsNorm(weight):
            gains = np.abs(weights[weight].dequantize())
            return np.tile(gains, node.features // len(gains))
        case op.Linear(weight, features, bias=bias):
            source = makers[node.inputs[0]]
            inputs = np.ones(features, np.float32)
            if isinstance(source.operator, op.RmsNorm):
                inputs *= _peaks(source, makers, weights) ** 2
            peaks: Float32 = np.float32(_PEAK) * np.sqrt(_row_squares(weights[weight], inputs))
            return peaks if bias is None else peaks + np.abs(weights[bias].dequantize())
    return np.ones(node.features, np.float32)


def _row_squares(weight: StoredTensor, inputs: Float32) -> Float32:
    """Sum over the columns of weight² * inputs, estimated from some blocks of a grouped weight."""
    columns = weight.shape[1]
    if isinstance(weight, GroupedTensor):
        weight = weight.in_small_groups()
        block = max(len(plane.byte_of) for plane in weight.codes.planes)
        step = max(1, columns // block // _LEAST_BLOCKS)
        if step > 1:
            chosen = np.arange(columns).reshape(-1, block)[::step].ravel()
            weight = _take_blocks(weight, block, step)
            inputs = inputs[chosen] * np.float32(columns / len(chosen))
    rows = weight.dequantize()
    return np.asarray(np.square(rows) @ inputs, np.float32)


def _take_blocks(weight: GroupedTensor, block: int, step: int) -> GroupedTensor:
    def codes(every: Codes) -> Codes:
        planes = (replace(p, data=p.data[:, ::step]) for p in every.planes)
        return replace(every, planes=tuple(planes))

    def scales(every: Scales) -> Scales:
        if isinstance(every, BlockScales):
            return replace(every, d=every.d[:, ::step], factors=codes(every.factors))
        by_block = every.halves.reshape(len(every.halves), -1, block // weight.group)
        return GroupScales(by_block[:, ::step].reshape(len(every.halves), -1))

    return replace(
        weight,
        codes=codes(weight.codes),
        scales=scales(weight.scales),
        minimums=None if weight.minimums is None else scales(weight.minimums),
    )

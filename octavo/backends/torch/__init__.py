"""The torch backend: the graph on CUDA and ROCm devices, and on torch's CPU device for tests."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from octavo.backends.key_scaling import key_factors
from octavo.backends.program import CompileOptions, Progress
from octavo.backends.torch import weights as there
from octavo.backends.torch.cache import KVCache
from octavo.backends.torch.device import choose_dtype, describe, has_fp8, open_device
from octavo.backends.torch.execute import GraphExecutor, Weights
from octavo.backends.torch.int4 import GROUP
from octavo.backends.torch.lowering import (
    AttentionCall,
    Call,
    EmbedCall,
    Form,
    LinearCall,
    NormCall,
    lower,
)
from octavo.backends.torch.products import Product, bring, form_of, make_product
from octavo.backends.torch.program import TorchProgram
from octavo.backends.torch.tables import choose_kernels
from octavo.backends.torch.uploads import Uploads
from octavo.errors import ConfigError, KernelError
from octavo.graph import ops as op
from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.graph.trace import Graph

__all__ = ["compile"]


def compile(
    graph: Graph,
    weights: Mapping[str, StoredTensor],
    options: CompileOptions,
    *,
    progress: Progress | None = None,
) -> TorchProgram:
    """Bring the weights to the device and lower the graph; `weights` are not needed afterwards.

    Args:
        graph: what to compute.
        weights: every weight that the graph declares; each is looked up once.
        options: sizes, and the device.
        progress: called with the fraction of the weights that is there.

    Raises:
        ConfigError: there is no such device, it has no room for the weights, or the graph has an
            operator that this backend lacks.
        KernelError: a weight is missing or of another shape than declared.
    """
    device = open_device(options.device.name)
    kernels = choose_kernels(options.device.kernels, device)
    if device.type == "cpu":
        torch.set_num_threads(options.num_threads)
    stored = _stored(graph, weights)
    dtype = choose_dtype(options.device, device, stored.values())
    if not has_fp8(device) and "fp8" in (options.cache_dtype, options.device.quantization):
        raise ConfigError(
            f"{describe(device)} has no FP8 of the form e4m3: give --kv-dtype int8, "
            "--quantization int8"
        )
    rounded = _rounded(graph, stored, options)
    forms = _forms(graph, stored, rounded, has_fp8(device))
    calls = lower(graph, forms.__getitem__)
    cache = _cache(graph, options, device)
    loader = _Loader(stored, rounded, forms, (dtype, device), progress)
    try:
        for call in calls:
            loader.load(call, options.max_model_len)
        if options.cache_dtype == "int8":
            loader.load_factors(graph)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"the device has no room for the weights ({_nbytes(stored):,} bytes in the file): take "
            "a smaller or a quantized model"
        ) from None
    executor = GraphExecutor(
        graph,
        calls,
        loader.weights,
        cache,
        kernels,
        dtype=dtype,
        deterministic=options.device.deterministic,
    )
    return TorchProgram(graph, options, executor, cache, device)


def _stored(graph: Graph, weights: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Every weight of the graph, looked up once."""
    stored: dict[str, StoredTensor] = {}
    for name, shape in graph.weights.items():
        weight = weights.get(name)
        if weight is None or tuple(weight.shape) != shape:
            raise KernelError(f"weight {name} is missing or not of shape {list(shape)}")
        stored[name] = weight
    return stored


def _rounded(
    graph: Graph, stored: Mapping[str, StoredTensor], options: CompileOptions
) -> Mapping[str, str]:
    """How the dense matrices that are rounded while loading are; the head stays as it is."""
    quantization, head = options.device.quantization, graph.outputs.get("logits")
    if quantization is None:
        return {}
    return {
        node.operator.weight: quantization
        for node in graph.nodes
        if isinstance(node.operator, op.Linear)
        and node.output != head
        and isinstance(stored[node.operator.weight], DenseTensor)
        and node.operator.in_features % GROUP == 0
    }


def _forms(
    graph: Graph, stored: Mapping[str, StoredTensor], rounded: Mapping[str, str], has_fp8: bool
) -> Mapping[str, Form]:
    """The form of every weight of a linear operator."""
    names = [n.operator.weight for n in graph.nodes if isinstance(n.operator, op.Linear)]
    return {name: form_of(name, stored[name], rounded.get(name), has_fp8) for name in names}


def _nbytes(stored: Mapping[str, StoredTensor]) -> int:
    return sum(weight.nbytes for weight in stored.values())


def _cache(graph: Graph, options: CompileOptions, device: torch.device) -> KVCache | None:
    if not graph.cache_groups:
        return None
    (group,) = graph.cache_groups
    return KVCache(group, options.block_size, options.cache_dtype, device)


class _Loader:
    """Brings what the calls read to the device, each weight once for each way it is used."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        rounded: Mapping[str, str],
        forms: Mapping[str, Form],
        place: tuple[torch.dtype, torch.device],
        progress: Progress | None,
    ) -> None:
        self.weights = Weights()
        self._stored = stored
        self._rounded = rounded
        self._forms = forms
        self._dtype, device = place
        self._uploads = Uploads(device)
        self._progress = progress
        self._done = 0
        self._total = sum(math.prod(weight.shape) for weight in stored.values())

    def load(self, call: Call, max_model_len: int) -> None:
        """Bring what one call reads."""
        weights, uploads = self.weights, self._uploads
        if isinstance(call, EmbedCall):
            if call.weight not in weights.tables:
                table = there.dense(self._stored[call.weight], self._dtype, uploads)
                weights.tables[call.weight] = table
                self._count(call.weight)
        elif isinstance(call, NormCall):
            name = call.operator.weight
            if name not in weights.norms:
                weights.norms[name] = there.dense(self._stored[name], torch.float32, uploads)
                self._count(name)
        elif isinstance(call, LinearCall):
            weights.products[call] = self._product(call)
        elif isinstance(call, AttentionCall):
            angles = call.inv_freq
            if angles is not None and angles not in weights.angles:
                weights.angles[angles] = _angles(angles, max_model_len, uploads.device)

    def _product(self, call: LinearCall) -> Product:
        names = [operator.weight for operator in call.operators]
        biases = [self._stored[o.bias] for o in call.operators if o.bias is not None]
        bias = None
        if biases:
            bias = torch.cat([there.dense(b, self._dtype, self._uploads) for b in biases])
        return make_product(call, [self._matrix(name) for name in names], bias)

    def _matrix(self, name: str) -> there.Weight:
        self._count(name)
        tensor, rounding = self._stored[name], self._rounded.get(name)
        if name in self.weights.tables and isinstance(tensor, DenseTensor) and rounding is None:
            return self.weights.tables[name]
        return bring(tensor, self._forms[name], rounding, self._dtype, self._uploads)

    def load_factors(self, graph: Graph) -> None:
        """Bring the factors that even out keys before they become codes."""
        for operator, factors in key_factors(graph, self._stored).items():
            self.weights.key_factors[operator] = torch.from_numpy(factors).to(self._uploads.device)

    def _count(self, name: str) -> None:
        self._done += math.prod(self._stored[name].shape)
        if self._progress is not None:
            self._progress(min(1.0, self._done / self._total))


def _angles(inv_freq: tuple[float, ...], max_model_len: int, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position: [max_model_len, 2 * len(inv_freq)]."""
    frequencies = np.array(inv_freq, np.float32)
    angles = np.arange(max_model_len, dtype=np.float32)[:, None] * frequencies
    wide = angles.astype(np.float64)
    table = np.concatenate([np.cos(wide), np.sin(wide)], axis=1).astype(np.float32)
    return torch.from_numpy(table).to(device)

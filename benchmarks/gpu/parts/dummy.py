"""Programs with weights that nobody trained, made on the device: no file, nothing from the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from octavo.backends import torch as backend
from octavo.backends.program import CompileOptions, DeviceOptions
from octavo.backends.torch.cache import KVCache
from octavo.backends.torch.execute import GraphExecutor, Weights
from octavo.backends.torch.kernels import GroupedWeight, QuantizedWeight
from octavo.backends.torch.lowering import (
    AttentionCall,
    Call,
    EmbedCall,
    Form,
    LinearCall,
    NormCall,
    lower,
)
from octavo.backends.torch.products import Product
from octavo.backends.torch.program import TorchProgram
from octavo.backends.torch.tables import choose_kernels
from octavo.backends.torch.weights import WORDS, block_columns, pack_scales
from octavo.graph import ops as op
from octavo.graph.trace import CacheDtype, Graph, Ops
from octavo.models.llama import llama
from octavo.models.llama_config import LlamaConfig
from octavo.models.rope import Llama3Scaling, RopeConfig
from parts.machine import Setup, free_bytes, release

Precision = Literal["bf16", "fp8", "int4"]
BLOCK_SIZE = 16
GROUP = 32
FORMS: dict[Precision, Form] = {
    "bf16": Form(("dense",)),
    "fp8": Form(("fp8 row",), "fp8 token"),
    "int4": Form(("grouped", 4, 0, GROUP, True)),
}
BYTES: dict[Precision, float] = {"bf16": 2, "fp8": 1, "int4": 0.625}
"""Of a weight, scales included, but for the embedding and the head, which are bf16."""


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    is_new = kv_heads < heads
    return LlamaConfig(
        vocab_size=128256 if is_new else 32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072 if is_new else 4096,
        rope=RopeConfig(5e5, Llama3Scaling(8, 1, 4, 8192)) if is_new else RopeConfig(),
    )


SHAPES = {
    "Llama-7B": _llama(4096, 11008, 32, 32, 32),
    "Llama-13B": _llama(5120, 13824, 40, 40, 40),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8),
}


def shape_of(name: str, setup: Setup) -> LlamaConfig:
    """The sizes of a model; tiny ones where the script itself is tested."""
    config = SHAPES[name]
    if setup.warm:
        return replace(config, num_hidden_layers=1)
    if not setup.quick:
        return config
    heads = 4
    return replace(
        config,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads * config.num_key_value_heads // config.num_attention_heads or 1,
        head_dim=16,
    )


@dataclass(frozen=True, slots=True)
class Dummy:
    """A Program and what a step of it costs.

    Attributes:
        program: its cache is not allocated yet.
        weights: its weights, which another Program can take.
        read_bytes: bytes of weights that a step reads.
        linear_operations: of the products of one token, but for the head.
        head_operations: of the head, for one row.
        config: the sizes.
    """

    program: TorchProgram
    weights: Weights
    read_bytes: int
    linear_operations: int
    head_operations: int
    config: LlamaConfig

    def attention_operations(self, pairs: int) -> int:
        """Operations of attention over pairs of a query and a key."""
        c = self.config
        return 4 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * pairs

    def token_bytes(self) -> int:
        """Bytes of K and V of a token."""
        return self.program.block_bytes() // BLOCK_SIZE


def estimated_bytes(config: LlamaConfig, precision: Precision) -> int:
    """Memory of the weights."""
    head_dim, hidden = config.head_dim, config.hidden_size
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = hidden * (head_dim * heads + 3 * config.intermediate_size)
    matrices = layer * config.num_hidden_layers * BYTES[precision]
    return int(matrices + 2 * 2 * config.vocab_size * hidden)


def fits(setup: Setup, config: LlamaConfig, precision: Precision, room: int = 6 << 30) -> bool:
    """Whether the weights and `room` more fit into the device now."""
    return not setup.is_gpu or estimated_bytes(config, precision) + room < free_bytes(setup.device)


def make(
    setup: Setup,
    config: LlamaConfig,
    precision: Precision = "bf16",
    *,
    cache_dtype: CacheDtype = "fp16",
    deterministic: bool = False,
    max_num_tokens: int = 8192,
    weights: Weights | None = None,
) -> Dummy:
    """A Program of that shape; `weights`: those of another one that is alike, if given."""
    device = setup.device
    dtype = torch.bfloat16 if setup.is_gpu else torch.float32
    graph = llama(Ops(), config)
    calls = lower(graph, lambda name: FORMS["bf16" if name == "lm_head.weight" else precision])
    max_model_len = min(config.max_position_embeddings, 36864)
    options = CompileOptions(
        num_threads=1,
        block_size=BLOCK_SIZE,
        max_num_tokens=max_num_tokens,
        max_num_rows=1024,
        max_model_len=max_model_len,
        cache_dtype=cache_dtype,
        device=DeviceOptions(name=str(device), deterministic=deterministic, kernels=setup.table),
    )
    with torch.inference_mode():
        weights = weights or _weights(graph, calls, precision, (dtype, device), max_model_len)
    (group,) = graph.cache_groups
    cache = KVCache(group, BLOCK_SIZE, cache_dtype, device)
    executor = GraphExecutor(
        graph,
        calls,
        weights,
        cache,
        choose_kernels(setup.table, device),
        dtype=dtype,
        deterministic=deterministic,
    )
    linears = [n.operator for n in graph.nodes if isinstance(n.operator, op.Linear)]
    *rest, head = (2 * o.in_features * o.out_features for o in linears)
    read = sum(product.nbytes for product in weights.products.values())
    program = TorchProgram(graph, options, executor, cache, device)
    return Dummy(program, weights, read, sum(rest), head, config)


def close(dummy: Dummy, device: torch.device) -> None:
    """Free what it holds; its weights too, once the caller has dropped it."""
    dummy.program.close()
    release(device)


def fill_cache(program: TorchProgram) -> None:
    """Numbers for K and V, so that no sum is of zeros alone."""
    assert program._cache is not None
    for layer in program._cache.layers.values():
        if layer.scales is None:
            layer.values.normal_()
        else:
            layer.values.copy_(torch.randn_like(layer.values[:1], dtype=torch.float32) * 20)
            layer.scales.fill_(0.05)


def _weights(
    graph: Graph,
    calls: tuple[Call, ...],
    precision: Precision,
    place: tuple[torch.dtype, torch.device],
    max_model_len: int,
) -> Weights:
    dtype, device = place
    weights = Weights()
    for call in calls:
        if isinstance(call, EmbedCall):
            weights.tables[call.weight] = _dense(graph.weights[call.weight], dtype, device)
        elif isinstance(call, NormCall):
            shape = graph.weights[call.operator.weight]
            weights.norms[call.operator.weight] = torch.ones(shape, device=device)
        elif isinstance(call, LinearCall):
            weights.products[call] = _product(call, precision, dtype, device)
        elif isinstance(call, AttentionCall) and call.inv_freq not in weights.angles:
            assert call.inv_freq is not None
            weights.angles[call.inv_freq] = backend._angles(call.inv_freq, max_model_len, device)
    return weights


def _product(
    call: LinearCall, precision: Precision, dtype: torch.dtype, device: torch.device
) -> Product:
    sizes = tuple(operator.out_features for operator in call.operators)
    shape = sum(sizes), call.operators[0].in_features
    if precision == "bf16" or call.operators[0].weight == "lm_head.weight":
        return Product(_dense(shape, dtype, device), None, sizes)
    if precision == "int4":
        return Product(_int4(shape, device), None, sizes)
    return Product(_fp8(shape, device), None, sizes, FORMS["fp8"].quantize)


def _dense(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=device)
    return weight.normal_(0, shape[-1] ** -0.5)


def _fp8(shape: tuple[int, int], device: torch.device) -> QuantizedWeight:
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    for start in range(0, shape[0], 4096):
        part = codes[start : start + 4096]
        part.copy_(torch.randn(part.shape, device=device) * 50)  # beyond 448 is NaN
    scales = torch.full((shape[0], 1), 0.01 * shape[1] ** -0.5, device=device)
    return QuantizedWeight(codes, scales)


def _int4(shape: tuple[int, int], device: torch.device) -> GroupedWeight:
    rows, columns = shape
    width = block_columns(4)
    blocks = -(-columns // width)
    words = torch.randint(-(2**31), 2**31, (blocks, rows, WORDS), dtype=torch.int32, device=device)
    scale = 0.2 * columns**-0.5
    scales = torch.full((blocks * width // GROUP, rows), scale, dtype=torch.float16, device=device)
    factors = torch.ones(rows, device=device)
    pairs = pack_scales(scales, scales * -7.5)
    return GroupedWeight(words, pairs, True, factors, 4, 0, GROUP, shape)

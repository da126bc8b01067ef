"""The reference Program: walks the graph node by node over a ragged batch; checks every batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from octavo.backends.key_scaling import key_factors
from octavo.backends.program import CompileOptions, Done, Progress
from octavo.backends.reference import operators
from octavo.backends.reference.cache import PagedCache
from octavo.backends.reference.sampling import empty_output, sample
from octavo.errors import ConfigError, KernelError
from octavo.graph import ops as op
from octavo.graph.batch import Batch, Float32, Int32, SamplingRows, StepOutput
from octavo.graph.tensors import GroupedTensor, StoredTensor
from octavo.graph.trace import Graph, Node

_KNOWN = (
    op.Input,
    op.Embed,
    op.RmsNorm,
    op.Linear,
    op.Rope,
    op.PagedAttention,
    op.SiluMul,
    op.GeluMul,
    op.Add,
    op.SelectRows,
)


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights in the forms that the operators read."""

    embeddings: Mapping[str, StoredTensor]
    dense: Mapping[str, Float32]
    rounded: Mapping[str, operators.RoundedLinear]
    key_factors: Mapping[op.PagedAttention, Float32]


def compile(
    graph: Graph,
    weights: Mapping[str, StoredTensor],
    options: CompileOptions,
    *,
    progress: Progress | None = None,
) -> ReferenceProgram:
    """Make a Program that runs the graph in numpy.

    Threads are the BLAS library's affair; `options.num_threads` and `options.isa` choose nothing
    here.

    Raises:
        ConfigError: the graph has an operator that this backend lacks.
        KernelError: a weight is missing or has another shape than declared.
    """
    for node in graph.nodes:
        if not isinstance(node.operator, _KNOWN):
            raise ConfigError(
                f"the reference backend has no operator {type(node.operator).__name__}"
            )
    stored = {name: weights[name] for name in graph.weights if name in weights}
    for name, shape in graph.weights.items():
        if name not in stored or tuple(stored[name].shape) != shape:
            raise KernelError(f"weight {name} is missing or not of shape {list(shape)}")
    return ReferenceProgram(graph, _prepare(graph, stored, options, progress), options)


def _prepare(
    graph: Graph,
    weights: Mapping[str, StoredTensor],
    options: CompileOptions,
    progress: Progress | None,
) -> _Weights:
    embeddings: dict[str, StoredTensor] = {}
    dense: dict[str, Float32] = {}
    rounded: dict[str, operators.RoundedLinear] = {}
    for done, node in enumerate(graph.nodes, start=1):
        match node.operator:
            case op.Embed(weight, num_embeddings):  # a copy: the file may be closed afterwards
                embeddings[weight] = weights[weight].take_rows(np.arange(num_embeddings))
            case op.RmsNorm(weight):
                dense[weight] = weights[weight].dequantize()
            case op.Linear(weight, bias=bias):
                stored = weights[weight]
                if options.round_activations and isinstance(stored, GroupedTensor):
                    rounded[weight] = operators.RoundedLinear.of(stored)
                else:
                    dense[weight] = stored.dequantize()
                if bias is not None:
                    dense[bias] = weights[bias].dequantize()
        if progress is not None:
            progress(done / len(graph.nodes))
    factors = key_factors(graph, weights) if options.cache_dtype == "int8" else {}
    return _Weights(embeddings, dense, rounded, factors)


class ReferenceProgram:
    """See backends.program.Program."""

    depth = 1

    def __init__(self, graph: Graph, weights: _Weights, options: CompileOptions) -> None:
        """Keep what `compile` prepared; the cache comes with allocate_cache."""
        self._graph = graph
        self._weights: _Weights | None = weights
        self._options = options
        self._caches: tuple[PagedCache, ...] | None = None
        self._last_use = {i: index for index, n in enumerate(graph.nodes) for i in n.inputs}
        self._group_of = {
            layer: index for index, g in enumerate(graph.cache_groups) for layer in g.layers
        }

    @property
    def description(self) -> str:
        """For people."""
        return "reference numpy"

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights as this backend keeps them."""
        weights = self._alive()
        rounded = sum(
            w.codes.nbytes + w.scales.nbytes + (0 if w.minimums is None else w.minimums.nbytes)
            for w in weights.rounded.values()
        )
        embeddings = sum(w.nbytes for w in weights.embeddings.values())
        return embeddings + rounded + sum(w.nbytes for w in weights.dense.values())

    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        groups = self._graph.cache_groups
        return self._options.block_size * sum(
            g.bytes_per_token(self._options.cache_dtype) for g in groups
        )

    def spare_bytes(self) -> None:
        """The pool lies in the host's memory."""

    def allocate_cache(self, num_blocks: int) -> None:
        """Make the KV pool."""
        if self._caches is not None:
            raise KernelError("the cache is allocated once")
        self._caches = tuple(
            PagedCache(g, num_blocks, self._options.block_size, self._options.cache_dtype)
            for g in self._graph.cache_groups
        )

    def copy_blocks(self, pairs: Int32) -> None:
        """Copy whole blocks, one pair after another."""
        self._cache_of_blocks(pairs, (2,)).copy_blocks(pairs)

    def read_blocks(self, ids: Int32) -> NDArray[np.uint8]:
        """The content of whole blocks: every layer's array, then their scales."""
        return self._cache_of_blocks(ids).read_blocks(ids)

    def write_blocks(self, ids: Int32, data: NDArray[np.uint8]) -> None:
        """Give blocks a content that was read."""
        cache = self._cache_of_blocks(ids)
        if data.dtype != np.uint8 or data.shape != (len(ids), self.block_bytes()):
            raise KernelError(f"data is not uint8 [{len(ids)}, {self.block_bytes()}]")
        cache.write_blocks(ids, data)

    def _cache_of_blocks(self, ids: Int32, row: tuple[int, ...] = ()) -> PagedCache:
        """The one cache, once `ids` of shape [n, *row] are found to lie inside it."""
        self._alive()
        if not self._caches:
            raise KernelError("no cache is allocated")
        cache = self._caches[0]
        if ids.dtype != np.int32 or ids.ndim != 1 + len(row) or ids.shape[1:] != row:
            raise KernelError("block ids are not an int32 array of the rank that the contract says")
        num_blocks = cache.num_slots // self._options.block_size
        if ids.size and not 0 <= ids.min() <= ids.max() < num_blocks:
            raise KernelError("a block id lies outside the cache")
        return cache

    def run(self, batch: Batch, rows: SamplingRows | None, wants: Iterable[str] = ()) -> StepOutput:
        """Compute one step."""
        self._alive()
        self._check(batch, rows)
        wants = tuple(wants)
        # Infinities and NaNs flow on as in any backend; sampling reports them.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            values = self._run(batch, {*wants} | (set() if rows is None else {"logits"}))
            output = empty_output() if rows is None else sample(values["logits"], rows)
        return replace(output, values={name: values[name] for name in wants})

    def _run(self, batch: Batch, names: set[str]) -> dict[str, Float32]:
        """The named outputs of the graph."""
        if unknown := names - set(self._graph.outputs):
            raise KernelError(f"the graph has no output {min(unknown)!r}")
        wanted = {name: self._graph.outputs[name] for name in names}
        keep = set(wanted.values())
        values: dict[int, Float32] = {}
        for index, node in enumerate(self._graph.nodes):
            values[node.output] = self._apply(node, [values[i] for i in node.inputs], batch)
            for value in node.inputs:
                if self._last_use[value] == index and value not in keep:
                    values.pop(value, None)
        return {name: values[value] for name, value in wanted.items()}

    def start(self, batch: Batch, rows: SamplingRows | None) -> Done:
        """Compute one step at once."""
        return Done(self.run(batch, rows))

    def close(self) -> None:
        """Drop weights and cache."""
        self._weights = None
        self._caches = None

    def _alive(self) -> _Weights:
        if self._weights is None:
            raise KernelError("the program is closed")
        return self._weights

    def _apply(self, node: Node, inputs: list[Float32], batch: Batch) -> Float32:
        weights = self._alive()
        match node.operator:
            case op.Input(name):
                return batch.inputs[name]
            case op.Embed(weight, num_embeddings, _, scale):
                ids = batch.token_ids
                if len(ids) and not 0 <= ids.min() <= ids.max() < num_embeddings:
                    raise KernelError("a token id lies outside the vocabulary")
                return operators.embed(weights.embeddings[weight], ids, scale)
            case op.RmsNorm(weight, _, eps):
                return operators.rms_norm(inputs[0], weights.dense[weight], eps)
            case op.Linear(weight, bias=bias):
                if weight in weights.rounded:
                    out = operators.linear_rounded(inputs[0], weights.rounded[weight])
                else:
                    out = inputs[0] @ weights.dense[weight].T
                return out if bias is None else out + weights.dense[bias]
            case op.Rope():
                return operators.rope(inputs[0], node.operator, batch.positions[0])
            case op.PagedAttention():
                return self._attend(node.operator, inputs, batch)
            case op.SiluMul():
                return operators.silu_mul(inputs[0], inputs[1])
            case op.GeluMul():
                return operators.gelu_mul(inputs[0], inputs[1])
            case op.Add():
                return inputs[0] + inputs[1]
            case op.SelectRows():
                return inputs[0][batch.logits_rows]

    def _attend(self, operator: op.PagedAttention, inputs: list[Float32], batch: Batch) -> Float32:
        assert self._caches is not None
        query, keys, values = inputs
        factors = self._alive().key_factors.get(operator)
        if factors is not None:
            keys = keys * (np.float32(1) / factors.ravel())
            query = query * factors.repeat(operator.num_heads // operator.num_kv_heads, 0).ravel()
        group = self._group_of[operator.layer]
        cache = self._caches[group]
        cache.write(operator.layer, batch.slot_mapping[group], keys, values)
        out = np.empty_like(query).reshape(-1, operator.num_heads, operator.head_dim)
        heads = query.reshape(out.shape)
        for b, num_tokens in enumerate(batch.seq_lens):
            t = slice(batch.query_start_loc[b], batch.query_start_loc[b + 1])
            k, v = cache.read(operator.layer, batch.block_tables[group][b], int(num_tokens))
            out[t] = operators.attend(heads[t], k, v, batch.positions[0, t], operator)
        return out.reshape(query.shape)

    def _check(self, batch: Batch, rows: SamplingRows | None) -> None:
        """Refuse a batch that contradicts itself: the oracle should find a runner's mistakes."""
        faults = _batch_faults(batch, self._options)
        if self._graph.cache_groups and self._caches is None:
            faults.append("no cache is allocated")
        for cache, slots in zip(self._caches or (), batch.slot_mapping, strict=False):
            if len(slots) and not 0 <= slots.min() <= slots.max() < cache.num_slots:
                faults.append("a slot lies outside the cache")
        if rows is not None and len(rows.num_logprobs) != len(batch.logits_rows):
            faults.append("sampling rows and logits_rows differ in number")
        if faults:
            raise KernelError("; ".join(faults))


def _batch_faults(batch: Batch, options: CompileOptions) -> list[str]:
    num_tokens, starts = len(batch.token_ids), batch.query_start_loc
    if starts[0] != 0 or starts[-1] != num_tokens or (np.diff(starts) < 1).any():
        return ["query_start_loc does not divide the tokens"]
    faults = []
    if num_tokens > options.max_num_tokens or len(batch.logits_rows) > options.max_num_rows:
        faults.append("the batch is larger than the program was compiled for")
    if batch.seq_lens.max(initial=0) > options.max_model_len:
        faults.append("a sequence is longer than max_model_len")
    owner = np.repeat(np.arange(len(batch.seq_lens)), np.diff(starts))
    from_end = starts[owner + 1] - np.arange(num_tokens)
    positions = batch.positions[0]
    if not np.array_equal(positions, batch.seq_lens[owner] - from_end):
        faults.append("positions do not lead up to seq_lens")
    elif batch.block_tables:
        for table, slots in zip(batch.block_tables, batch.slot_mapping, strict=True):
            expected = table[owner, positions // options.block_size] * options.block_size
            if not np.array_equal(slots, expected + positions % options.block_size):
                faults.append("slot_mapping contradicts block_tables")
    return faults

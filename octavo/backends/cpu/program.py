"""The CPU backend's Program: builds the native one from a Plan, then one native call a step.

Knows arrays and plans; the arithmetic is in csrc/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.backends.cpu import _native
from octavo.backends.cpu.plan import (
    AttentionStage,
    Key,
    LinearPart,
    LinearStage,
    Plan,
    RowOp,
    quantized_places,
)
from octavo.backends.program import CompileOptions, Done
from octavo.errors import KernelError
from octavo.graph import ops as op
from octavo.graph.batch import Batch, Float32, Int32, SamplingRows, StepOutput
from octavo.graph.trace import Graph


class CpuProgram:
    """See backends.program.Program."""

    depth = 1

    def __init__(
        self,
        native: _native.Program,
        graph: Graph,
        plan: Plan,
        options: CompileOptions,
        weights: Mapping[str, int],
        factors: Mapping[op.PagedAttention, tuple[int, int]],
    ) -> None:
        """Lower the plan into the native program.

        Args:
            native: has the weights already.
            graph: what to compute.
            plan: the graph lowered.
            options: what it was lowered for.
            weights: native numbers by name.
            factors: native numbers of the key factors and their inverses, for an int8 cache.
        """
        self._native: _native.Program | None = native
        self._graph = graph
        self._plan = plan
        self._options = options
        self._description = f"cpu {native.isa}, {native.num_threads} threads"
        self._inputs = [
            (n.operator.name, n.operator.features)
            for n in graph.nodes
            if isinstance(n.operator, op.Input)
        ]
        _Builder(native, graph, plan, options, _Numbers(weights, factors), self._inputs).build()

    @property
    def description(self) -> str:
        """For people: "cpu avx512, 2 threads"."""
        return self._description

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights as repacked."""
        return self._alive().weights_bytes

    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        groups = self._graph.cache_groups
        return self._options.block_size * sum(
            g.bytes_per_token(self._options.cache_dtype) for g in groups
        )

    def spare_bytes(self) -> None:
        """The pool lies in the host's memory."""

    def allocate_cache(self, num_blocks: int) -> None:
        """Map the KV pool; every block reads as zero."""
        for group in self._graph.cache_groups:
            try:
                self._alive().allocate_cache(len(group.layers), num_blocks)
            except ValueError as error:
                raise KernelError(str(error)) from None

    def copy_blocks(self, pairs: Int32) -> None:
        """Copy whole blocks, one pair after another."""
        try:
            self._alive().copy_blocks(pairs)
        except ValueError as error:
            raise KernelError(str(error)) from None

    def read_blocks(self, ids: Int32) -> NDArray[np.uint8]:
        """The content of whole blocks: K of the first layer, V, K of the second ..."""
        native = self._alive()
        data = np.empty((len(ids), self.block_bytes()), np.uint8)
        try:
            native.read_blocks(ids, data)
        except ValueError as error:
            raise KernelError(str(error)) from None
        return data

    def write_blocks(self, ids: Int32, data: NDArray[np.uint8]) -> None:
        """Give blocks a content that was read."""
        try:
            self._alive().write_blocks(ids, data)
        except ValueError as error:
            raise KernelError(str(error)) from None

    def run(self, batch: Batch, rows: SamplingRows | None, wants: Iterable[str] = ()) -> StepOutput:
        """Compute one step.

        Raises:
            KernelError: an array is outside its contract (nothing was computed), or the program is
                closed.
        """
        native = self._alive()
        count = 0 if rows is None else len(batch.logits_rows)
        width = 0 if rows is None else max([0, *rows.num_logprobs.tolist()])
        tokens, logprobs = np.empty(count, np.int32), np.zeros(count, np.float32)
        top_ids, top_logprobs = (
            np.zeros((count, width), np.int32),
            np.zeros((count, width), np.float32),
        )
        sampled = None if rows is None else (tokens, logprobs, top_ids, top_logprobs)
        try:
            native.run(batch, self._inputs, bool(self._graph.cache_groups), rows, sampled)
        except ValueError as error:
            raise KernelError(str(error)) from None
        return StepOutput(
            tokens=tokens,
            logprobs=logprobs,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            values={name: self._value(native, name, batch) for name in wants},
        )

    def start(self, batch: Batch, rows: SamplingRows | None) -> Done:
        """Compute one step at once."""
        return Done(self.run(batch, rows))

    def close(self) -> None:
        """Free everything; the Program is unusable afterwards."""
        self._native = None

    def _alive(self) -> _native.Program:
        if self._native is None:
            raise KernelError("the program is closed")
        return self._native

    def _value(self, native: _native.Program, name: str, batch: Batch) -> Float32:
        if name not in self._graph.outputs:
            raise KernelError(f"the graph has no output {name}")
        key = self._graph.outputs[name]
        shape = self._plan.shapes[key]
        rows = len(batch.logits_rows) if shape.selected else len(batch.token_ids)
        out = np.empty((rows, shape.features), np.float32)
        native.read_value(self._plan.places[key], out)
        return out


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What the native side calls the vectors and matrices that it holds."""

    weights: Mapping[str, int]
    factors: Mapping[op.PagedAttention, tuple[int, int]]


class _Builder:
    """Turns the plan's records into calls of the native program."""

    def __init__(
        self,
        native: _native.Program,
        graph: Graph,
        plan: Plan,
        options: CompileOptions,
        numbers: _Numbers,
        inputs: list[tuple[str, int]],
    ) -> None:
        self._native = native
        self._graph = graph
        self._plan = plan
        self._options = options
        self._weights = numbers.weights
        self._factors = numbers.factors
        self._input_numbers = {name: number for number, (name, _) in enumerate(inputs)}
        self._layers = {
            layer: number
            for group in graph.cache_groups
            for number, layer in enumerate(group.layers)
        }
        self._quantized: dict[Key, int] = {}
        self._tables: dict[tuple[float, ...], int] = {}
        self._caches: dict[op.PagedAttention, int] = {}

    def build(self) -> None:
        """Add every stage, then close the program's construction."""
        for key, shape in self._plan.shapes.items():
            if not isinstance(key, int) and key[0] == "quantized":
                rows = (
                    self._options.max_num_rows if shape.selected else self._options.max_num_tokens
                )
                places = quantized_places(self._plan.places[key], rows, shape.features, key[2])
                self._quantized[key] = self._native.add_quantized(*places, shape.features, key[2])
        for stage in self._plan.stages:
            if isinstance(stage, LinearStage):
                self._linear(stage)
            elif isinstance(stage, AttentionStage):
                self._native.add_attention_stage(
                    self._cache(stage.operator), self._place(stage.query), self._place(stage.out)
                )
            else:
                self._native.add_rows_stage(stage.selected, [self._row_op(o) for o in stage.ops])
        logits = self._graph.outputs.get("logits")
        place = -1 if logits is None else self._place(logits)
        vocab = 0 if logits is None else self._plan.shapes[logits].features
        if logits is not None and not self._plan.shapes[logits].selected:
            place, vocab = -1, 0  # one row a token: nothing to sample from
        self._native.finish(self._plan.arena_bytes, place, vocab)

    def _place(self, key: Key) -> int:
        return self._plan.places[key]

    def _linear(self, stage: LinearStage) -> None:
        quantized = self._quantized.get(stage.x, -1)
        x = self._place(stage.x) if quantized < 0 else -1
        self._native.add_linear_stage(
            stage.selected, x, quantized, [self._part(part) for part in stage.parts]
        )

    def _part(self, part: LinearPart) -> tuple[int, int, int, int]:
        bias = -1 if part.operator.bias is None else self._weights[part.operator.bias]
        residual = -1 if part.residual is None else self._place(part.residual)
        return self._weights[part.operator.weight], self._place(part.out), bias, residual

    def _row_op(self, row_op: RowOp) -> _native.RowOpFields:
        fields: _native.RowOpFields = {"kind": row_op.kind, "features": row_op.features}
        for name, key in zip("ab", row_op.reads, strict=False):
            fields[name] = self._place(key)
        if row_op.kind == "quantize":
            assert row_op.out is not None
            fields["quantized"] = self._quantized[row_op.out]
        elif row_op.out is not None:
            fields["out"] = self._place(row_op.out)
        match row_op.operator:
            case op.Input(name):
                fields["input"] = self._input_numbers[name]
            case op.Embed(weight, _, _, scale):
                fields |= {"weight": self._weights[weight], "scale": scale}
            case op.RmsNorm(weight, _, eps, num_heads):
                fields |= {"weight": self._weights[weight], "eps": eps, "num_heads": num_heads}
            case op.Rope(num_heads, _, inv_freq):
                fields |= {"num_heads": num_heads, "table": self._table(inv_freq)}
            case op.PagedAttention():
                fields["cache"] = self._cache(row_op.operator)
        return fields

    def _table(self, inv_freq: tuple[float, ...]) -> int:
        if inv_freq not in self._tables:
            self._tables[inv_freq] = self._native.add_rope_table(inv_freq)
        return self._tables[inv_freq]

    def _cache(self, operator: op.PagedAttention) -> int:
        if operator not in self._caches:
            self._caches[operator] = self._native.add_cache_geometry(
                self._layers[operator.layer],
                operator.num_heads,
                operator.num_kv_heads,
                operator.head_dim,
                operator.scale,
                # A window as long as the context hides nothing.
                self._options.max_model_len if operator.window is None else operator.window,
                0.0 if operator.soft_cap is None else operator.soft_cap,
                *self._factors.get(operator, (-1, -1)),
            )
        return self._caches[operator]

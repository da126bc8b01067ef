"""From a Graph to a Plan: which operators run together in a stage, over which values.

Fusions are matters of placement: a linear operator's input is rounded once for all that share it,
and they form one stage; a sum with a linear operator's result becomes its residual; row operators
that follow each other become one stage. A stage begins only when all before it are done, so an
operator may join any stage after those that make what it reads; a row operator may also follow them
inside the same stage, being about the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo.backends.cpu.plan import (
    AttentionStage,
    Key,
    LinearPart,
    LinearStage,
    Plan,
    RowOp,
    RowsStage,
    Shape,
    Stage,
    plan_memory,
)
from octavo.backends.program import CompileOptions
from octavo.errors import ConfigError, KernelError
from octavo.graph import ops as op
from octavo.graph.trace import Graph, Node

MAX_HEAD_DIM = 256

_KINDS: Mapping[type, str] = {
    op.Input: "input",
    op.Embed: "embed",
    op.RmsNorm: "norm",
    op.SiluMul: "silu_mul",
    op.GeluMul: "gelu_mul",
    op.Add: "add",
    op.SelectRows: "select",
}
"""Row operators that need no thought, and their native names."""


def lower(graph: Graph, groups: Mapping[str, int], options: CompileOptions) -> Plan:
    """Plan a graph's stages and memory.

    Args:
        graph: what to compute.
        groups: columns a group of each grouped weight; absent for dense ones.
        options: the sizes to plan for.

    Raises:
        ConfigError: the graph has an operator that this backend lacks.
        KernelError: an operator's shapes are outside this backend's contract; the message names it.
    """
    lowering = _Lowering(graph, groups)
    for node in graph.nodes:
        lowering.add(node)
    return plan_memory(
        tuple(lowering.stages),
        lowering.shapes,
        graph.outputs.values(),
        options.max_num_tokens,
        options.max_num_rows,
    )


@dataclass(slots=True)
class _Lowering:
    graph: Graph
    groups: Mapping[str, int]
    stages: list[Stage] = field(default_factory=list)
    shapes: dict[Key, Shape] = field(default_factory=dict)
    stage_of: dict[Key, int] = field(default_factory=dict)
    last_write: int = -1
    """The stage of the latest write to the KV cache."""
    uses: Counter[int] = field(init=False)
    makers: dict[int, Node] = field(init=False)
    folded: dict[int, Node] = field(init=False)
    """Value of a linear operator → the Add that takes it as its own residual."""

    def __post_init__(self) -> None:
        self.uses = Counter(i for node in self.graph.nodes for i in node.inputs)
        self.uses.update(self.graph.outputs.values())
        self.makers = {node.output: node for node in self.graph.nodes}
        self.folded = {}
        for node in self.graph.nodes:
            if isinstance(node.operator, op.Add):
                value = next((i for i in node.inputs if self._can_fold(i, node)), None)
                if value is not None:
                    self.folded[value] = node

    def add(self, node: Node) -> None:
        """Lower one node."""
        operator = node.operator
        if isinstance(operator, op.Linear):
            if node.output not in self.folded:
                self._linear(node, operator, node.output, None)
        elif (value := self._folded_input(node)) is not None:
            linear = self.makers[value]
            residual = node.inputs[1] if node.inputs[0] == value else node.inputs[0]
            assert isinstance(linear.operator, op.Linear)
            self._linear(linear, linear.operator, node.output, residual)
        elif isinstance(operator, op.Rope):
            self._rope(node, operator)
        elif isinstance(operator, op.PagedAttention):
            self._attention(node, operator)
        elif type(operator) in _KINDS:
            kind = _KINDS[type(operator)]
            self._row_op(RowOp(kind, operator, node.inputs, node.output, node.features))
        else:
            raise ConfigError(f"the cpu backend has no operator {type(operator).__name__}")

    def _folded_input(self, node: Node) -> int | None:
        """The input of an Add that computes the sum itself."""
        return next((i for i in node.inputs if self.folded.get(i) is node), None)

    def _can_fold(self, value: int, add: Node) -> bool:
        return (
            isinstance(self.makers[value].operator, op.Linear)
            and self.uses[value] == 1
            and add.inputs[0] != add.inputs[1]
        )

    def _linear(self, node: Node, operator: op.Linear, out: int, residual: int | None) -> None:
        x: Key = node.inputs[0]
        group = self.groups.get(operator.weight)
        if group is not None:
            if operator.in_features % group:
                raise KernelError(
                    f"{operator.weight}: {operator.in_features} columns are no multiple of {group}"
                )
            x = self._quantized(node.inputs[0], operator.in_features, group)
        shape = self.shapes[node.inputs[0]]
        self.shapes[out] = Shape(node.features, shape.selected)
        part = LinearPart(operator, out, residual)
        reads = [x] if residual is None else [x, residual]
        first = 1 + max(self.stage_of[key] for key in reads)
        for number in range(first, len(self.stages)):
            stage = self.stages[number]
            if isinstance(stage, LinearStage) and stage.x == x:
                stage.parts.append(part)
                self.stage_of[out] = number
                return
        self._new_stage(LinearStage(shape.selected, x, [part]))

    def _quantized(self, value: int, features: int, group: int) -> Key:
        key: Key = ("quantized", value, group)
        if key not in self.shapes:
            self._row_op(RowOp("quantize", None, (value,), key, features))
        return key

    def _rope(self, node: Node, operator: op.Rope) -> None:
        if operator.head_dim % 2 or len(operator.inv_freq) != operator.head_dim // 2:
            raise KernelError(
                f"Rope: head_dim {operator.head_dim} needs half as many frequencies, "
                f"not {len(operator.inv_freq)}"
            )
        source: Key = node.inputs[0]
        if self.uses[node.inputs[0]] > 1:  # somebody needs the value as it is
            copied: Key = ("copy", node.output, 0)
            self._row_op(RowOp("copy", None, node.inputs, copied, node.features))
            source = copied
        self._row_op(RowOp("rope", operator, (source,), node.output, node.features, in_place=True))

    def _attention(self, node: Node, operator: op.PagedAttention) -> None:
        _check_attention(operator)
        query, key, value = node.inputs
        kv_features = operator.num_kv_heads * operator.head_dim
        self._row_op(RowOp("write_kv", operator, (key, value), None, kv_features))
        self.shapes[node.output] = Shape(node.features, False)
        self._new_stage(AttentionStage(operator, query, node.output))

    def _row_op(self, row_op: RowOp) -> None:
        is_select = row_op.kind == "select"
        selected = is_select or any(self.shapes[key].selected for key in row_op.reads)
        number = self._rows_stage(row_op, selected, is_select)
        stage = self.stages[number]
        assert isinstance(stage, RowsStage)
        stage.ops.append(row_op)
        if row_op.out is None:
            self.last_write = number
        else:
            self.shapes[row_op.out] = Shape(row_op.features, selected)
            self.stage_of[row_op.out] = number

    def _rows_stage(self, row_op: RowOp, selected: bool, is_select: bool) -> int:
        """The first stage of rows that may take the operator, a new one if there is none."""
        first = max((self.stage_of[key] for key in row_op.reads), default=0)
        for number in range(first, len(self.stages)):
            stage = self.stages[number]
            if not isinstance(stage, RowsStage) or stage.selected != selected:
                continue
            if is_select and any(self.stage_of[key] == number for key in row_op.reads):
                continue  # it reads other rows than its own
            return number
        self.stages.append(RowsStage(selected))
        return len(self.stages) - 1

    def _new_stage(self, stage: LinearStage | AttentionStage) -> None:
        self.stages.append(stage)
        for key in stage.writes():
            self.stage_of[key] = len(self.stages) - 1


def _check_attention(operator: op.PagedAttention) -> None:
    name = f"PagedAttention of layer {operator.layer}"
    if operator.head_dim % 16 or not 16 <= operator.head_dim <= MAX_HEAD_DIM:
        raise KernelError(
            f"{name}: head_dim {operator.head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
        )
    if operator.num_heads % operator.num_kv_heads:
        raise KernelError(
            f"{name}: {operator.num_heads} heads do not share {operator.num_kv_heads} kv heads"
        )
    if operator.window is not None and operator.window < 1:
        raise KernelError(f"{name}: a window of {operator.window} tokens hides the row itself")
    if operator.soft_cap is not None and not operator.soft_cap > 0:
        raise KernelError(f"{name}: soft_cap {operator.soft_cap} is not positive")

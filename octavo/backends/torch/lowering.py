"""From a Graph to calls of kernels: which operators run together.

A sum that a norm reads becomes part of the norm; linear operators with the same input and weights
of one kind become one product over their concatenated weights; the rotation of q and k, the write
of K and V and the attention become one call; norms and activations round for the products that
want rounded inputs. Knows no device and no tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from octavo.backends.torch.kernels import Activation, QuantizeMode, StaticScale
from octavo.errors import ConfigError
from octavo.graph import ops as op
from octavo.graph.trace import Graph, Node


@dataclass(frozen=True, slots=True)
class InputCall:
    """A named input of the step."""

    name: str
    out: int


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """Rows of a table, times scale."""

    weight: str
    scale: float
    out: int


@dataclass(frozen=True, slots=True)
class NormCall:
    """The norm of x + residual, or of x; the sum is the value `total`."""

    operator: op.RmsNorm
    x: int
    out: int
    residual: int | None = None
    total: int | None = None
    quantize: QuantizeMode | None = None

    @property
    def is_of_rows(self) -> bool:
        """Whether it is the norm of whole rows, not of heads."""
        return self.operator.num_heads == 1


@dataclass(frozen=True, slots=True)
class LinearCall:
    """One product; its columns are the values `outs`, side by side."""

    operators: tuple[op.Linear, ...]
    x: int
    outs: tuple[int, ...]
    quantize: QuantizeMode | None = None


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Rotation of q and k (unless inv_freq is None), write of K and V, attention."""

    operator: op.PagedAttention
    inv_freq: tuple[float, ...] | None
    inputs: tuple[int, int, int]
    out: int


@dataclass(frozen=True, slots=True)
class GatedCall:
    """activation(gate) * up."""

    activation: Activation
    inputs: tuple[int, int]
    out: int
    quantize: QuantizeMode | None = None


@dataclass(frozen=True, slots=True)
class AddCall:
    """The sum of two values that no norm follows."""

    inputs: tuple[int, int]
    out: int


@dataclass(frozen=True, slots=True)
class SelectCall:
    """The rows whose logits are wanted."""

    x: int
    out: int


Call = (
    InputCall | EmbedCall | NormCall | LinearCall | AttentionCall | GatedCall | AddCall | SelectCall
)


@dataclass(frozen=True, slots=True)
class Form:
    """What decides how a matrix is multiplied.

    Attributes:
        kind: matrices of equal kind can be concatenated, and their inputs are rounded alike but for
            the number of a StaticScale.
        quantize: how the product's input is rounded; None: not at all.
    """

    kind: tuple[object, ...]
    quantize: QuantizeMode | None = None


def lower(graph: Graph, form_of: Callable[[str], Form]) -> tuple[Call, ...]:
    """Plan the calls that compute a graph.

    Args:
        graph: what to compute.
        form_of: the form of a linear operator's weight, by its name.

    Raises:
        ConfigError: the graph has an operator, or a connection of some, that this backend lacks.
    """
    lowering = _Lowering(graph, form_of)
    for node in graph.nodes:
        lowering.add(node)
    return tuple(lowering.rounded())


def reads(call: Call) -> tuple[int, ...]:
    """The values that a call reads."""
    match call:
        case NormCall(residual=residual):
            return (call.x,) if residual is None else (call.x, residual)
        case LinearCall() | SelectCall():
            return (call.x,)
        case AttentionCall() | GatedCall() | AddCall():
            return call.inputs
    return ()


@dataclass(slots=True)
class _Lowering:
    graph: Graph
    form_of: Callable[[str], Form]
    calls: list[Call] = field(default_factory=list)
    readers: Mapping[int, list[Node]] = field(init=False)
    makers: Mapping[int, Node] = field(init=False)
    done: set[int] = field(default_factory=set)
    """Values that a fused call has made already."""

    def __post_init__(self) -> None:
        readers: dict[int, list[Node]] = defaultdict(list)
        for node in self.graph.nodes:
            for value in node.inputs:
                readers[value].append(node)
        self.readers = readers
        self.makers = {node.output: node for node in self.graph.nodes}

    def add(self, node: Node) -> None:
        """Lower one node, unless an earlier call has it."""
        if node.output in self.done:
            return
        match node.operator:
            case op.Input(name):
                self.calls.append(InputCall(name, node.output))
            case op.Embed(weight, scale=scale):
                self.calls.append(EmbedCall(weight, scale, node.output))
            case op.RmsNorm():
                self.calls.append(NormCall(node.operator, node.inputs[0], node.output))
            case op.Linear():
                self._linear(node)
            case op.Rope():
                self._check_rope(node)
            case op.PagedAttention():
                self._attention(node, node.operator)
            case op.SiluMul() | op.GeluMul():
                is_silu = isinstance(node.operator, op.SiluMul)
                self.calls.append(
                    GatedCall("silu" if is_silu else "gelu", _pair(node), node.output)
                )
            case op.Add():
                self._add(node)
            case op.SelectRows():
                self.calls.append(SelectCall(node.inputs[0], node.output))
            case _:
                raise ConfigError(
                    f"the torch backend has no operator {type(node.operator).__name__}"
                )

    def _add(self, node: Node) -> None:
        a, b = _pair(node)
        for reader in self.readers[node.output]:
            if isinstance(reader.operator, op.RmsNorm) and reader.operator.num_heads == 1:
                self.calls.append(NormCall(reader.operator, b, reader.output, a, node.output))
                self.done.add(reader.output)
                return
        self.calls.append(AddCall((a, b), node.output))

    def _linear(self, node: Node) -> None:
        """A product for all that read the same input and have weights of the same kind."""
        assert isinstance(node.operator, op.Linear)
        kind = self._kind(node.operator)
        same = [
            reader
            for reader in self.readers[node.inputs[0]]
            if isinstance(reader.operator, op.Linear)
            and reader.output not in self.done
            and self._kind(reader.operator) == kind
        ]
        operators = tuple(n.operator for n in same if isinstance(n.operator, op.Linear))
        outs = tuple(n.output for n in same)
        mode = _joint([self.form_of(operator.weight).quantize for operator in operators])
        self.calls.append(LinearCall(operators, node.inputs[0], outs, mode))
        self.done.update(outs)

    def _kind(self, operator: op.Linear) -> tuple[object, ...]:
        return (*self.form_of(operator.weight).kind, operator.bias is not None)

    def _check_rope(self, node: Node) -> None:
        for reader in self.readers[node.output]:
            place = reader.inputs.index(node.output)
            if not isinstance(reader.operator, op.PagedAttention) or place == 2:
                raise ConfigError("the torch backend rotates queries and keys of attention alone")
        if node.output in self.graph.outputs.values():
            raise ConfigError("the torch backend cannot name a rotated value")

    def _attention(self, node: Node, operator: op.PagedAttention) -> None:
        query, key, value = node.inputs
        ropes = [self.makers[v].operator for v in (query, key)]
        tables = [rope.inv_freq if isinstance(rope, op.Rope) else None for rope in ropes]
        if tables[0] != tables[1]:
            raise ConfigError("the torch backend rotates queries and keys by the same angles")
        if tables[0] is not None:
            query, key = (self.makers[v].inputs[0] for v in (query, key))
        self.calls.append(AttentionCall(operator, tables[0], (query, key, value), node.output))

    def rounded(self) -> list[Call]:
        """The calls, with norms and activations that round for the products that read them."""
        wanted: dict[int, set[QuantizeMode | None]] = defaultdict(set)
        for call in self.calls:
            mode = call.quantize if isinstance(call, LinearCall) else None
            for value in reads(call):
                wanted[value].add(mode)
        for value in self.graph.outputs.values():
            wanted[value].add(None)
        calls: list[Call] = []
        for call in self.calls:
            if isinstance(call, GatedCall | NormCall) and len(modes := wanted[call.out]) == 1:
                (mode,) = modes
                if mode is not None and (isinstance(call, GatedCall) or call.is_of_rows):
                    call = replace(call, quantize=mode)
            calls.append(call)
        return calls


def last_reads(calls: tuple[Call, ...]) -> Mapping[int, int]:
    """Value → the number of the call that reads it last."""
    return {value: number for number, call in enumerate(calls) for value in reads(call)}


def _joint(modes: list[QuantizeMode | None]) -> QuantizeMode | None:
    """How the one input of matrices of equal kind is rounded.

    Their inputs were the same when their scales were measured, so scales differ little if at all;
    by the greatest one nothing is cut off that another had room for.
    """
    scales = [mode.scale for mode in modes if isinstance(mode, StaticScale)]
    return StaticScale(max(scales)) if scales else modes[0]


def _pair(node: Node) -> tuple[int, int]:
    first, second = node.inputs
    return first, second

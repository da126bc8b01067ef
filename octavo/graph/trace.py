"""Tracing: run a model's declaration once and keep what it did as an immutable Graph.

A Graph is a list of nodes in an order that satisfies their inputs, the named weights they read and
the named values that a caller may ask for. It prints as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from octavo.graph import ops as op


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph: [rows, features] float32."""

    id: int
    features: int


@dataclass(frozen=True, slots=True)
class Node:
    """One operator applied: reads `inputs` (value ids), makes value `output`."""

    operator: op.Operator
    inputs: tuple[int, ...]
    output: int
    features: int


CacheDtype = Literal["fp16", "int8", "fp8", "fp32"]
"""How K and V are kept; int8 and fp8 (e4m3) have a float32 scale a token and kv head beside."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """What a token costs in the KV cache: layers that share one block table."""

    name: str
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: CacheDtype) -> int:
        """Bytes of K and V of one token over all layers."""
        head_bytes = {
            "fp16": 2 * self.head_dim,
            "int8": self.head_dim + 4,
            "fp8": self.head_dim + 4,
            "fp32": 4 * self.head_dim,
        }
        return 2 * len(self.layers) * self.num_kv_heads * head_bytes[dtype]


@dataclass(frozen=True, slots=True)
class Graph:
    """An immutable program over named weights.

    Attributes:
        nodes: in execution order.
        outputs: name → value id; a language model has "logits" [S, vocab_size] and "hidden" [T,
            hidden_size].
        weights: name → shape that the declaration expects.
        cache_groups: one for a full-attention model.
    """

    nodes: tuple[Node, ...]
    outputs: Mapping[str, int]
    weights: Mapping[str, tuple[int, ...]]
    cache_groups: tuple[CacheGroup, ...]

    def __str__(self) -> str:
        """One line a node: %output = Operator(fields) %inputs."""
        names = {value: f"  -> {name}" for name, value in self.outputs.items()}
        lines = [
            f"%{n.output} [{n.features}] = {n.operator}{_refs(n.inputs)}{names.get(n.output, '')}"
            for n in self.nodes
        ]
        return "\n".join(lines)


def _refs(ids: tuple[int, ...]) -> str:
    return "".join(f" %{i}" for i in ids)


@dataclass(frozen=True, slots=True)
class Scope:
    """A prefix of weight names, made by `Ops.layers`; `layer / "mlp"` is the name of a part."""

    prefix: str
    index: int

    def __truediv__(self, name: str) -> str:
        """The full name of a weight in this scope."""
        return f"{self.prefix}.{name}"


@dataclass(slots=True)
class Ops:
    """What a model's declaration calls; every call adds a node. `finish` makes the Graph."""

    _nodes: list[Node] = field(default_factory=list)
    _weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _attention: list[op.PagedAttention] = field(default_factory=list)

    def layers(self, prefix: str, count: int) -> Iterator[Scope]:
        """The scopes prefix.0 to prefix.count-1."""
        return (Scope(f"{prefix}.{i}", i) for i in range(count))

    def input(self, name: str, features: int) -> Value:
        """A named input of the graph."""
        return self._add(op.Input(name, features), (), features)

    def embed(self, name: str, num_embeddings: int, features: int, *, scale: float = 1.0) -> Value:
        """The embedding of each token, times scale."""
        weight = self._weight(f"{name}.weight", (num_embeddings, features))
        return self._add(op.Embed(weight, num_embeddings, features, scale), (), features)

    def rms_norm(self, x: Value, name: str, eps: float, *, num_heads: int = 1) -> Value:
        """Root mean square norm over the features, of each head by itself."""
        features = x.features // num_heads
        weight = self._weight(f"{name}.weight", (features,))
        return self._add(op.RmsNorm(weight, features, eps, num_heads), (x,), x.features)

    def linear(
        self, x: Value, name: str, features: int, *, bias: bool = False, shard: op.Shard = "none"
    ) -> Value:
        """A matrix product with weight [features, x.features]."""
        weight = self._weight(f"{name}.weight", (features, x.features))
        bias_name = self._weight(f"{name}.bias", (features,)) if bias else None
        return self._add(op.Linear(weight, x.features, features, bias_name, shard), (x,), features)

    def rope(self, x: Value, head_dim: int, inv_freq: tuple[float, ...]) -> Value:
        """Rotary position embedding of every head."""
        return self._add(op.Rope(x.features // head_dim, head_dim, inv_freq), (x,), x.features)

    def paged_attention(
        self,
        query: Value,
        key: Value,
        value: Value,
        layer: int,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Value:
        """Attention over the KV cache, which holds K and V of this step afterwards."""
        operator = op.PagedAttention(
            layer,
            query.features // head_dim,
            key.features // head_dim,
            head_dim,
            scale,
            window,
            soft_cap,
        )
        self._attention.append(operator)
        return self._add(operator, (query, key, value), query.features)

    def silu_mul(self, gate: Value, up: Value) -> Value:
        """silu(gate) * up."""
        return self._add(op.SiluMul(), (gate, up), gate.features)

    def gelu_mul(self, gate: Value, up: Value) -> Value:
        """gelu(gate) * up."""
        return self._add(op.GeluMul(), (gate, up), gate.features)

    def add(self, a: Value, b: Value) -> Value:
        """The sum of two values."""
        return self._add(op.Add(), (a, b), a.features)

    def select_rows(self, x: Value) -> Value:
        """The rows whose logits the batch wants."""
        return self._add(op.SelectRows(), (x,), x.features)

    def finish(self, **outputs: Value) -> Graph:
        """The graph with these named outputs."""
        groups = _cache_groups(self._attention)
        return Graph(
            tuple(self._nodes),
            {name: v.id for name, v in outputs.items()},
            dict(self._weights),
            groups,
        )

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        assert self._weights.setdefault(name, shape) == shape, f"{name} is declared with two shapes"
        return name

    def _add(self, operator: op.Operator, inputs: tuple[Value, ...], features: int) -> Value:
        node = Node(operator, tuple(v.id for v in inputs), len(self._nodes), features)
        self._nodes.append(node)
        return Value(node.output, features)


def _cache_groups(attention: list[op.PagedAttention]) -> tuple[CacheGroup, ...]:
    if not attention:
        return ()
    shapes = {(a.num_kv_heads, a.head_dim) for a in attention}
    assert len(shapes) == 1, (
        "layers with K and V of different shapes need cache groups of their own"
    )
    num_kv_heads, head_dim = shapes.pop()
    return (CacheGroup("full", tuple(a.layer for a in attention), num_kv_heads, head_dim),)

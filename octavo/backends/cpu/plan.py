"""The plan of a native Program: stages over values, and where each value lies in the arena.

Plain records without numpy or the extension: `lowering` makes them from a Graph, `program` hands
them to the native side. Values are named by keys: the id of a graph value, ("quantized", id, group)
for its rows rounded to int8, or ("copy", id, 0) for a copy that becomes value `id` in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from octavo.graph import ops as op

ALIGNMENT = 64

Key = int | tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class RowOp:
    """An operator on each row by itself.

    Attributes:
        kind: as csrc/bindings.cpp names it: "norm", "add", "quantize", ...
        operator: the graph's operator, for its numbers; None for copies and rounding.
        reads: keys of the values read, in the order of the operator's inputs.
        out: key of the value made; None for "write_kv".
        features: width of a row.
        in_place: the first read value's memory becomes the output's.
    """

    kind: str
    operator: op.Operator | None
    reads: tuple[Key, ...]
    out: Key | None
    features: int
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One weight of a linear stage; with `residual` the value of that key is added."""

    operator: op.Linear
    out: Key
    residual: Key | None


@dataclass(slots=True)
class RowsStage:
    """Row operators, one after another on ranges of rows."""

    selected: bool
    ops: list[RowOp] = field(default_factory=list)

    def reads(self) -> list[Key]:
        """Every key read, as often as it is read."""
        return [key for o in self.ops for key in o.reads]

    def writes(self) -> list[Key]:
        """Every key made."""
        return [o.out for o in self.ops if o.out is not None]


@dataclass(slots=True)
class LinearStage:
    """Linear operators that share their input `x` (a quantized key for grouped weights)."""

    selected: bool
    x: Key
    parts: list[LinearPart] = field(default_factory=list)

    def reads(self) -> list[Key]:
        """Every key read, as often as it is read."""
        return [self.x, *(p.residual for p in self.parts if p.residual is not None)]

    def writes(self) -> list[Key]:
        """Every key made."""
        return [p.out for p in self.parts]


@dataclass(slots=True)
class AttentionStage:
    """Paged attention, K and V being in the cache already."""

    operator: op.PagedAttention
    query: Key
    out: Key
    selected: bool = False

    def reads(self) -> list[Key]:
        """Every key read."""
        return [self.query]

    def writes(self) -> list[Key]:
        """Every key made."""
        return [self.out]


Stage = RowsStage | LinearStage | AttentionStage


@dataclass(frozen=True, slots=True)
class Shape:
    """Width of a value, and whether its rows are those of logits_rows."""

    features: int
    selected: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the native side needs, but the weights.

    Attributes:
        stages: in order of execution.
        shapes: of every value that lies in the arena.
        places: byte offset of every value: float32 rows, or for a quantized key the codes, behind
            them scales and sums (`quantized_places`).
        arena_bytes: the size of the arena.
    """

    stages: tuple[Stage, ...]
    shapes: Mapping[Key, Shape]
    places: Mapping[Key, int]
    arena_bytes: int


def align(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def quantized_places(place: int, rows: int, features: int, group: int) -> tuple[int, int, int, int]:
    """Byte offsets of codes, scales, sums and scaled sums of a value that begins at `place`."""
    stride = rows | 1  # csrc/kernels.h, quantized_stride
    scales = place + align(stride * features)
    size = align(stride * (features // group) * 4)
    return place, scales, scales + size, scales + 2 * size


def value_bytes(key: Key, features: int, rows: int) -> int:
    """Bytes of a value in the arena."""
    if isinstance(key, int) or key[0] != "quantized":
        return align(rows * features * 4)
    *_, last = quantized_places(0, rows, features, key[2])
    return last + align((rows | 1) * (features // key[2]) * 4)


@dataclass(slots=True)
class _Span:
    """A piece of the arena that one value owns from stage `first` to stage `last`."""

    first: int
    last: int
    size: int
    place: int = 0


def plan_memory(
    stages: tuple[Stage, ...],
    shapes: Mapping[Key, Shape],
    kept: Iterable[Key],
    max_num_tokens: int,
    max_num_rows: int,
) -> Plan:
    """Give every value a place: values whose lives overlap in stages never share bytes.

    Args:
        stages: what runs, in order.
        shapes: of every key.
        kept: keys that must live to the end (the graph's outputs).
        max_num_tokens: rows of most values.
        max_num_rows: rows of the selected ones.
    """
    kept = set(kept)
    spans: dict[Key, _Span] = {}
    for number, stage in enumerate(stages):
        in_place = _in_place(stage)
        for key in stage.writes():
            if key in in_place:
                spans[key] = spans[in_place[key]]
            else:
                shape = shapes[key]
                rows = max_num_rows if shape.selected else max_num_tokens
                size = value_bytes(key, shape.features, rows)
                spans[key] = _Span(number, number, size)
        for key in [*stage.reads(), *stage.writes()]:
            spans[key].last = number
    for key in kept & spans.keys():
        spans[key].last = len(stages)
    arena_bytes = _place(list({id(s): s for s in spans.values()}.values()))
    return Plan(stages, shapes, {key: span.place for key, span in spans.items()}, arena_bytes)


def _in_place(stage: Stage) -> dict[Key, Key]:
    """Output → the value whose memory it takes over."""
    if not isinstance(stage, RowsStage):
        return {}
    return {o.out: o.reads[0] for o in stage.ops if o.in_place and o.out is not None}


def _place(spans: list[_Span]) -> int:
    """First fit, the largest first; returns the bytes needed."""
    taken: list[set[tuple[int, int]]] = [
        set() for _ in range(1 + max((s.last for s in spans), default=0))
    ]
    for span in sorted(spans, key=lambda s: (-s.size, s.first)):
        stages = taken[span.first : span.last + 1]
        span.place = 0
        for place, end in sorted(set().union(*stages)):
            if span.place + span.size <= place:
                break
            span.place = max(span.place, end)
        for stage in stages:
            stage.add((span.place, span.place + span.size))
    return max((s.place + s.size for s in spans), default=0)

"""What the backends' tests share: random weights in stored forms, batches, one-operator graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.backends import cpu, reference
from octavo.backends.cpu import _native
from octavo.backends.program import CompileOptions, Program
from octavo.graph.batch import Batch, Bias, Filters, Float32, Noise, Penalties, SamplingRows
from octavo.graph.tensors import (
    BlockScales,
    Codes,
    DenseTensor,
    GroupedTensor,
    GroupScales,
    Plane,
    Scales,
    StoredTensor,
)
from octavo.graph.trace import Graph, Ops, Value

ISAS = ("scalar", "avx2", "avxvnni", "avx512")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this machine has."""
    if not _native.has_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    name: str = request.param
    return name


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one sequence in a step: its blocks, how many came before, how many come."""

    blocks: Sequence[int]
    start: int
    count: int


class Kit:
    """Builders; every method is a pure function of its arguments."""

    Part = Part

    @staticmethod
    def options(**changes: Any) -> CompileOptions:
        """Small sizes, two threads."""
        sizes = {
            "num_threads": 2,
            "block_size": 16,
            "max_num_tokens": 64,
            "max_num_rows": 16,
            "max_model_len": 512,
        }
        return CompileOptions(**{**sizes, **changes})

    @staticmethod
    def dense(values: NDArray[np.floating[Any]], dtype: str = "f32") -> DenseTensor:
        """A dense weight; bf16 by cutting float32."""
        if dtype == "bf16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> np.uint32(16)
            return DenseTensor(bits.astype(np.uint16), "bf16")
        kind = np.float32 if dtype == "f32" else np.float16
        return DenseTensor(values.astype(kind), "f32" if dtype == "f32" else "f16")

    @staticmethod
    def codes(codes: NDArray[np.uint8], bits: int, zero: int) -> Codes:
        """Codes [rows, blocks, elements] in planes: low nibbles and, above four bits, the rest."""
        planes = []
        half = codes.shape[2] // 2
        for lift in range(0, bits, 4):
            width = min(4, bits - lift)
            part = (codes >> lift) & ((1 << width) - 1)
            # Element e of the first half stands beside e + half, as in GGUF.
            data = part[:, :, :half] | (part[:, :, half:] << 4)
            byte_of = np.tile(np.arange(half, dtype=np.uint16), 2)
            shift_of = np.repeat(np.array([0, 4], np.uint8), half)
            planes.append(Plane(data, byte_of, shift_of, width, lift))
        return Codes(tuple(planes), zero)

    @staticmethod
    def grouped(
        rng: np.random.Generator,
        rows: int,
        columns: int,
        bits: int,
        group: int,
        *,
        minimums: bool,
        two_level: bool = False,
    ) -> GroupedTensor:
        """A random grouped weight; two-level scales need columns a multiple of 256."""
        groups = columns // group
        codes = rng.integers(0, 1 << bits, (rows, groups, group), dtype=np.uint8)

        def scales(low: float, high: float, sign: int) -> Scales:
            if not two_level:
                return GroupScales(rng.uniform(low, high, (rows, groups)).astype(np.float16))
            factors = rng.integers(0, 64, (rows, columns // 256, 256 // group), dtype=np.uint8)
            d = rng.uniform(low, high, (rows, columns // 256)).astype(np.float16) / np.float16(32)
            return BlockScales(d, Kit.codes(factors, 6, 0 if sign < 0 else 20), sign)

        return GroupedTensor(
            Kit.codes(codes, bits, 1 << (bits - 1)),
            bits,
            group,
            scales(0.5 / 2**bits, 1.5 / 2**bits, 1),
            scales(-0.5, 0.5, -1) if minimums else None,
            "test",
        )

    @staticmethod
    def batch(
        parts: Sequence[Part],
        block_size: int = 16,
        *,
        token_ids: Sequence[int] | None = None,
        logits_rows: Sequence[int] | None = None,
        inputs: Mapping[str, Float32] | None = None,
    ) -> Batch:
        """A step of these parts; without logits_rows the last token of each part."""
        starts = np.cumsum([0, *(p.count for p in parts)])
        width = max(len(p.blocks) for p in parts)
        tables = np.zeros((len(parts), width), np.int32)
        positions: list[int] = []
        slots: list[int] = []
        for table, part in zip(tables, parts, strict=True):
            table[: len(part.blocks)] = part.blocks
            for position in range(part.start, part.start + part.count):
                positions.append(position)
                block = part.blocks[position // block_size]
                slots.append(block * block_size + position % block_size)
        ids = np.zeros(len(positions), np.int32) if token_ids is None else token_ids
        rows = starts[1:] - 1 if logits_rows is None else logits_rows
        return Batch(
            token_ids=np.asarray(ids, np.int32),
            positions=np.array([positions], np.int32),
            query_start_loc=starts.astype(np.int32),
            seq_lens=np.array([p.start + p.count for p in parts], np.int32),
            block_tables=(tables,),
            slot_mapping=(np.array(slots, np.int32),),
            logits_rows=np.asarray(rows, np.int32),
            inputs=dict(inputs or {}),
        )

    @staticmethod
    def rows(count: int, **changes: Any) -> SamplingRows:
        """Greedy rows, but for the changes: one value for all rows or an array."""
        values: dict[str, Any] = {
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": 0,
            "index": 0,
            "position": 0,
            "repetition": 1.0,
            "presence": 0.0,
            "frequency": 0.0,
            "num_logprobs": -1,
        }
        whole = {"top_k", "index", "position", "num_logprobs"}
        arrays: dict[str, Any] = {}
        for name, default in values.items():
            kind: type = np.uint64 if name == "seed" else np.int32 if name in whole else np.float32
            value = changes.pop(name, default)
            arrays[name] = np.ascontiguousarray(np.broadcast_to(np.asarray(value, kind), count))
        lists: dict[str, dict[str, Any]] = {}
        for name, second, kind in (("seen", "counts", np.int32), ("bias", "values", np.float32)):
            given = changes.pop(name, [{}] * count)
            lists[name] = {
                "start": np.cumsum([0, *map(len, given)], dtype=np.int32),
                "token_ids": np.array([i for d in given for i in d], np.int32),
                second: np.array([v for d in given for v in d.values()], kind),
            }
        assert not changes
        num_logprobs = arrays.pop("num_logprobs")
        return SamplingRows(
            filters=Filters(**{n: arrays[n] for n in ("temperature", "top_k", "top_p", "min_p")}),
            noise=Noise(**{n: arrays[n] for n in ("seed", "index", "position")}),
            penalties=Penalties(
                **{n: arrays[n] for n in ("repetition", "presence", "frequency")}, **lists["seen"]
            ),
            bias=Bias(**lists["bias"]),
            num_logprobs=num_logprobs,
        )

    @staticmethod
    def graph(build: Callable[[Ops], Value]) -> Graph:
        """The graph of one value, "out"; also "logits", which the reference samples from."""
        ops = Ops()
        out = build(ops)
        return ops.finish(out=out, logits=out)

    @staticmethod
    def compile(
        graph: Graph, weights: Mapping[str, StoredTensor], options: CompileOptions
    ) -> Program:
        """The cpu backend's Program."""
        return cpu.compile(graph, weights, options)

    @staticmethod
    def both(
        graph: Graph,
        weights: Mapping[str, StoredTensor],
        options: CompileOptions,
        batches: Sequence[Batch],
        num_blocks: int = 0,
    ) -> tuple[Float32, Float32]:
        """Output "out" of the last of the batches, from cpu and from reference."""
        outs = []
        for backend in (cpu, reference):
            program = backend.compile(graph, weights, options)
            if num_blocks:
                program.allocate_cache(num_blocks)
            for batch in batches:
                output = program.run(batch, None, ("out",))
            outs.append(output.values["out"])
            program.close()
        return outs[0], outs[1]


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    """The builders."""
    return Kit


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(11)

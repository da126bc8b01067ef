"""Each operator's share of what the machine allows, on each instruction set that it has.

    python benchmarks/cpu/operators.py [--json] [--isa avx2 ...] [--models smollm2-135m ...]
        [--formats Q4_K ...] [--rows 1 64 ...] [--parts linear attention rows] [--save]

Times graphs of one kind of operator, compiled as a model is:
- linear: several weights of one shape, together larger than the caches, each product adding the one
  before as its residual, so that it is a stage of its own and outputs stay small. GOP/s against the
  int8 limit (fp32's for F32 and BF16); GB/s of the file's bytes against the read limit.
- attention: layers whose KV cache is together larger than the caches, against its floor: the
  greater of KV bytes over the read limit and multiply-adds over the fp32 limit.
- rows: norm and rounding to int8, rope, silu_mul: GB/s of values read and written, in caches.
The limits (limits.py) are measured before, in between and after; the highest counts, so a share is
rather too small than too large. One thread is timed by its own clock, more by the wall's, best of
several repetitions. The whole takes some ten minutes; --quick a few shapes in one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from blocks import BLOCKS, file_bytes, random_matrix
from limits import Limits, describe, highest, limits
from shapes import MODELS, ModelShape
from steps import batch

from octavo.backends import cpu
from octavo.backends.cpu import _native
from octavo.backends.program import CompileOptions, Program
from octavo.cli.bench.report import save
from octavo.config import available_cpus
from octavo.graph.batch import Batch
from octavo.graph.tensors import DenseTensor, StoredTensor
from octavo.graph.trace import Graph, Ops, Value

ISAS = ("scalar", "avx2", "avxvnni", "avx512")
FORMATS = ("Q4_1", "Q4_0", "Q8_0", "Q5_0", "Q4_K", "Q6_K", "F32", "BF16")
ROWS = (1, 6, 16, 64, 256)
ATTENTION = (
    ("prefill", 1, 300, 256), ("prefill", 1, 2000, 256),
    ("decode", 1, 300, 1), ("decode", 16, 300, 1), ("decode", 64, 300, 1),
)  # fmt: skip
"""Name, sequences, tokens in the cache before, new tokens of each sequence."""
BLOCK_SIZE = 16
CHAIN = 64
"""Row operators in a row of one graph: what surrounds them hardly counts."""
TOO_LONG = 2.0
"""Seconds of one repetition at which a measurement is left out (scalar code on many rows)."""

Record = dict[str, Any]


def cache_bytes() -> int:
    """Twice the last level's cache, 64 to 256 MiB."""
    largest = 0
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        largest = max(largest, int(path.read_text().strip().rstrip("K")) << 10)
    return min(max(2 * largest, 64 << 20), 256 << 20)


def best_time(step: Callable[[], object], threads: int, seconds: float) -> float:
    """The best of at least two repetitions in this many seconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: list[float] = []
    while len(times) < 2 or (sum(times) < seconds and len(times) < 200):
        begin = clock()
        step()
        times.append(clock() - begin)
        if times[0] > TOO_LONG:
            break
    return min(times)


def compiled(
    graph: Graph, weights: Mapping[str, StoredTensor], isa: str, threads: int, length: int = 512
) -> Program:
    """The program of a graph, for up to 256 tokens and sequences of this length."""
    options = CompileOptions(
        num_threads=threads,
        block_size=BLOCK_SIZE,
        max_num_tokens=256,
        max_num_rows=256,
        max_model_len=-(-length // BLOCK_SIZE) * BLOCK_SIZE,
        isa=isa,
    )
    return cpu.compile(graph, weights, options)


def inputs(step: Batch, **features: int) -> Batch:
    """The step with random values as the graph's inputs."""
    rng = np.random.default_rng(3)
    count = len(step.token_ids)
    values = {name: rng.standard_normal((count, n), np.float32) for name, n in features.items()}
    return dataclasses.replace(step, inputs=values)


# ---- linear ----------------------------------------------------------------------------------


def linear_graph(n: int, k: int, count: int) -> Graph:
    """`count` products of the same rows, each a stage of its own: it adds the one before."""
    ops = Ops()
    x = ops.input("x", k)
    total: Value | None = None
    for i in range(count):
        product = ops.linear(x, f"w{i}", n)
        total = product if total is None else ops.add(product, total)
    assert total is not None
    return ops.finish(out=total)


def linear(
    options: argparse.Namespace, shape: ModelShape, isa: str, threads: int
) -> Iterator[Record]:
    """Every product of a layer in every format at every number of rows."""
    for type_name in options.formats:
        for name, (n, k) in shape.linears().items():
            block = BLOCKS[type_name].block_len if type_name in BLOCKS else 1
            if k % block:
                continue  # no file has it
            size = file_bytes(type_name, n * k)
            count = -(-options.cache_bytes // size)
            weight = random_matrix(np.random.default_rng(1), type_name, n, k)
            weights = {f"w{i}.weight": weight for i in range(count)}
            program = compiled(linear_graph(n, k, count), weights, isa, threads)
            rate = 0.0
            for rows in options.rows:
                if rate and 2 * rows * n * k * count / rate > TOO_LONG:
                    break
                step = inputs(batch([0], [rows], BLOCK_SIZE, 16), x=k)
                seconds = best_time(lambda: program.run(step, None), threads, options.seconds)  # noqa: B023
                rate = 2 * rows * n * k * count / seconds
                yield {
                    "model": shape.name, "operator": name, "n": n, "k": k, "format": type_name,
                    "isa": isa, "threads": threads, "rows": rows,
                    "seconds": seconds / count,
                    "gops": rate / 1e9,
                    "gbs": size * count / seconds / 1e9,
                    "ops_per_byte": 2 * rows * n * k / size,
                }  # fmt: skip
            program.close()


# ---- attention -------------------------------------------------------------------------------


def attention_graph(shape: ModelShape, layers: int) -> Graph:
    """Attention of the same rows over the caches of several layers."""
    ops = Ops()
    query = ops.input("q", shape.num_heads * shape.head_dim)
    key = ops.input("k", shape.num_kv_heads * shape.head_dim)
    value = ops.input("v", shape.num_kv_heads * shape.head_dim)
    for layer in range(layers):
        out = ops.paged_attention(
            query, key, value, layer, head_dim=shape.head_dim, scale=shape.head_dim**-0.5
        )
    return ops.finish(out=out)


def attention(
    options: argparse.Namespace, shape: ModelShape, isa: str, threads: int
) -> Iterator[Record]:
    """Prefill of a chunk and decode of several sequences."""
    kv_features, q_features = (
        heads * shape.head_dim for heads in (shape.num_kv_heads, shape.num_heads)
    )
    for name, sequences, context, new in options.attention:
        length = context + new
        kv_bytes = sequences * length * kv_features * 2 * 2
        layers = min(128, -(-options.cache_bytes // kv_bytes))
        width = -(-length // BLOCK_SIZE)
        program = compiled(attention_graph(shape, layers), {}, isa, threads, length)
        program.allocate_cache(sequences * width)
        starts, counts = [context] * sequences, [new] * sequences
        step = inputs(
            batch(starts, counts, BLOCK_SIZE, width), q=q_features, k=kv_features, v=kv_features
        )
        seconds = best_time(lambda: program.run(step, None), threads, options.seconds) / layers  # noqa: B023
        seen = sequences * sum(range(context + 1, length + 1))
        yield {
            "model": shape.name, "operator": f"attention {name}", "isa": isa, "threads": threads,
            "sequences": sequences, "context": context, "new": new, "seconds": seconds,
            "gops": 4 * q_features * seen / seconds / 1e9,
            "gbs": kv_bytes / seconds / 1e9,
        }  # fmt: skip
        program.close()


# ---- row operators ---------------------------------------------------------------------------


def rows_graphs(shape: ModelShape) -> dict[str, tuple[Graph, dict[str, int], int]]:
    """Chains: name → graph, its inputs' features, bytes read and written by an operator a row."""
    wide = shape.num_heads * shape.head_dim
    inv_freq = tuple(
        float(10000.0 ** (-2 * i / shape.head_dim)) for i in range(shape.head_dim // 2)
    )
    norm, rope, silu = Ops(), Ops(), Ops()
    x = norm.input("x", shape.hidden)
    for _ in range(CHAIN):
        x = norm.rms_norm(x, "norm", 1e-6)
    q = rope.input("x", wide)
    for _ in range(CHAIN):
        q = rope.rope(q, shape.head_dim, inv_freq)
    gate, up = silu.input("x", shape.intermediate), silu.input("up", shape.intermediate)
    for _ in range(CHAIN):
        gate = silu.silu_mul(gate, up)
    return {
        "rms_norm": (norm.finish(out=x), {"x": shape.hidden}, 8 * shape.hidden),
        "rope": (rope.finish(out=q), {"x": wide}, 8 * wide),
        "silu_mul": (
            silu.finish(out=gate),
            {"x": shape.intermediate, "up": shape.intermediate},
            12 * shape.intermediate,
        ),
    }


def rounding_graph(shape: ModelShape, branches: int, each: bool) -> Graph:
    """Small products of one normed value, or each of a norm and a rounding of its own."""
    ops = Ops()
    x = ops.input("x", shape.hidden)
    shared = ops.rms_norm(x, "norm", 1e-6)
    total: Value | None = None
    for i in range(branches):
        source = ops.rms_norm(x, "norm", 1e-6) if each else shared
        product = ops.linear(source, f"w{i}", 32)
        total = product if total is None else ops.add(product, total)
    assert total is not None
    return ops.finish(out=total)


def rows_operators(
    options: argparse.Namespace, shape: ModelShape, isa: str, threads: int
) -> Iterator[Record]:
    """Norm, norm and rounding, rope and silu_mul on 1 and on 256 rows."""
    norm = {"norm.weight": DenseTensor(np.ones(shape.hidden, np.float32), "f32")}

    def timed(graph: Graph, weights: Mapping[str, StoredTensor], step: Batch) -> float:
        program = compiled(graph, weights, isa, threads)
        seconds = best_time(lambda: program.run(step, None), threads, options.seconds)
        program.close()
        return seconds

    for rows in (1, 256):
        step = batch([0], [rows], BLOCK_SIZE, 16)
        figures: list[tuple[str, float, int]] = []
        for name, (graph, features, moved) in rows_graphs(shape).items():
            filled = inputs(step, **features)
            if (
                "up" in features
            ):  # about 1.5: the chain neither dies away to subnormals nor overflows
                filled.inputs["up"][:] = 1.5
                filled.inputs["x"][:] = 0.7
            weights = {n: norm[n] for n in graph.weights}
            figures.append((name, timed(graph, weights, filled) / CHAIN, moved))
        filled, branches = inputs(step, x=shape.hidden), 8
        small = random_matrix(np.random.default_rng(1), "Q4_0", 32, shape.hidden)
        weights = norm | {f"w{i}.weight": small for i in range(branches)}
        both = [timed(rounding_graph(shape, branches, each), weights, filled) for each in (1, 0)]
        moved = (4 + 1) * shape.hidden + 8 * shape.hidden // 32
        figures.append(("norm+quantize", (both[0] - both[1]) / (branches - 1), moved))
        for name, seconds, moved in figures:
            yield {
                "model": shape.name, "operator": name, "isa": isa, "threads": threads,
                "rows": rows, "seconds": seconds, "gbs": rows * moved / seconds / 1e9,
            }  # fmt: skip


# ---- the table -------------------------------------------------------------------------------

PARTS = {"linear": linear, "attention": attention, "rows": rows_operators}


def add_shares(record: Record, measured: Limits) -> None:
    """What part of its limit an operator reaches; None where the machine's limit is not known."""
    here = measured[str(record["threads"])]
    fp32 = here["fp32"].get(record["isa"])
    record["read_share"] = record["gbs"] / here["read"]
    if record["operator"].startswith("attention"):
        record["share"] = None
        if fp32:
            record["share"] = max(record["gops"] / fp32, record["read_share"])
    elif "format" in record:
        dense = record["format"] in ("F32", "BF16")
        limit = fp32 if dense else here["int8"].get(record["isa"])
        record["share"] = record["gops"] / limit if limit else None


def percent(share: float | None) -> str:
    """A share for people."""
    return "     -" if share is None else f"{share:6.1%}"


def line(record: Record) -> str:
    """A record for people."""
    what = f"{record['isa']:<7} {record['threads']:>2}t {record['model']:<13}"
    micros = f"{record['seconds'] * 1e6:>10.1f} us"
    if "format" in record:
        return (
            f"{what} {record['operator']:<8} {record['n']:>5}x{record['k']:<5}"
            f" {record['format']:<5} {record['rows']:>4} rows {micros}"
            f" {record['gops']:>8.1f} GOP/s {percent(record['share'])} of its limit"
            f" {record['gbs']:>7.2f} GB/s {percent(record['read_share'])}"
        )
    if "context" in record:
        return (
            f"{what} {record['operator']:<18} {record['sequences']:>3} x {record['new']:<3} at"
            f" {record['context']:<5} {micros} {record['gops']:>8.1f} GFLOP/s"
            f" {record['gbs']:>7.2f} GB/s {percent(record['share'])} of its floor's speed"
        )
    return (
        f"{what} {record['operator']:<14} {record['rows']:>4} rows {micros}"
        f" {record['gbs']:>8.2f} GB/s"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All records, with the limits of the same run."""
    measured = limits()
    records: dict[str, list[Record]] = {part: [] for part in options.parts}
    for isa in options.isa:
        for threads in options.threads:
            for model in options.models:
                for part in options.parts:
                    for record in PARTS[part](options, MODELS[model], isa, threads):
                        records[part].append(record)
                        print(line(record | {"share": None, "read_share": None}), file=sys.stderr)
                measured = highest(measured, limits())
    for of_part in records.values():
        for record in of_part:
            add_shares(record, measured)
    return {"limits": measured, **records}


def main() -> None:
    """Print the table; write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = [isa for isa in ISAS if _native.has_isa(isa)]
    known = [isa for isa in here if isa != "scalar"] or here  # scalar code has no limit to share
    counts = sorted({1, available_cpus()})
    parser.add_argument("--isa", nargs="+", choices=here, default=known[::-1])
    parser.add_argument("--threads", nargs="+", type=int, choices=counts, default=counts)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=ROWS)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    parser.add_argument("--quick", action="store_true", help="less of everything, to try it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    options.cache_bytes, options.attention = cache_bytes(), ATTENTION
    if options.quick:
        options.isa, options.models, options.seconds = options.isa[:1], options.models[:1], 0.05
        options.formats, options.rows = ("Q4_1", "Q8_0", "F32"), (1, 64)
    figures = measure(options)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        for part in options.parts:
            print("\n".join(line(record) for record in figures[part]))
        print(describe(figures["limits"]))
    if options.save:
        print(save(pathlib.Path(__file__).parents[1] / "results", "operators", figures))


if __name__ == "__main__":
    main()

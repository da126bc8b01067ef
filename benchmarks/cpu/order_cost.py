"""What the one fixed order of sums costs: the kernels beside ones that may add in any order.

    python benchmarks/cpu/order_cost.py [--models smollm2-135m ...] [--rows 1 64] [--json] [--save]

native/free_order.cpp holds the free kernels, several ways to break up each sum; the fastest of them
counts. Both sides run the same shapes with the same bytes (Q4_1 products; attention of a decode
step over float16 K and V), on one thread of the best instruction set, in turns. The bitwise
guarantee costs (fixed / free - 1), with the medians last; it may be below zero, since the free
kernels are plain.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import operators
from limits import build
from shapes import MODELS

from octavo.backends.cpu import _native
from octavo.cli.bench.report import save

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
FLAGS = {
    "avx512": "-DOCTAVO_ISA_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
    " -mavx2 -mfma -mf16c -mbmi2",
    "avx2": "-DOCTAVO_ISA_AVX2 -mavx2 -mfma -mf16c -mbmi2",
    "scalar": "",
}


def free(isa: str, *arguments: object) -> tuple[str, float]:
    """The fastest variant and its seconds."""
    flags = ["-O3", "-ffp-contract=off", f"-I{CSRC}", *FLAGS[isa].split()]
    program = build("free_order", flags, [CSRC / "simd.h", CSRC / "dot.h"])
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    variants: dict[str, float] = json.loads(done.stdout)
    name = min(variants, key=variants.__getitem__)
    return name, variants[name]


def measure(options: argparse.Namespace, isa: str) -> list[dict[str, Any]]:
    """Every product of a layer and the decode steps of each model."""
    records = []
    for model in options.models:
        shape = MODELS[model]
        fixed = itertools.chain(
            operators.linear(options, shape, isa, 1), operators.attention(options, shape, isa, 1)
        )  # lazy: each is timed just before its free counterpart
        for record in fixed:
            if "format" in record:
                arguments = ("linear", record["rows"], record["n"], record["k"])
                what = f"{record['operator']} {record['n']}x{record['k']}, {record['rows']} rows"
            else:
                heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
                tokens = record["context"] + record["new"]
                arguments = ("attention", record["sequences"], tokens, *heads)
                what = f"{record['operator']}, {record['sequences']} sequences of {tokens}"
            variant, seconds = free(isa, *arguments)
            cost = record["seconds"] / seconds - 1
            records.append(
                {"model": model, "what": what, "fixed_s": record["seconds"], "free_s": seconds,
                 "variant": variant, "cost": cost}
            )  # fmt: skip
            print(
                f"{model:<13} {what:<36} fixed {record['seconds'] * 1e6:>9.1f} us, free"
                f" {seconds * 1e6:>9.1f} us ({variant}): the order costs {cost:+.1%}",
                file=sys.stderr if options.json else sys.stdout,
                flush=True,
            )
    return records


def main() -> None:
    """Print the comparison; write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 16, 64))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    options.formats, options.cache_bytes = ("Q4_1",), 64 << 20
    options.attention = [case for case in operators.ATTENTION if case[0] == "decode"]
    isa = next(i for i in FLAGS if _native.has_isa(i))
    records = measure(options, isa)
    for what in ("linear", "attention"):
        costs = [r["cost"] for r in records if ("attention" in r["what"]) == (what == "attention")]
        print(f"{what}: median of {len(costs)} {statistics.median(costs):+.1%}", file=sys.stderr)
    if options.json:
        print(json.dumps(records, indent=1))
    if options.save:
        folder = pathlib.Path(__file__).parents[1] / "results"
        print(save(folder, "order-cost", {"isa": isa, "comparisons": records}))


if __name__ == "__main__":
    main()

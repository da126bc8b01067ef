"""Draw the linear operators under the machine's two limits, from the figures of operators.py.

    pip install -r benchmarks/cpu/requirements.txt
    python benchmarks/cpu/roofline.py FIGURES.json [--isa avx2] [--threads 2] [--model llama-1.5b]
        [--out docs/roofline.png]

x is operations for each byte of the file's weights, so it grows with the rows of a step; y is what
was reached, each format's best and worst operator of a layer as a bar, their median as the point.
The slope is the read limit, the flat lines the arithmetic ones.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections import defaultdict
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker

ROOT = pathlib.Path(__file__).resolve().parents[2]
INTEGER = ("Q4_1", "Q4_0", "Q4_K", "Q5_0", "Q6_K", "Q8_0")
COLORS = dict(zip((*INTEGER, "BF16", "F32"), mpl.color_sequences["tab10"], strict=False))
MARKERS = dict(zip(COLORS, "osD^vP<X", strict=True))


def choose(figures: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one instruction set, number of threads and model; the last measured ones."""
    records = figures["linear"]
    options.isa = options.isa or records[0]["isa"]
    options.threads = options.threads or max(r["threads"] for r in records)
    options.model = options.model or records[-1]["model"]
    wanted = (options.isa, options.threads, options.model)
    chosen = [r for r in records if (r["isa"], r["threads"], r["model"]) == wanted]
    if not chosen:
        raise SystemExit(f"the file has no linear operators of {wanted}")
    return chosen


def draw_limits(axes: plt.Axes, limits: dict[str, Any], isa: str, right: float) -> None:
    """The roof: bytes a second times operations a byte, up to the arithmetic's limit."""
    read = limits["read"]
    for kind, words, style in (("int8", "int8", "-"), ("fp32", "fp32 FMA", "--")):
        top = limits[kind].get(isa)
        if top is None:
            continue
        axes.plot([top / read, right], [top, top], style, color="black", lw=1.6, zorder=1)
        axes.annotate(
            f"{words}: {top:.0f} GOP/s", (right, top), xytext=(-4, 5),
            textcoords="offset points", ha="right", fontsize=10,
        )  # fmt: skip
    top = max(limits["int8"].get(isa, 0), limits["fp32"].get(isa, 0)) or read * right
    axes.plot([0.2, top / read], [0.2 * read, top], "-", color="black", lw=1.6, zorder=1)
    axes.annotate(
        f"read: {read:.1f} GB/s", (2.0, 2.0 * read), xytext=(-8, 8),
        textcoords="offset points", ha="right", fontsize=10,
    )  # fmt: skip


def draw(figures: dict[str, Any], options: argparse.Namespace) -> plt.Figure:
    """One model on one instruction set."""
    records = choose(figures, options)
    figure, axes = plt.subplots(figsize=(9.5, 6.2), dpi=130)
    axes.set(xscale="log", yscale="log")
    points: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        points[record["format"]][record["rows"]].append(record)
    right = 2 * max(r["ops_per_byte"] for r in records)
    draw_limits(axes, figures["limits"][str(options.threads)], options.isa, right)
    for name, by_rows in points.items():
        x = [statistics.median(r["ops_per_byte"] for r in group) for group in by_rows.values()]
        rates = [[r["gops"] for r in group] for group in by_rows.values()]
        y = [statistics.median(group) for group in rates]
        spread = [
            [m - min(g) for m, g in zip(y, rates, strict=True)],
            [max(g) - m for m, g in zip(y, rates, strict=True)],
        ]
        axes.errorbar(
            x, y, yerr=spread, label=name, color=COLORS[name], marker=MARKERS[name],
            ms=6, lw=1, elinewidth=1, capsize=2, zorder=2,
        )  # fmt: skip
    rows = sorted({r["rows"] for r in records})
    axes.set_xlim(0.3, right)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel(
        "operations for each byte of weights; points from left to right: "
        f"{', '.join(map(str, rows))} rows"
    )
    axes.set_ylabel("GOP/s (a multiply-add is two)")
    machine = f"{figures['processor']}, " if "processor" in figures else ""
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    axes.set_title(f"Linear operators of {options.model}: {machine}{options.isa}, {threads}")
    axes.grid(which="major", color="0.85", lw=0.6)
    axes.legend(loc="lower right", ncols=2, frameon=True, fontsize=10)
    figure.tight_layout()
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=pathlib.Path)
    parser.add_argument("--isa", help="default: the best")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--model", help="default: the largest")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "roofline.png")
    options = parser.parse_args()
    figure = draw(json.loads(options.figures.read_text()), options)
    figure.savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()

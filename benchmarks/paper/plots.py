"""Draw the figures from what run.py has written.

    pip install -r benchmarks/paper/requirements.txt
    python benchmarks/paper/plots.py docs/paper/figures.json

The pictures are written beside the file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES = ("Octavo", "Orca (Oracle)", "Orca (Pow2)", "Orca (Max)", "FasterTransformer")
COLORS = dict(zip(NAMES, mpl.color_sequences["tab10"], strict=False))
COLORS |= {"Octavo, prefix cache": COLORS["Octavo"], "Orca": COLORS["Orca (Max)"]}
MARKERS = dict(zip(NAMES, "osD^v", strict=True)) | {"Octavo, prefix cache": "o", "Orca": "^"}
KINDS = {
    "tokens": ("token states", "tab:green"),
    "reserved": ("reserved, to be filled", "tab:olive"),
    "internal": ("never filled", "tab:orange"),
    "external or free": ("fragments and free", "0.8"),
}
TOP_LATENCY = 0.6
"""Above it curves end: what is drawn there is a lower bound."""

Record = dict[str, Any]


def draw_memory(records: list[Record]) -> plt.Figure:
    """Figure 2: what the pool's slots hold; and the waste by block size."""
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(10.5, 4.2), dpi=120)
    runs = [r for r in records if "shares" in r and r["block_size"] == 16]
    for at, name in enumerate(NAMES[3::-1]):
        (run,) = (r for r in runs if (r["system"], r["source"]) == (name, "ShareGPT"))
        bottom = 0.0
        for kind, (label, color) in KINDS.items():
            part = 100 * run["shares"][kind]
            bars.bar(at, part, bottom=bottom, color=color, label=None if at else label, width=0.6)
            if part > 4:
                bars.text(at, bottom + part / 2, f"{part:.1f}", ha="center", va="center")
            bottom += part
    bars.set_xticks(range(4), NAMES[3::-1])
    bars.set(ylabel="percent of the KV pool", title="2: OPT-13B, ShareGPT at 2 requests/s")
    bars.set_ylim(0, 128)
    bars.set_yticks(range(0, 101, 20))
    bars.legend(loc="upper center", ncols=2, fontsize=8)
    for source, style in (("ShareGPT", "o-"), ("Alpaca", "s--")):
        points = sorted(
            (r["block_size"], 100 * r["waste"])
            for r in records
            if "shares" in r and r["system"] == "Octavo" and r["source"] == source
        )
        lines.plot(*zip(*points, strict=True), style, label=source, color=COLORS["Octavo"])
    lines.set_xscale("log", base=2)
    lines.axhline(4, color="0.6", lw=1)
    lines.set(
        xlabel="block size, tokens", ylabel="percent of slots taken",
        title="Octavo: slots taken that hold no token",
    )  # fmt: skip
    lines.legend()
    return figure


def draw_curves(axes: plt.Axes, records: list[Record], title: str) -> None:
    """Latency over rate of several systems."""
    for record in records:
        num_below = sum(latency <= TOP_LATENCY for _, latency in record["curve"])
        curve = record["curve"][: num_below + 1]
        name = record["system"]
        line = "-" if "prefix" not in name else "--"
        axes.plot(
            *zip(*curve, strict=True), line + MARKERS[name], ms=3.5, lw=1.2,
            color=COLORS[name], label=name,
        )  # fmt: skip
    axes.set(title=title, xlabel="requests/s", ylabel="normalized latency, s/token")
    axes.set_ylim(0, TOP_LATENCY)
    right = max(
        (rate for r in records for rate, latency in r["curve"] if latency <= TOP_LATENCY),
        default=1.0,
    )
    axes.set_xlim(0, 1.05 * right)
    axes.grid(color="0.9", lw=0.6)
    axes.legend(fontsize=7)


def draw_grid(
    records: list[Record], panels: list[tuple[str, str, str]], columns: int
) -> plt.Figure:
    """A picture of panels (model, source, title)."""
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), dpi=120, squeeze=False
    )
    for axes, (model, source, title) in zip(grid.flat, panels, strict=False):
        chosen = [
            r
            for r in records
            if "curve" in r
            and (r["has_overhead"] or r["system"] == "FasterTransformer")
            and (r["model"], r["source"]) == (model, source)
        ]
        chosen.sort(key=lambda r: list(COLORS).index(r["system"]))
        draw_curves(axes, chosen, title)
    return figure


def draw_batches(records: list[Record]) -> plt.Figure:
    """Figure 13: requests batched, ours and the paper's."""
    paper = {"ShareGPT": (7.0, 9.81, 13.62, 30.42), "Alpaca": (7.0, 43.24, 72.75, 132.44)}
    figure, both = plt.subplots(1, 2, figsize=(9.5, 3.6), dpi=120)
    for axes, (source, said) in zip(both, paper.items(), strict=True):
        for at, (name, value) in enumerate(zip(NAMES[3::-1], said, strict=True)):
            (ours,) = (
                r["num_batched"]
                for r in records
                if "shares" in r
                and (r["system"], r["source"], r["block_size"]) == (name, source, 16)
            )
            axes.bar(at - 0.2, value, 0.38, color="0.75", label=None if at else "paper")
            axes.bar(at + 0.2, ours, 0.38, color=COLORS[name], label=None if at else "ours")
            axes.text(at + 0.2, ours, f"{ours:.1f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(4), NAMES[3::-1], fontsize=8)
        axes.set(title=f"13: {source}", ylabel="requests in a step")
        axes.legend()
    return figure


def draw_sharing(records: list[Record]) -> plt.Figure:
    """Figure 15: blocks that samples and beams save, and the paper's ranges."""
    paper = {"samples": (6.1, 9.8, 16.2, 30.5), "beams": (37.6, 55.2, 44.3, 66.3)}
    figure, both = plt.subplots(1, 2, figsize=(8.5, 3.6), dpi=120)
    for axes, (kind, said) in zip(both, paper.items(), strict=True):
        for place, source in enumerate(("Alpaca", "ShareGPT")):
            low, high = said[2 * place : 2 * place + 2]
            axes.axhspan(low, high, color=f"C{place}", alpha=0.15, label=f"{source}, paper")
            points = sorted(
                (int(r["source"].split()[1]), 100 * r["saved"])
                for r in records
                if "saved" in r and r["source"].startswith(source) and kind in r["source"]
            )
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{place}", label=source)
        axes.set(title=f"15: {kind}", xlabel=f"{kind} a request", ylabel="percent of blocks saved")
        axes.set_ylim(0)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=pathlib.Path)
    options = parser.parse_args()
    records = json.loads(options.figures.read_text())["records"]
    models = ("OPT-13B", "OPT-66B", "OPT-175B")
    curves = [
        (model, source, f"12: {model}, {source}")
        for source in ("ShareGPT", "Alpaca")
        for model in models
    ]
    prefixes = [
        ("LLaMA-13B", f"prefix of {num}", f"16: shared prefix of {num}") for num in (80, 341)
    ]
    pictures = {
        "memory": draw_memory(records),
        "latency": draw_grid(records, curves, 3),
        "batches": draw_batches(records),
        "sharing": draw_sharing(records),
        "prefix": draw_grid(records, prefixes, 2),
        "chat": draw_grid(records, [("OPT-13B", "chat", "17: chatbot")], 1),
    }
    for name, figure in pictures.items():
        figure.tight_layout()
        figure.savefig(options.figures.parent / f"{name}.png")
        plt.close(figure)


if __name__ == "__main__":
    main()

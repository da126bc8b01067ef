"""Tables of claims, for a terminal and for docs/paper.md."""

from __future__ import annotations

import dataclasses
from typing import Any

from figures import Claim, Results, shares
from simulate import Result


def _number(value: float, unit: str) -> str:
    text = f"{value:.1f}" if unit == "%" or value >= 10 else f"{value:.2f}"
    return text + {"%": " %", "x": "x", "": ""}[unit]


def paper_text(claim: Claim) -> str:
    """What the paper says."""
    if claim.low is None or claim.high is None:
        return "-"
    if claim.low == claim.high:
        return _number(claim.low, claim.unit)
    return f"{claim.low:g} to {_number(claim.high, claim.unit)}"


def target_text(claim: Claim) -> str:
    """What must be, and whether it is."""
    if claim.least is None and claim.most is None:
        return ""
    words = []
    if claim.least is not None:
        words.append(f">= {claim.least:g}")
    if claim.most is not None:
        words.append(f"<= {claim.most:g}")
    return f"{' '.join(words)} {'MISSED' if claim.is_missed else 'met'}"


def text_table(claims: list[Claim]) -> str:
    """Aligned columns."""
    rows = [("figure", "what", "paper", "Octavo", "target", "")]
    for c in claims:
        flag = "differs; " if c.differs else ""
        ours = _number(c.ours, c.unit)
        rows.append((c.figure, c.subject, paper_text(c), ours, target_text(c), flag + c.others))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    )


def as_records(claims: list[Claim]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {**dataclasses.asdict(claim), "missed": claim.is_missed, "differs": claim.differs}
        for claim in claims
    ]


def task_records(results: Results) -> list[dict[str, Any]]:
    """Every curve and every run, for the plots."""
    records = []
    for task, result in results.items():
        record: dict[str, Any] = {
            "system": task.system.name,
            "block_size": task.system.block_size,
            "overhead": task.system.overhead.fixed_s > 0,
            "model": task.model.name,
            "source": task.source.name,
        }
        if isinstance(result, Result):
            record["shares"] = shares(result, task.system)
            record["num_batched"] = result.num_batched
            record["waste"] = 1 - result.memory.held / result.memory.taken
        else:
            record["curve"] = result
        records.append(record)
    return records


def document(claims: list[Claim], has_data: bool) -> str:
    """docs/paper.md."""
    return text_table(claims)

"""Tables of claims, for a terminal and for docs/paper.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from claims import Claim

REASONS = (
    (
        "12",
        "Alpaca: rate over FasterTransformer",
        "A twentieth of Alpaca's answers have one or two tokens here; in a static batch each waits "
        "for the longest of it, so FasterTransformer is above the compared latency at nearly any "
        "rate, and the ratio is whatever one likes: the paper reads it where curves are steep, and "
        "at 0.5 s/token ours is near its 22x.",
    ),
    (
        "16",
        "",
        "The paper's system runs more sequences at once for its longer prefix and gains by that; "
        "in the cost model each sequence still reads its own view of the prefix (no attention "
        "kernel here reads it once for all) and adds its overhead. Sentences' lengths are assumed, "
        "and what the prefix costs Orca depends on how a request falls between powers of two.",
    ),
    (
        "17",
        "",
        "Prompts of 1,024 tokens bound Octavo's batch to about 15, twice Orca's 7, as in the "
        "paper; but a larger batch makes longer steps in the cost model, and answers of our table "
        "are 430 tokens long.",
    ),
)
"""(figure, part of the subject, why ours differs)."""


def as_records(claims: list[Claim]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {**dataclasses.asdict(claim), "is_missed": claim.is_missed, "differs": claim.differs}
        for claim in claims
    ]


def number(value: float, unit: str) -> str:
    """A figure with its unit."""
    text = f"{value:.1f}" if unit == "%" or value >= 10 else f"{value:.2f}"
    return text + {"%": " %", "x": "x", "": ""}[unit]


def paper_text(claim: Claim) -> str:
    """What the paper says."""
    if claim.low is None or claim.high is None:
        return "-"
    if claim.low == claim.high:
        return number(claim.low, claim.unit)
    return f"{claim.low:g} to {number(claim.high, claim.unit)}"


def target_text(claim: Claim) -> str:
    """What must be, and whether it is."""
    if claim.least is not None:
        words = f">= {claim.least:g}"
    elif claim.most is not None:
        words = f"<= {claim.most:g}"
    else:
        return ""
    return f"{words} {'MISSED' if claim.is_missed else 'met'}"


def text_table(claims: list[Claim]) -> str:
    """Aligned columns."""
    rows = [("figure", "what", "paper", "ours", "target", "")]
    for claim in claims:
        notes = "differs; " * claim.differs + claim.others
        ours = number(claim.ours, claim.unit)
        about = claim.figure, claim.subject, paper_text(claim), ours
        rows.append((*about, target_text(claim), notes))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    )


def markdown_table(claims: list[Claim]) -> str:
    """The same for a page; figures that differ are bold."""
    lines = ["| figure | what | paper | ours | target | more |", "|---|---|---|---|---|---|"]
    for claim in claims:
        ours = number(claim.ours, claim.unit)
        ours = f"**{ours}**" if claim.differs else ours
        cells = (
            claim.figure,
            claim.subject,
            paper_text(claim),
            ours,
            target_text(claim),
            claim.others,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def document(claims: list[Claim], data: str, latency: float) -> str:
    """docs/paper.md."""
    reasons = []
    for claim in claims:
        if claim.differs:
            why = [words for figure, part, words in REASONS if claim.is_about(figure, part)]
            ours = f"{number(claim.ours, claim.unit)} against {paper_text(claim)}"
            reasons.append(f"- Figure {claim.figure}, {claim.subject}: {ours}. {' '.join(why)}")
    template = Path(__file__).with_name("template.md").read_text()
    return template.format(
        data=data, latency=latency, table=markdown_table(claims), reasons="\n".join(reasons)
    )

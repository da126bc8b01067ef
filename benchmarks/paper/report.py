"""Tables of claims, for a terminal and for docs/paper.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from claims import Claim

UNITS = {"%": " %", "x": "x", "": ""}
REASONS = (
    (
        "12",
        "OPT-13B, ShareGPT: rate over Orca (Oracle)",
        "Saturated, Octavo computes 36 sequences at once and Orca 14.5, 2.5 times as many (the "
        "paper: 2.2 times); but of the larger batch's step a fifth is the overhead of its "
        "sequences and a quarter its attention, of Orca's an eighth each. And Orca batches 7 % "
        "more of our requests than of the paper's (figure 13), which is more than what is missing. "
        "Five-minute traces (--quick) give 1.73, or 1.65 with lengths drawn from the data itself.",
    ),
    (
        "12",
        "OPT-175B, ShareGPT",
        "K and V of a full pool are 283 GB, the weights 350: reading them takes 27 ms each, so a "
        "batch twice as large has steps half as long again, with or without overhead. By these "
        "costs no use of the memory can reach the paper's ratio; its system must have had larger "
        "costs that do not grow with the batch on eight GPUs.",
    ),
    (
        "12",
        "rate over FasterTransformer",
        "A twentieth of Alpaca's answers have one or two tokens here; in a static batch they wait "
        "for its longest one, so FasterTransformer is above the compared latency at nearly any "
        "rate. Read where curves are steep, at 0.5 s/token, it is 16 to 30 times.",
    ),
    (
        "14, 15",
        "samples",
        "Prompts of 19 tokens on average save a block only where they fill one: it depends on the "
        "shape of their lengths, which in the paper's data is another.",
    ),
    (
        "14",
        "beams",
        "Beams save half of the blocks here too (figure 15), and Octavo runs twice as many at "
        "once, 160 against 80; but half of such a step is the overhead of its sequences, and our "
        "Orca is spared copying a beam's KV whenever beams branch.",
    ),
    (
        "16",
        "",
        "With the longer prefix Octavo runs 131 requests at once and Orca 28, 4.7 times as many; "
        "but a third of its steps is reading the prefix again for every sequence (no attention "
        "kernel of the model reads it once for all), and a third their overhead. Sentences' "
        "lengths are assumed.",
    ),
    (
        "17",
        "",
        "Prompts of 1,024 tokens bound Octavo's batch to about 15, twice Orca's 7, as in the "
        "paper; but in the cost model its steps are 30 % longer, 44 ms against 33.",
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
    return text + UNITS[unit]


def paper_text(claim: Claim) -> str:
    """What the paper says."""
    if claim.low is None or claim.high is None:
        return "-"
    if claim.low == claim.high:
        return number(claim.low, claim.unit)
    start = f"{claim.low:g} to" if claim.low else "up to"
    return f"{start} {claim.high:g}{UNITS[claim.unit]}"


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
    differing: dict[str, list[str]] = {}
    for claim in claims:
        if claim.differs or claim.is_missed:
            why = [words for figure, part, words in REASONS if claim.is_about(figure, part)]
            ours = f"{number(claim.ours, claim.unit)} against {paper_text(claim)}"
            about = f"{claim.subject} (figure {claim.figure}), {ours}"
            differing.setdefault(" ".join(why), []).append(about)
    reasons = [f"- {'; '.join(abouts)}. {why}" for why, abouts in differing.items()]
    template = Path(__file__).with_name("template.md").read_text()
    return template.format(
        data=data, latency=latency, table=markdown_table(claims), reasons="\n".join(reasons)
    )

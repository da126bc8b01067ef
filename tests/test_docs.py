"""The documents are sound: their links lead somewhere, decisions have numbers of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    broken = [
        link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()
    ]
    assert not broken


def test_every_decision_has_a_number_of_its_own() -> None:
    numbers = [path.name[:3] for path in (ROOT / "docs" / "decisions").glob("*.md")]
    assert numbers and all(n.isdigit() for n in numbers) and len(set(numbers)) == len(numbers)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report
import run
import workload
from claims import Claim
from figures import FULL, LATENCY, QUICK, Paper
from tasks import Record, Scale, Task

WITHIN = Claim("2", "within", 37.0, 38.2, 38.2, unit="%")
BESIDE = Claim("17", "a chat", 1.5, 2.0, 2.0, least=1.6, unit="x")
BELOW = Claim("2", "waste", 4.1, most=4.0, unit="%", others="more")


def result_of(task: Task) -> Record:
    record: Record = {"label": task.label}
    if task.rate is None:
        return record | {"curve": [(1.0, 0.05), (2.0, 0.9)]}
    averages = {"num_batched": 7.0, "waste": 0.02, "saved": 0.5, "copies_a_request": 1.0}
    return record | averages | {"shares": {"tokens": 0.5}}


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=["quick", "full"])
def test_claims_follow_from_the_tasks_that_are_planned(scale: Scale) -> None:
    paper = Paper(workload.synthetic(), scale)
    tasks = paper.tasks()
    results = {task.label: result_of(task) for task in tasks}
    assert len(results) == len(tasks)
    claims = paper.claims(results)
    assert {c.figure.split(",")[0] for c in claims} >= {"2", "12", "13", "14", "16", "17"}
    assert all(c.ours == pytest.approx(1.0) for c in claims if c.unit == "x")
    assert any(c.is_missed for c in claims), "equal curves are short of the targets"


def test_a_claim_is_missed_beside_its_target_and_differs_beyond_a_fifth() -> None:
    assert [(c.is_missed, c.differs) for c in (WITHIN, BESIDE, BELOW)] == [
        (False, False),
        (True, True),
        (True, False),
    ]
    assert not Claim("12", "in the range", 2.6, 1.7, 2.7, least=1.7).differs
    assert Claim("12", "above the range", 3.3, 1.7, 2.7).differs


def test_tables_name_what_is_missed_and_the_page_explains_what_differs() -> None:
    claims = [WITHIN, BESIDE, BELOW]
    rows = report.text_table(claims).splitlines()
    assert rows[1].split() == ["2", "within", "38.2", "%", "37.0", "%"]
    assert ">= 1.6 MISSED  differs;" in rows[2]
    assert rows[3].split()[-4:] == ["<=", "4", "MISSED", "more"]
    page = report.document(claims, "made up", LATENCY)
    assert "| 17 | a chat | 2.00x | **1.50x** | >= 1.6 MISSED |  |" in page
    assert "- a chat (figure 17), 1.50x against 2.00x. Prompts" in page
    assert "- within" not in page and "made up" in page
    assert report.paper_text(Claim("12", "a range", 2.0, 1.7, 2.7, unit="x")) == "1.7 to 2.7x"
    assert report.paper_text(Claim("12", "no range", 2.0, 0.0, 22.0, unit="x")) == "up to 22x"


def test_results_that_were_kept_are_not_computed_again(tmp_path: Path) -> None:
    task = Paper(workload.synthetic(), QUICK).tasks()[0]
    keep = tmp_path / "kept.jsonl"
    keep.write_text(json.dumps(result_of(task)) + "\n")
    results = run.run_all([task], QUICK, 1, keep)
    assert results[task.label]["curve"] == [[1.0, 0.05], [2.0, 0.9]]
    assert len(keep.read_text().splitlines()) == 1

"""What a part reports: rows of tables, as they come, and the whole as JSON and Markdown."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table.

    Attributes:
        table: the heading of the table that it belongs to.
        name: what was measured or checked.
        cells: by column.
        ok: whether the target is met, or the check passed; None without a target.
        target: what was asked, for people.
    """

    table: str
    name: str
    cells: Mapping[str, Cell]
    ok: bool | None = None
    target: str = ""

    def line(self) -> str:
        """For the terminal."""
        verdict = {None: "     ", True: "ok   ", False: "MISS "}[self.ok]
        cells = "  ".join(f"{name} {show(value)}" for name, value in self.cells.items())
        return f"{verdict}{self.table}: {self.name}  {cells}" + (
            f"  ({self.target})" if self.target and self.ok is False else ""
        )


@dataclass(slots=True)
class Job:
    """What one job of a part gave.

    Attributes:
        part: the letter.
        name: of the job.
        seconds: that it took.
        error: why it did not come to its end.
    """

    part: str
    name: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


class Recorder:
    """Takes a job's rows: prints each, keeps it, and writes it to a file at once.

    So what was measured before a crash or the end of the job's time is not lost.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Write to `file`, if there is one."""
        self.rows: list[Row] = []
        self._file = file

    def add(
        self,
        table: str,
        name: str,
        cells: Mapping[str, Cell],
        *,
        ok: bool | None = None,
        target: str = "",
    ) -> None:
        """Take a row."""
        row = Row(table, name, dict(cells), ok, target)
        self.rows.append(row)
        print(row.line(), flush=True)
        if self._file is not None:
            with self._file.open("a") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")

    def attempt(self, table: str, name: str, function: Callable[[], object]) -> None:
        """Call what adds its rows itself; what it raises becomes a row, and the next may go on."""
        try:
            function()
        except Exception as error:
            traceback.print_exc(limit=-8, file=sys.stdout)
            said = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
            self.add(table, name, {"raised": said}, ok=False, target="no error")


def read_rows(file: Path) -> list[Row]:
    """The rows that a Recorder has written; a last line that was cut is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except ValueError:
            break
    return rows


def show(value: Cell) -> str:
    """A number as people read it."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1 else f"{value:,.0f}"


def faults(jobs: Iterable[Job]) -> list[str]:
    """What was missed and what failed, a line each."""
    found = []
    for job in jobs:
        missed = [row for row in job.rows if row.ok is False]
        found += [f"{job.part}, {row.table}: {row.name}: missed ({row.target})" for row in missed]
        if job.error is not None:
            last = job.error.strip().splitlines()[-1]
            found.append(f"{job.part}, {job.name}: failed: {last}")
    return found


def exit_code(jobs: Iterable[Job]) -> int:
    """0 if every job came to its end and nothing was missed."""
    return int(bool(faults(jobs)))


def write(out: Path, about: Mapping[str, Any], jobs: list[Job], titles: Mapping[str, str]) -> Path:
    """Write the report as JSON to `out`, and beside it as Markdown, whose path is returned.

    What was there is replaced as a whole: a cut leaves the one or the other.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"about": dict(about), "jobs": [asdict(job) for job in jobs]}
    beside = out.with_suffix(".md")
    texts = {out: json.dumps(record, indent=1) + "\n", beside: markdown(about, jobs, titles)}
    for file, text in texts.items():
        begun = file.with_name(file.name + ".begun")
        begun.write_text(text)
        begun.replace(file)
    return beside


def markdown(about: Mapping[str, Any], jobs: list[Job], titles: Mapping[str, str]) -> str:
    """The report for people."""
    lines = ["# On a GPU", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    verdicts = [row.ok for job in jobs for row in job.rows if row.ok is not None]
    failed = sum(job.error is not None for job in jobs)
    lines.append(f"{sum(verdicts)} of {len(verdicts)} targets met, {failed} jobs failed.")
    lines += ["", *(f"- {fault}" for fault in faults(jobs))]
    for part, title in titles.items():
        mine = [job for job in jobs if job.part == part]
        if not mine:
            continue
        seconds = sum(job.seconds for job in mine)
        lines += ["", f"## {part}: {title}", "", f"{seconds:.0f} s of {len(mine)} jobs", ""]
        lines += _tables([row for job in mine for row in job.rows])
        for job in mine:
            if job.error is not None:
                lines += [f"{job.name} failed:", "", "```", job.error.strip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _tables(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    for table in dict.fromkeys(row.table for row in rows):
        mine = [row for row in rows if row.table == table]
        columns = list(dict.fromkeys(name for row in mine for name in row.cells))
        lines += [f"### {table}", "", "| | " + " | ".join([*columns, "target", "met"]) + " |"]
        lines.append("|---" * (len(columns) + 3) + "|")
        for row in mine:
            cells = [show(row.cells[name]) if name in row.cells else "" for name in columns]
            met = {None: "", True: "yes", False: "**no**"}[row.ok]
            lines.append("| " + " | ".join([row.name, *cells, row.target, met]) + " |")
        lines.append("")
    return lines

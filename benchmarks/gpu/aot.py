"""Compiles every Triton kernel for every target ahead of time; no GPU is needed.

    python benchmarks/gpu/aot.py [--only TEXT] [--target T] [--write] [--table FILE] [--cases DIR]

Compiles the cases of benchmarks/gpu/aot_cases, one process each, and prints registers, bytes of
shared memory, bytes spilled and whether ptxas serializes wgmma (1) beside what aot_table.json
holds. The exit code is 1 where a case does not compile, spills more than the table says, is
serialized but not in the table, takes more shared memory than its target has, or is missing on
either side. `--write` writes the table instead of comparing with it (sizes beyond a
target's remain faults), `--only` takes the cases whose name has the text. Needs torch and triton
3.6 or later, and nothing installed of Octavo. The table is of Triton 3.7.1, that of the CI: under
3.6.0 five cases of attention spill up to 40 bytes more.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory that a program may take, by target."""

FIGURES = ("registers", "shared", "spilled", "serialized")
Figures = dict[str, int]
Table = dict[str, dict[str, Figures]]
"""The figures by case and target; what is not serialized has no such figure."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One compilation: a case for a target."""

    case: Any
    target: str


def load_cases(folder: Path) -> list[Any]:
    """The cases of every module of a folder, in the order of their files."""
    cases: list[Any] = []
    for file in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"aot_cases.{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        cases += module.CASES
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SystemExit(f"Case names must be unique: rename one of each of {twice}")
    return cases


def compile_unit(unit: Unit, pipe: Connection) -> None:
    """Send the unit's figures, or why there are none; runs in a process of its own."""
    measure = importlib.import_module("aot_compile").measure
    try:
        pipe.send(measure(unit.case, unit.target))
    except Exception:
        pipe.send(traceback.format_exc())


def compile_all(units: list[Unit], num_processes: int) -> Iterator[tuple[Unit, Figures | str]]:
    """Each unit with its figures or what failed, as they come.

    Every unit has its own process, so that a crash of the compiler is the failure of one unit.
    """
    context = get_context("fork")  # kernels are not picklable, and torch is loaded once
    queue = units[::-1]
    running: dict[Connection, tuple[Unit, BaseProcess]] = {}
    while queue or running:
        while queue and len(running) < num_processes:
            unit = queue.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=compile_unit, args=(unit, sender))
            process.start()
            sender.close()
            running[receiver] = unit, process
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            unit, process = running.pop(ready)
            try:
                result: Figures | str = ready.recv()
            except EOFError:
                process.join()
                result = f"the compiler crashed (exit code {process.exitcode})"
            process.join()
            yield unit, result


def faults_of(unit: Unit, result: Figures | str, known: Figures | None) -> list[str]:
    """What is wrong with a result; `known` is the table's entry."""
    where = f"{unit.case.name}, {unit.target}"
    if isinstance(result, str):
        return [f"{where}: does not compile:\n{result}"]
    faults = []
    limit = SHARED_LIMITS[unit.target]
    if result["shared"] > limit:
        faults.append(f"{where}: {result['shared']} bytes of shared memory, of at most {limit}")
    if known is None:
        faults.append(f"{where}: not in the table: check its figures, then run with --write")
    elif result["spilled"] > known["spilled"]:
        faults.append(f"{where}: spills {result['spilled']} bytes, in the table {known['spilled']}")
    if known is not None and result.get("serialized", 0) > known.get("serialized", 0):
        faults.append(f"{where}: ptxas serializes wgmma, in the table it does not")
    return faults


def row_of(unit: Unit, result: Figures | str, known: Figures | None) -> str:
    """A line of the printed table; figures that differ from the known ones show both."""
    cells = []
    for name in FIGURES:
        if isinstance(result, str):
            cells.append("failed")
            continue
        value = result.get(name, 0)
        before = value if known is None else known.get(name, 0)
        cells.append(str(value) if before == value else f"{before}->{value}")
    return f"{unit.case.name:48} {unit.target:7}" + "".join(f" {cell:>14}" for cell in cells)


def targets_of(case: Any, only: str | None) -> list[str]:
    """The targets that a case is compiled for in this run."""
    targets = case.targets or tuple(SHARED_LIMITS)
    return [t for t in targets if only in (None, t)]


def missing_cases(cases: list[Any], table: Table) -> list[str]:
    """Entries of the table that no case stands for."""
    targets = {case.name: targets_of(case, None) for case in cases}
    return [
        f"{name}, {target}: in the table, but no such case: run with --write"
        for name, entries in table.items()
        for target in entries
        if target not in targets.get(name, ())
    ]


def write_table(file: Path, cases: list[Any], old: Table, new: Table) -> None:
    """Write new figures over the old ones of the cases that there still are."""
    merged: Table = {}
    for case in cases:
        entries = old.get(case.name, {}) | new.get(case.name, {})
        kept = {t: entries[t] for t in targets_of(case, None) if t in entries}
        if kept:
            merged[case.name] = kept
    lines = []
    for name, entries in merged.items():
        inner = ",\n".join(f"    {json.dumps(t)}: {json.dumps(f)}" for t, f in entries.items())
        lines.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the cases to compile")
    parser.add_argument("--target", choices=SHARED_LIMITS, help="the one target to compile for")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--table", type=Path, default=HERE / "aot_table.json")
    parser.add_argument("--cases", type=Path, default=HERE / "aot_cases", help="folder of cases")
    return parser.parse_args()


def main() -> int:
    """Compile, print, compare or write."""
    args = parse_arguments()
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it compiles nothing
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    importlib.import_module("aot_compile")
    cases = load_cases(args.cases)
    table: Table = json.loads(args.table.read_text()) if args.table.is_file() else {}
    units = [
        Unit(case, target)
        for case in cases
        if args.only in case.name
        for target in targets_of(case, args.target)
    ]
    if not units:
        print(f"No case has {args.only!r} in its name", file=sys.stderr)
        return 1

    faults = [] if args.write else missing_cases(cases, table)
    found: Table = {}
    began = time.perf_counter()
    print(f"{'case':48} target " + "".join(f" {name:>14}" for name in FIGURES))
    for count, (unit, result) in enumerate(compile_all(units, os.cpu_count() or 1), 1):
        known = table.get(unit.case.name, {}).get(unit.target)
        print(row_of(unit, result, known), flush=True)
        if sys.stderr.isatty():
            print(f"{count}/{len(units)}", end="\r", file=sys.stderr, flush=True)
        if not isinstance(result, str):
            found.setdefault(unit.case.name, {})[unit.target] = result
            known = result if args.write else known
        faults += faults_of(unit, result, known)
    if args.write:
        write_table(args.table, cases, table, found)
    took = time.perf_counter() - began
    print(f"{len(units)} compiled in {took:.0f} s, {len(faults)} faults", file=sys.stderr)
    print("".join(f"{fault}\n" for fault in faults), end="", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

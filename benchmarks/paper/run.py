"""The figures of the PagedAttention paper (Kwon et al., SOSP 2023) from our own scheduler.

    python benchmarks/paper/run.py --quick [--data DIR] [--json]
    python benchmarks/paper/run.py [--data DIR] [--out docs]

The real scheduler and KV manager serve the paper's traces in simulated time; its baselines are
other allocation policies behind the same scheduler (policies.py); a step takes what cost.py says.
`--quick` takes traces of five minutes of the smallest model, under a minute on two cores, and
prints the tables; without it traces last as long as the paper's, and docs/paper.md and its plots
are written (needs matplotlib: benchmarks/paper/requirements.txt). The exit code is 1 where a target
is missed. Counts and simulated seconds: the same on every machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import report
import workload
from figures import FULL, QUICK, Paper, Results
from tasks import Scale, Task

from octavo.config import available_cpus

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def run_task(task: Task, scale: Scale) -> tuple[Any, float]:
    """A task's result and the seconds that it took; runs in a process of the pool."""
    began = time.perf_counter()
    return task.run(scale), time.perf_counter() - began


def run_all(tasks: list[Task], scale: Scale, num_processes: int) -> Results:
    """Run the tasks, telling on stderr what is done."""
    began = time.perf_counter()
    results: Results = {}
    with ProcessPoolExecutor(num_processes) as pool:
        task_of = {pool.submit(run_task, task, scale): task for task in tasks}
        for future in as_completed(task_of):
            task = task_of[future]
            results[task], took = future.result()
            passed = time.perf_counter() - began
            print(
                f"[{passed:5.0f} s] {len(results)}/{len(tasks)} {task.label} ({took:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
    return results


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tables alone, under a minute")
    parser.add_argument("--data", type=pathlib.Path, help="folder with prompts/ and traces/")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs")
    parser.add_argument("--processes", type=int, default=available_cpus())
    parser.add_argument("--json", action="store_true", help="claims as JSON on stdout")
    options = parser.parse_args()
    if not options.quick and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("plots need matplotlib: pip install -r benchmarks/paper/requirements.txt")
    datasets = workload.load(options.data) if options.data else workload.synthetic()
    scale = QUICK if options.quick else FULL
    paper = Paper(datasets, scale)
    results = run_all(paper.tasks(), scale, options.processes)
    claims = paper.claims(results)
    print(json.dumps(report.as_records(claims)) if options.json else report.text_table(claims))
    if not options.quick:
        figures = {"claims": report.as_records(claims), "tasks": report.task_records(results)}
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "paper" / "figures.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(figures) + "\n")
        subprocess.run([sys.executable, HERE / "plots.py", path], check=True)
        (options.out / "paper.md").write_text(report.document(claims, bool(options.data)))
    missed = [claim for claim in claims if claim.is_missed]
    for claim in missed:
        print(f"MISSED: figure {claim.figure}, {claim.subject}: {claim.ours:.2f}", file=sys.stderr)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()

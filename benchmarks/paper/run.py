"""The figures of the PagedAttention paper (Kwon et al., SOSP 2023) from our own scheduler.

    python benchmarks/paper/run.py --quick [--data DIR] [--json]
    python benchmarks/paper/run.py [--data DIR] [--out DIR] [--keep FILE]

The real scheduler and KV manager serve the paper's traces in simulated time; its baselines are
other allocation policies behind the same scheduler (policies.py); a step takes what cost.py says.
`--quick` takes five minutes' traces of the smallest model, under a minute on two idle cores, and
prints the tables. Without it traces last as long as the paper's, some 20 minutes on two idle cores,
and docs/paper.md and its plots are written (benchmarks/paper/requirements.txt); with `--keep` each
result is appended to a file, and those in it are not computed again. The exit code is 1 where a
target is missed. What is simulated is the same on every machine.
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

import report
import workload
from claims import Claim
from figures import FULL, LATENCY, QUICK, Paper, Results
from tasks import Record, Scale, Task

from octavo.config import available_cpus

HERE = pathlib.Path(__file__).parent


def run_task(task: Task, scale: Scale) -> tuple[Record, float]:
    """A task's result and the seconds that it took; runs in a process of the pool."""
    began = time.perf_counter()
    return task.run(scale), time.perf_counter() - began


def run_all(tasks: list[Task], scale: Scale, num_processes: int, keep: pathlib.Path) -> Results:
    """Run the tasks whose results are not in the file `keep` yet, and tell on stderr what is done.

    The file gets each result as a line.
    """
    began = time.perf_counter()
    lines = keep.read_text().splitlines() if keep.is_file() else []
    results: Results = {record["label"]: record for record in map(json.loads, lines)}
    tasks = [task for task in tasks if task.label not in results]
    with ProcessPoolExecutor(num_processes) as pool, keep.open("a") as file:
        futures = [pool.submit(run_task, task, scale) for task in tasks]
        for count, future in enumerate(as_completed(futures), 1):
            record, took = future.result()
            results[record["label"]] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            told = f"[{time.perf_counter() - began:5.0f} s] {count}/{len(tasks)} {record['label']}"
            print(f"{told} ({took:.1f} s)", file=sys.stderr, flush=True)
    return results


def write_documents(
    claims: list[Claim], records: list[Record], folder: pathlib.Path, data: str
) -> None:
    """FOLDER/paper.md, and FOLDER/paper/ with the figures' numbers and pictures."""
    path = folder / "paper" / "figures.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"claims": report.as_records(claims), "records": records}) + "\n")
    subprocess.run([sys.executable, HERE / "plots.py", path], check=True)
    (folder / "paper.md").write_text(report.document(claims, data, LATENCY))


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tables alone, under a minute")
    parser.add_argument("--data", type=pathlib.Path, help="folder with prompts/ and traces/")
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parents[1] / "docs")
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("/dev/null"))
    parser.add_argument("--processes", type=int, default=available_cpus())
    parser.add_argument("--json", action="store_true", help="claims as JSON on stdout")
    options = parser.parse_args()
    if not options.quick and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("plots need matplotlib: pip install -r benchmarks/paper/requirements.txt")
    datasets = workload.load(options.data) if options.data else workload.synthetic()
    scale = QUICK if options.quick else FULL
    paper = Paper(datasets, scale)
    results = run_all(paper.tasks(), scale, options.processes, options.keep)
    claims = paper.claims(results)
    print(json.dumps(report.as_records(claims)) if options.json else report.text_table(claims))
    if not options.quick:
        data = "lengths of the data folder" if options.data else "fitted lengths"
        write_documents(claims, list(results.values()), options.out, data)
    missed = [claim for claim in claims if claim.is_missed]
    for claim in missed:
        print(f"MISSED: figure {claim.figure}, {claim.subject}: {claim.ours:.2f}", file=sys.stderr)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()

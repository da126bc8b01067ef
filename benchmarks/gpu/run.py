"""Everything that is checked and measured on a machine with a GPU, in less than eight minutes.

    python benchmarks/gpu/run.py [--part A,B] [--out FILE] [--quick] [--model FILE.gguf]

A: every kernel against torch alone, the bytes of deterministic mode, captured steps, steps begun
before the last one ended. B: text beside the reference backend. C: prefill, decode and attention
against the floor. D: continuous batching over KV blocks beside static batches. E: start to first
token. F: what deterministic mode costs.

Runs from a plain checkout and needs Python, numpy, torch and Triton. Each job has a process of its
own, so that a fault of the device ends with it and its memory is free for the next; checks run
side by side, and so do short runs of the timed parts, which fill Triton's cache; what is timed
runs alone. `--device cpu --quick` runs tiny sizes in this process, to test the script.

Exit code 1 if a check fails, a target is missed or a job does not come to its end.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
TITLES = {
    "A": "operators against torch alone",
    "B": "text against the reference",
    "C": "speed against the floor",
    "D": "paging and continuous batching against static batches",
    "E": "start to first token",
    "F": "the cost of deterministic mode",
}
KINDS = ("dense", "grouped", "quantized")
CHECK_SECONDS = 120
TOTAL_SECONDS = 460
"""After which no job goes on; the report is written then."""


@dataclass(frozen=True, slots=True)
class Task:
    """A job: a function of a module in parts/, called with the setup, a recorder and arguments.

    Attributes:
        name: of the job, "C 8B".
        seconds: the most that it may take.
        is_timed: it runs alone.
        has_kernels: a short run beforehand fills Triton's cache for it.
    """

    name: str
    module: str
    seconds: int
    arguments: tuple[Any, ...] = ()
    is_timed: bool = True
    has_kernels: bool = True

    @property
    def part(self) -> str:
        """The letter."""
        return self.name[0]


def check(name: str, module: str, *arguments: Any) -> Task:
    """A job that times nothing."""
    return Task(name, module, CHECK_SECONDS, arguments, is_timed=False)


TASKS = (
    check("A rows", "check_rows"),
    check("A cache", "check_cache"),
    *(check(f"A attention {n + 1}", "check_attention", n, 4) for n in range(4)),
    check("A deterministic attention", "check_attention_bytes"),
    *(check(f"A {kind} products", "check_linear", kind) for kind in KINDS),
    check("A sampling", "check_sampling"),
    check("A programs", "check_programs"),
    check("B text", "text"),
    Task("C attention", "speed_attention", 45),
    Task("C attention tiles", "attention_tiles", 20),
    Task("C 7B", "speed", 40, ((("Llama-7B", "bf16"),),)),
    Task("C 8B", "speed", 55, ((("Llama-3.1-8B", "bf16"), ("Llama-3.1-8B", "fp8")),)),
    Task("C 13B", "speed", 45, ((("Llama-13B", "bf16"),),)),
    Task("C 70B", "speed", 75, ((("Llama-3.1-70B", "fp8"), ("Llama-3.1-70B", "int4")),)),
    Task("E start", "startup", 60, has_kernels=False),
    Task("F modes", "modes", 45),
    Task("D 7B", "paging", 65, ("Llama-7B",)),
    Task("D 13B", "paging", 65, ("Llama-13B",)),
    Task("D transformers", "others", 45, ("Llama-7B",), has_kernels=False),
)


def perform(task: Task, setup: Any, file: Path | None) -> Any:
    """Do a job here; returns its record."""
    record = importlib.import_module("parts.record")
    recorder = record.Recorder(file)
    job = record.Job(task.part, task.name, recorder.rows)
    began = time.perf_counter()
    try:
        importlib.import_module(f"parts.{task.module}").run(setup, recorder, *task.arguments)
    except Exception:
        job.error = traceback.format_exc()
        print(f"FAILED {task.name}: {job.error}", flush=True)
    job.seconds = time.perf_counter() - began
    return job


def setup_of(args: argparse.Namespace, warm: bool = False) -> Any:
    """What the parts are told."""
    torch = importlib.import_module("torch")
    machine = importlib.import_module("parts.machine")
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny sizes: threads would only wait for each other
    if device.type == "cuda":
        device = importlib.import_module("octavo.backends.torch.device").open_device(args.device)
    return machine.Setup(device, args.quick, args.kernels, args.model, warm)


class Children:
    """Jobs in processes of their own; what they report is read from files."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        """None of them goes on after the deadline."""
        self._args = args
        self._deadline = deadline
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-gpu-"))
        self._count = 0

    def start(self, task: Task, warm: bool = False) -> Callable[[], Any]:
        """Start one; returns what waits for its record."""
        self._count += 1
        file = self._folder / f"{self._count}.jsonl"
        command = [sys.executable, str(HERE / "run.py"), "--child", task.name]
        command += ["--rows", str(file), "--device", self._args.device]
        command += ["--kernels", self._args.kernels]
        command += ["--quick"] if self._args.quick else []
        command += ["--warm"] if warm else []
        command += ["--model", str(self._args.model)] if self._args.model else []
        errors = file.with_suffix(".err")
        with errors.open("w") as stream:
            output = subprocess.DEVNULL if warm else None
            process = subprocess.Popen(command, stdout=output, stderr=stream)
        return functools.partial(self._wait, task, process, file, time.monotonic(), warm)

    def close(self) -> None:
        """Remove their files."""
        shutil.rmtree(self._folder)

    def _wait(self, task: Task, process: Any, file: Path, began: float, warm: bool) -> Any:
        record = importlib.import_module("parts.record")
        end = min(began + task.seconds, self._deadline)
        error = None
        try:
            code = process.wait(timeout=max(0.1, end - time.monotonic()))
            if code:
                said = file.with_suffix(".err").read_text()[-6000:]
                error = f"exit code {code}\n{said}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            error = f"stopped after {time.monotonic() - began:.0f} s, its limit"
        took = file.with_suffix(".seconds")
        seconds = float(took.read_text()) if took.exists() else time.monotonic() - began
        job = record.Job(task.part, task.name, record.read_rows(file), seconds, error)
        if error is not None:
            print(f"FAILED {task.name}{' (short run)' * warm}: {error}", flush=True)
        return job


def run_apart(tasks: list[Task], args: argparse.Namespace, deadline: float) -> list[Any]:
    """Checks and short runs side by side, then what is timed, one after another."""
    children = Children(args, deadline)
    checks = [children.start(task) for task in tasks if not task.is_timed]
    warming = []
    if args.device != "cpu" and not args.quick:
        warming = [children.start(t, warm=True) for t in tasks if t.is_timed and t.has_kernels]
    jobs = [wait() for wait in checks]
    for wait in warming:
        wait()
    for task in tasks:
        if task.is_timed:
            print(f"== {task.name}, {deadline - time.monotonic():.0f} s left", flush=True)
            jobs.append(children.start(task)())
    children.close()
    return jobs


def run_here(tasks: list[Task], args: argparse.Namespace) -> list[Any]:
    """All in this process."""
    setup = setup_of(args)
    return [perform(task, setup, None) for task in tasks]


def child(args: argparse.Namespace) -> int:
    """Do one job; its rows go to a file, what fails to standard error."""
    (task,) = [task for task in TASKS if task.name == args.child]
    job = perform(task, setup_of(args, args.warm), args.rows)
    args.rows.with_suffix(".seconds").write_text(str(job.seconds))
    if job.error is not None:
        print(job.error, file=sys.stderr)
    return int(job.error is not None)


def about(args: argparse.Namespace) -> dict[str, str]:
    """What the report says of the machine; asked in a process that ends with it.

    Raises:
        SystemExit: there is no such device.
    """
    if args.device == "cpu":
        return {**stamp(), **importlib.import_module("parts.machine").describe(setup_of(args))}
    script = (
        "import json, sys; sys.path[:0] = sys.argv[1:3]; "
        "from parts.machine import Setup, describe; "
        "from octavo.backends.torch.device import open_device; "
        "print(json.dumps(describe(Setup(open_device(sys.argv[3])))))"
    )
    paths = [str(HERE.parents[1]), str(HERE)]
    command = [sys.executable, "-c", script, *paths, args.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1].partition(": ")[2])
    return {**stamp(), **json.loads(done.stdout)}


def stamp() -> dict[str, str]:
    """When, and by which Python."""
    return {"date": datetime.date.today().isoformat(), "python": sys.version.split()[0]}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", default=",".join(TITLES), help="letters, such as A,B")
    parser.add_argument("--out", type=Path, help="the JSON file; .md is written beside it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--model", type=Path, help="a GGUF file whose text is compared in part B")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --quick")
    parser.add_argument("--kernels", default="auto", choices=("auto", "plain", "triton"))
    for name in ("--child", "--rows"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows = None if args.rows is None else Path(args.rows)
    args.parts = args.part.upper().split(",")
    if unknown := set(args.parts) - {*TITLES}:
        parser.error(f"there is no part {sorted(unknown)}; the parts are {', '.join(TITLES)}")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu computes tiny sizes alone: add --quick")
    return args


def main() -> int:
    """Run the parts and write the report."""
    args = parse_arguments()
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    if args.child is not None:
        return child(args)
    record = importlib.import_module("parts.record")
    began = time.monotonic()
    tasks = [task for task in TASKS if task.part in args.parts]
    facts = about(args)
    print("  ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    if args.device == "cpu":
        jobs = run_here(tasks, args)
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        jobs = run_apart(tasks, args, began + TOTAL_SECONDS)
    facts["took"] = f"{time.monotonic() - began:.0f} s"
    name = f"gpu-{facts['date']}-{'-'.join(args.parts)}.json"
    out = args.out or RESULTS / name
    beside = record.write(out, facts, jobs, TITLES)
    code = record.exit_code(jobs)
    print("".join(f"{fault}\n" for fault in record.faults(jobs)), end="")
    print(f"{facts['took']}; {out} and {beside.name}; {'something failed' if code else 'all met'}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

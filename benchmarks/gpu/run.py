"""Everything that is checked and measured on a machine with a GPU, in less than eight minutes.

    python benchmarks/gpu/run.py [--part A,B] [--out FILE] [--quick] [--model FILE.gguf]

A: every kernel against torch alone, the bytes of deterministic mode, captured steps, steps begun
before the last one ended. B: text beside the reference backend. C: prefill, decode, attention and
sampling, against the floor where there is one. D: continuous batching over KV blocks beside static
batches. E: start to first token. F: what deterministic mode costs.

Runs from a plain checkout and needs Python, numpy, torch and Triton. Each job has a process of its
own, so that a fault of the device ends with it and its memory is free for the next; checks run
side by side, and so do short runs of the timed parts, which fill Triton's cache; what is timed
runs alone. `--device cpu --quick` runs tiny sizes in this process, to test the script.

The report is written anew after each job, so that a cut loses the jobs that are not done, no more.
On a lent machine give a folder that comes back, and keep the log, which has the rows of the job
that was cut:

    python benchmarks/gpu/run.py --out FOLDER/gpu.json > FOLDER/gpu.log 2>&1

Exit code 1 if a check fails, a target is missed or a job does not come to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
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
KINDS = ("dense", *(f"grouped {n}" for n in range(1, 7)), "quantized")
CHECK_SECONDS = 170
"""Of a check or a short run: most of it compiles, with a cold cache about 1000 s over all."""
TOTAL_SECONDS = 460
"""After which no job goes on."""
ANSWER_SECONDS = 90
"""In which the device must say what it is; torch may have to come from a cold disk."""
THREADS = "2"
"""Of torch, for each of the jobs that run side by side."""


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
    check("A weights", "check_weights"),
    *(check(f"A attention {n + 1}", "check_attention", n, 8) for n in range(8)),
    check("A long attention", "check_attention_long"),
    *(check(f"A deterministic attention {n + 1}", "check_attention_bytes", n, 3) for n in range(3)),
    *(check(f"A {kind} products", "check_linear", kind) for kind in KINDS),
    check("A sampling", "check_sampling"),
    check("A programs", "check_programs"),
    check("B text", "text"),
    Task("C attention", "speed_attention", 45),
    Task("C attention tiles", "attention_tiles", 20),
    Task("C 8B bf16", "speed", 40, ("Llama-3.1-8B", "bf16")),
    Task("C 8B fp8", "speed", 40, ("Llama-3.1-8B", "fp8")),
    Task("C 7B bf16", "speed", 40, ("Llama-7B", "bf16")),
    Task("C 13B bf16", "speed", 45, ("Llama-13B", "bf16")),
    Task("C 70B fp8", "speed", 50, ("Llama-3.1-70B", "fp8")),
    Task("C 70B int4", "speed", 50, ("Llama-3.1-70B", "int4")),
    Task("C sampling", "speed_sampling", 25),
    Task("E start", "startup", 85, has_kernels=False),
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
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, task: Task, warm: bool = False) -> Callable[[], Any]:
        """Start one; returns what waits for its record."""
        file = self._folder / f"{len(self._processes)}.jsonl"
        command = [sys.executable, str(HERE / "run.py"), "--child", task.name]
        command += ["--rows", str(file), "--device", self._args.device]
        command += ["--kernels", self._args.kernels]
        command += ["--quick"] if self._args.quick else []
        command += ["--warm"] if warm else []
        command += ["--model", str(self._args.model)] if self._args.model else []
        environment = dict(os.environ)
        if warm or not task.is_timed:
            environment["OMP_NUM_THREADS"] = THREADS
        with file.with_suffix(".err").open("w") as stream:
            output = subprocess.DEVNULL if warm else None
            process = subprocess.Popen(
                command, stdout=output, stderr=stream, env=environment, start_new_session=True
            )
        self._processes.append(process)
        return functools.partial(self._wait, task, process, file, time.monotonic(), warm)

    def close(self) -> None:
        """End those that nobody has waited for; remove the files."""
        for process in self._processes:
            if process.poll() is None:
                end(process)
        shutil.rmtree(self._folder)

    def _wait(self, task: Task, process: Any, file: Path, began: float, warm: bool) -> Any:
        record = importlib.import_module("parts.record")
        last = min(began + task.seconds, self._deadline)
        errors = file.with_suffix(".err")
        error = None
        try:
            code = process.wait(timeout=max(0.1, last - time.monotonic()))
            if code:
                error = f"exit code {code}\n{errors.read_text()[-6000:]}"
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {time.monotonic() - began:.0f} s, its limit"
            ask_where(process)
            end(process)
            error = f"{errors.read_text()[-6000:]}\n{stopped}"
        took = file.with_suffix(".seconds")
        seconds = float(took.read_text()) if took.exists() else time.monotonic() - began
        job = record.Job(task.part, task.name, record.read_rows(file), seconds, error)
        if error is not None:
            print(f"FAILED {task.name}{' (short run)' * warm}: {error}", flush=True)
        return job


def ask_where(process: subprocess.Popen[bytes]) -> None:
    """Have a job write where each of its threads stands (see `child`), if it still can."""
    process.send_signal(signal.SIGUSR1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a job and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # A driver may hold it; go on without.
        process.wait(timeout=10)


def run_apart(
    tasks: list[Task], args: argparse.Namespace, deadline: float, save: Callable[[list[Any]], Any]
) -> list[Any]:
    """Checks and short runs side by side, then what is timed, one after another.

    `save` is given the records of all jobs that are done, after each of them.
    """
    jobs: list[Any] = []
    children = Children(args, deadline)
    try:
        checks = [children.start(task) for task in tasks if not task.is_timed]
        warming = []
        if args.device != "cpu" and not args.quick:
            short = [replace(task, seconds=CHECK_SECONDS) for task in tasks if task.has_kernels]
            warming = [children.start(task, warm=True) for task in short if task.is_timed]
        for wait in checks:
            jobs.append(wait())
            save(jobs)
        for wait in warming:
            wait()
        for task in tasks:
            if task.is_timed:
                print(f"== {task.name}, {deadline - time.monotonic():.0f} s left", flush=True)
                jobs.append(children.start(task)())
                save(jobs)
    finally:
        children.close()
    return jobs


def run_here(tasks: list[Task], args: argparse.Namespace) -> list[Any]:
    """All in this process."""
    setup = setup_of(args)
    return [perform(task, setup, None) for task in tasks]


def child(args: argparse.Namespace) -> int:
    """Do one job; its rows go to a file, what fails to standard error.

    Asked by a signal, it writes there where it stands, even while it waits for the device.
    """
    faulthandler.register(signal.SIGUSR1)
    (task,) = [task for task in TASKS if task.name == args.child]
    job = perform(task, setup_of(args, args.warm), args.rows)
    args.rows.with_suffix(".seconds").write_text(str(job.seconds))
    if job.error is not None:
        print(job.error, file=sys.stderr)
    return int(job.error is not None)


def about(args: argparse.Namespace) -> dict[str, str]:
    """What the report says of the machine; asked in a process that ends with it.

    Raises:
        SystemExit: there is no such device, or it does not answer.
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
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{args.device} has not answered in {ANSWER_SECONDS} s") from None
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


def stop(*_: Any) -> None:
    """At a signal: raise, so that the jobs are ended too."""
    sys.exit(143)


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
    out = args.out or RESULTS / f"gpu-{facts['date']}-{'-'.join(args.parts)}.json"

    def save(jobs: list[Any]) -> None:
        facts["took"] = f"{time.monotonic() - began:.0f} s"
        facts["jobs"] = f"{len(jobs)} of {len(tasks)} done"
        record.write(out, facts, jobs, TITLES)

    if args.device == "cpu":
        jobs = run_here(tasks, args)
        save(jobs)
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        signal.signal(signal.SIGTERM, stop)
        jobs = run_apart(tasks, args, began + TOTAL_SECONDS, save)
    code = record.exit_code(jobs)
    print("".join(f"{fault}\n" for fault in record.faults(jobs)), end="")
    print(f"{facts['took']}; {out} and .md; {'something failed' if code else 'all met'}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

"""What benchmarks/gpu/run.py reports and by which exit code, on torch's CPU device."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
BLOCKED = """
import importlib.abc, runpy, sys

ABSENT = {"msgspec", "jinja2", "tokenizers", "httptools", "uvicorn", "huggingface_hub"}


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        is_extension = name.startswith("octavo.") and name.endswith("_native")
        if name.partition(".")[0] in ABSENT or is_extension:
            raise ImportError(f"{name} is not there on a machine with a GPU")


sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


HOLD = """
import fcntl, pathlib, sys, time

lock = pathlib.Path(sys.argv[1])
begun = lock.with_suffix(".begun")
stream = begun.open("w")
fcntl.flock(stream, fcntl.LOCK_EX)
begun.rename(lock)
time.sleep(60)
"""
STUB = f"""
import importlib.util, os, pathlib, subprocess, sys, time, types

LOCK = pathlib.Path(__file__).with_name("lock")
spec = importlib.util.spec_from_file_location("gpu_run", {str(FOLDER / "run.py")!r})
script = importlib.util.module_from_spec(spec)
sys.modules["gpu_run"] = script
spec.loader.exec_module(script)
script.setup_of = lambda *args: None


def wait_for_the_device():
    time.sleep(60)


def run(setup, recorder, kind):
    recorder.add("t", "n", {{"threads": os.environ["OMP_NUM_THREADS"]}}, ok=True)
    if kind == "slow":
        subprocess.Popen([sys.executable, "-c", {HOLD!r}, str(LOCK)])
        wait_for_the_device()
    if kind == "bad":
        raise RuntimeError("the device is gone")


module = sys.modules["parts.stub"] = types.ModuleType("parts.stub")
module.run = run
names = ("A good", "A slow", "C slow", "C bad")
script.TASKS = [script.Task(name, "stub", 9, (name[2:],)) for name in names]
sys.exit(script.main())
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script where only Python, numpy, torch and Triton can be imported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for name in ("PYTHONPATH", "TRITON_INTERPRET"):
        environment.pop(name, None)
    command = [sys.executable, "-P", "-c", BLOCKED, str(FOLDER / "run.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the script, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"parts.{name}")


def test_report_of_all_parts_but_the_start(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = run(tmp_path, "--device", "cpu", "--quick", "--part", "A,B,C,D,F", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    jobs = {job["name"]: job for job in report["jobs"]}
    assert {name[0] for name in jobs} == set("ABCDF")
    assert all(job["error"] is None and job["rows"] for job in jobs.values())
    verdicts: dict[str, set[bool | None]] = {part: set() for part in "ABCDF"}
    for job in jobs.values():
        verdicts[job["part"]] |= {row["ok"] for row in job["rows"]}
    assert verdicts == {"A": {True}, "B": {True}, "C": {None}, "D": {None}, "F": {None}}
    tables = {row["table"] for job in jobs.values() for row in job["rows"]}
    assert {"Rows", "Cache", "Attention", "Products", "Sampling", "Programs"} <= tables
    decode = [row for job in jobs.values() for row in job["rows"] if row["table"] == "Decode"]
    assert len(decode) == 12
    assert all(row["cells"]["tok/s"] > 0 for row in decode)
    text = out.with_suffix(".md").read_text()
    assert "## C: speed against the floor" in text
    assert "0 jobs failed" in text


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", "--quick", "--part", "A,Z")
    assert done.returncode == 2
    assert "there is no part ['Z']" in done.stderr


@pytest.fixture
def script(parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """run.py, whose jobs are those of STUB, in processes that import no torch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = import_script(monkeypatch)
    (tmp_path / "run.py").write_text(STUB)
    monkeypatch.setattr(script, "HERE", tmp_path)
    return script


def apart(script: Any, tasks: list[Any], save: Any) -> dict[str, Any]:
    """The records of tasks, by name."""
    args = SimpleNamespace(device="cpu", kernels="auto", quick=True, model=None)
    jobs = script.run_apart(tasks, args, script.time.monotonic() + 60, save)
    return {job.name: job for job in jobs}


def is_held(file: Path) -> bool:
    """Whether a process still locks the file, given a moment to end."""
    for _ in range(40):
        with file.open() as stream, contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        time.sleep(0.05)
    return True


def test_jobs_in_processes_of_their_own(parts: Any, script: Any, tmp_path: Path) -> None:
    """What fails and what takes too long is reported, with the rows until then; then all is over.

    That is, the process that the slow one has started too.
    """
    lock = tmp_path / "lock"
    tasks = [
        script.Task("C slow", "stub", 2),
        script.check("A good", "stub"),
        script.Task("C bad", "stub", 9),
    ]
    saved: list[list[str]] = []
    jobs = apart(script, tasks, lambda done: saved.append([job.name for job in done]))
    assert saved == [["A good"], ["A good", "C slow"], ["A good", "C slow", "C bad"]]
    assert {name: len(job.rows) for name, job in jobs.items()} == dict.fromkeys(jobs, 1)
    threads = {name: job.rows[0].cells["threads"] for name, job in jobs.items()}
    assert threads == {"A good": "2", "C slow": "1", "C bad": "1"}
    assert jobs["A good"].error is None
    assert "in wait_for_the_device" in jobs["C slow"].error
    assert jobs["C slow"].error.endswith("its limit")
    assert "the device is gone" in jobs["C bad"].error
    assert parts("record").exit_code(jobs.values()) == 1
    assert lock.exists() and not is_held(lock)


def test_a_run_that_is_cut_ends_its_jobs(script: Any, tmp_path: Path) -> None:
    lock = tmp_path / "lock"

    def cut(jobs: list[Any]) -> None:
        for _ in range(500):
            if lock.exists():
                break
            time.sleep(0.01)
        raise KeyboardInterrupt

    tasks = [script.check(name, "stub") for name in ("A good", "A slow")]
    with pytest.raises(KeyboardInterrupt):
        apart(script, tasks, cut)
    assert lock.exists() and not is_held(lock)


def test_short_runs_have_the_time_of_checks(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compile beside all the checks."""
    started = []

    def start(self: Any, task: Any, warm: bool = False) -> Any:
        started.append((task.name, task.seconds, warm))
        return lambda: task.name

    monkeypatch.setattr(script.Children, "start", start)
    tasks = [
        script.check("A", "m"),
        script.Task("C", "m", 5),
        script.Task("E", "m", 6, (), True, False),
    ]
    args = SimpleNamespace(device="cuda", quick=False)
    assert script.run_apart(tasks, args, 9, len) == ["A", "C", "E"]
    most = script.CHECK_SECONDS
    assert started == [("A", most, False), ("C", most, True), ("C", 5, False), ("E", 6, False)]


def test_a_device_that_does_not_answer(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(script.subprocess, "run", wait)
    with pytest.raises(SystemExit, match="cuda has not answered in 90 s"):
        script.about(SimpleNamespace(device="cuda"))


def test_all_kinds_of_products_are_tasks(parts: Any, script: Any) -> None:
    setup = parts("machine").Setup(torch.device("cpu"), quick=True)
    linear = parts("check_linear")
    kernels = linear.choose_kernels("plain", setup.device)
    assert {*linear.cases(setup, kernels)} == {*script.KINDS}
    assert {*linear.products(setup, kernels)} <= {*script.KINDS}


def import_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)
    spec.loader.exec_module(module)
    return module


def test_exit_code_and_report_of_what_is_missed(parts: Any, tmp_path: Path) -> None:
    record = parts("record")
    met = record.Job("C", "C 7B", [record.Row("Decode", "batch 1", {"tok/s": 1.5}, True, "fast")])
    assert record.exit_code([met]) == 0
    missed = record.Job("C", "C 8B", [record.Row("Decode", "batch 8", {}, False, "faster")])
    failed = record.Job("D", "D 7B", error="Traceback\nRuntimeError: out of memory")
    assert record.exit_code([met, missed]) == record.exit_code([met, failed]) == 1
    text = record.write(tmp_path / "x.json", {}, [met, missed, failed], {"C": "speed", "D": "d"})
    lines = text.read_text().splitlines()
    assert "1 of 2 targets met, 1 jobs failed." in lines
    assert "- C, Decode: batch 8: missed (faster)" in lines
    assert "- D, D 7B: failed: RuntimeError: out of memory" in lines


def test_rows_of_a_file_that_was_cut(parts: Any, tmp_path: Path) -> None:
    record = parts("record")
    file = tmp_path / "rows"
    record.Recorder(file).add("t", "n", {"x": 1}, ok=True)
    with file.open("a") as stream:
        stream.write('{"table": "cut')
    assert record.read_rows(file) == [record.Row("t", "n", {"x": 1}, True)]


def test_rows_beside_one_that_raises(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and the smaller batch fail; the larger batch is measured all the same."""
    speed = parts("speed")
    decode_seconds = speed.decode_seconds

    def fail(*args: Any) -> float:
        raise RuntimeError("out of memory")

    def fail_for_one(setup: Any, model: Any, batch: int, *sizes: int) -> Any:
        return fail() if batch == 1 else decode_seconds(setup, model, batch, *sizes)

    monkeypatch.setattr(speed, "prefill_seconds", fail)
    monkeypatch.setattr(speed, "decode_seconds", fail_for_one)
    recorder = parts("record").Recorder()
    setup = parts("machine").Setup(torch.device("cpu"), quick=True)
    speed.run(setup, recorder, "Llama-7B", "bf16")
    limits, *failed, decode = recorder.rows
    assert limits.ok is decode.ok is None
    assert [row.ok for row in failed] == [False, False]
    assert [row.cells["raised"] for row in failed] == ["RuntimeError: out of memory"] * 2
    assert decode.cells["tok/s"] > 0


def test_one_way_of_serving_beside_one_that_raises(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paging, recorder = parts("paging"), parts("record").Recorder()

    def fail(*args: Any) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(parts("serving").WAYS, "static", fail)
    paging.run(parts("machine").Setup(torch.device("cpu"), quick=True), recorder, "Llama-7B")
    assert [(row.name, row.ok) for row in recorder.rows] == [
        ("static", False),
        ("continuous", None),
    ]


def test_a_first_process_that_takes_too_long(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    startup, recorder = parts("startup"), parts("record").Recorder()
    limits = []

    def start(command: list[str], timeout: float, **_: Any) -> Any:
        limits.append(timeout)
        if len(limits) == 1:
            raise subprocess.TimeoutExpired(command, timeout, stderr=b"compiling")
        now = time.time()
        return SimpleNamespace(returncode=0, stdout=f"{now + 1} {now + 2} {now + 3} {now + 4}")

    monkeypatch.setattr(startup.subprocess, "run", start)
    startup.run(parts("machine").Setup(torch.device("cpu")), recorder)
    assert limits == [45, 28]
    assert [row.ok for row in recorder.rows] == [False, None]
    assert "stopped after 45 s" in recorder.rows[0].cells["raised"]
    assert recorder.rows[1].cells["s to first token"] == pytest.approx(4, abs=0.5)


def test_replays_are_timed_behind_a_head_start(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is kept busy until the host has launched all that is timed."""
    said: list[str] = []
    event = SimpleNamespace(record=lambda: said.append("record"), elapsed_time=lambda _: 8.0)
    stubs = {
        "Event": lambda enable_timing: event,
        "synchronize": lambda device: said.append("wait"),
        "_sleep": lambda cycles: said.append("sleep"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: said.append("replay")),
        "graph": contextlib.nullcontext,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    functions = [lambda: None] * 4
    seconds = parts("machine").captured_seconds(functions, torch.device("cuda"), repeats=1)
    assert said == ["wait", "replay", "wait", "sleep", "record", "replay", "record", "wait"]
    assert seconds == pytest.approx(8e-3 / 4)


def test_a_case_that_is_wrong_is_missed(parts: Any) -> None:
    check, machine = parts("check"), parts("machine")
    recorder = parts("record").Recorder()
    checks = check.Checks(machine.Setup(torch.device("cpu")), recorder, "t")
    one = torch.ones(3)

    def raises() -> float:
        raise RuntimeError("illegal memory access")

    checks.add("equal", lambda: check.error_of(one, one, 1e-9))
    checks.add("off", lambda: check.error_of(one + 2e-3, one, 1e-3))
    checks.add("NaN", lambda: check.error_of(one * torch.nan, one, 1e-3))
    checks.add("bytes", lambda: check.unlike(torch.tensor([0.0]), torch.tensor([-0.0])))
    checks.add("raises", raises)
    assert [row.ok for row in recorder.rows] == [True, False, False, False, False]
    assert "illegal memory access" in recorder.rows[-1].cells["raised"]


def test_text_that_leaves_the_reference_is_a_fault(parts: Any) -> None:
    """The same model but for one weight: no tie excuses what its text becomes."""
    text, machine = parts("text"), parts("machine")
    graph = text.llama(text.Ops(), text.CONFIG)
    weights = text.seeded_weights(graph, "fp32")
    options = text.options_of(machine.Setup(torch.device("cpu")), "fp32", 256)
    exact = text.reference.compile(graph, weights, options)
    other = dict(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    other[name] = text.DenseTensor(weights[name].data * np.float32(2), "f32")
    found = text.compare([text.backend.compile(graph, other, options), exact], 1000, 4, 0.02)
    assert found.faults > 0
    assert found.own_faults > 0
    assert found.error > 0.02


def test_continuous_batching_serves_all_with_few_blocks(parts: Any) -> None:
    """Every token of every answer is sampled once, though some are preempted."""
    serving = parts("serving")
    requests = [serving.Request(20 + n % 30, 10 + n % 25) for n in range(12)]
    sizes = serving.Sizes(num_blocks=14, max_len=128, max_running=6, budget=32, seconds=60)
    plans = serving.Continuous(requests, sizes)
    sampled = before = 0
    while planned := plans.plan():
        assert sum(count for _, count in planned) <= 32
        assert len(plans.running) <= 6
        blocks = [block for sequence in plans.running for block in sequence.blocks]
        assert len(blocks) == len(set(blocks)) <= 14
        batch = plans.batch(planned)
        assert batch.block_tables[0].max() < 14
        owned = [sequence.blocks for sequence, _ in planned]
        for table, mine, length in zip(batch.block_tables[0], owned, batch.seq_lens, strict=True):
            assert len(mine) * 16 >= length
            assert table[: len(mine)].tolist() == mine
        fed_back = -1 - batch.token_ids[batch.token_ids < 0]
        assert len(fed_back) == 0 or fed_back.max() < before
        before = plans.advance(planned)
        assert before == len(batch.logits_rows)
        sampled += before
    assert not plans.running and not plans.waiting
    assert sampled == sum(request.output for request in requests)
    assert plans.preempted > 0


class Instant:
    """A Program whose steps are there at once; each moves the clock by a second."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.now = 0.0

    def start(self, batch: Any, rows: Any) -> Any:
        assert (rows is None) == (len(batch.logits_rows) == 0)
        self.batches.append(batch)
        return SimpleNamespace(result=self.move)

    def move(self) -> None:
        self.now += 1


def test_a_static_batch_is_finished_by_samples(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, steps and time are those of the whole batch, though an eighth of it is computed."""
    serving, program = parts("serving"), Instant()
    monkeypatch.setattr(serving, "time", SimpleNamespace(perf_counter=lambda: program.now))
    requests = [serving.Request(9, output) for output in (3, 90, 41, 200)] * 3
    sizes = serving.Sizes(num_blocks=56, max_len=224, max_running=9, budget=64, seconds=10)
    served = serving.static(program, requests, sizes)
    assert served.tokens == 3 + 90 + 41 + 200
    assert served.steps == served.seconds == 200
    assert served.sequences == 4 * 200
    assert served.measured == len(program.batches) == 11 + -(-189 // 8)
    lengths = [int(batch.seq_lens.max()) for batch in program.batches]
    assert lengths[:12] == [*range(9, 20), 9 + 11 + 4]
    assert max(lengths) < 9 + 200


def test_both_ways_count_the_tokens_of_answers_alone(parts: Any) -> None:
    serving = parts("serving")
    requests = [serving.Request(1 + 5 * n % 40, 1 + 7 * n % 30) for n in range(10)]
    sizes = serving.Sizes(num_blocks=19, max_len=80, max_running=9, budget=64, seconds=60)
    answers = sum(request.output for request in requests)
    programs = {name: Instant() for name in serving.WAYS}
    served = {name: way(programs[name], requests, sizes) for name, way in serving.WAYS.items()}
    assert {name: result.tokens for name, result in served.items()} == dict.fromkeys(
        served, answers
    )
    assert served["static"].steps > served["continuous"].steps
    for batch in programs["static"].batches:  # 19 blocks hold three reservations of 5
        table = batch.block_tables[0]
        assert len(table) <= 3
        assert (np.diff(table, axis=1) == 1).all()
    most = max(len(batch.seq_lens) for batch in programs["continuous"].batches)
    assert most > 3

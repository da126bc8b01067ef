"""What benchmarks/gpu/run.py reports and by which exit code, on torch's CPU device."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
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


def test_jobs_in_processes_of_their_own(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails and one that takes too long are reported, with the rows until then."""
    script = import_script(monkeypatch)
    stub = tmp_path / "run.py"
    stub.write_text(
        "import json, pathlib, sys, time\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "row = {'table': 't', 'name': 'n', 'cells': {'x': 1}, 'ok': True, 'target': ''}\n"
        "pathlib.Path(options['--rows']).write_text(json.dumps(row) + '\\n{\"cut')\n"
        "if options['--child'] == 'C slow': time.sleep(60)\n"
        "if options['--child'] == 'C bad': raise SystemExit('the device is gone')\n"
    )
    monkeypatch.setattr(script, "HERE", tmp_path)
    args = SimpleNamespace(device="cpu", kernels="auto", quick=False, model=None)
    tasks = [
        script.Task("C slow", "m", 2),
        script.check("A good", "m"),
        script.Task("C bad", "m", 9),
    ]
    jobs = {job.name: job for job in script.run_apart(tasks, args, script.time.monotonic() + 60)}
    assert {name: len(job.rows) for name, job in jobs.items()} == dict.fromkeys(jobs, 1)
    assert jobs["A good"].error is None
    assert "its limit" in jobs["C slow"].error
    assert "the device is gone" in jobs["C bad"].error
    assert parts("record").exit_code(jobs.values()) == 1


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
    """A Program whose steps are there at once."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def start(self, batch: Any, rows: Any) -> Any:
        assert (rows is None) == (len(batch.logits_rows) == 0)
        self.batches.append(batch)
        return SimpleNamespace(result=lambda: None)


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

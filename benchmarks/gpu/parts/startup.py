"""Part E: from the start of a process to its first token, an 8B model with dummy weights."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from parts.machine import Setup
from parts.record import Recorder

SECONDS = 10.0
TABLE = "Llama-3.1-8B bf16, dummy weights"
SCRIPT = Path(__file__).resolve().parents[1] / "first_token.py"
PHASES = ("imports", "weights", "memory", "first token")


def run(setup: Setup, recorder: Recorder) -> None:
    """Start it twice: the first time fills Triton's cache where it is not yet."""
    first, second = "first process", "second process, warm Triton cache"
    recorder.attempt(TABLE, first, lambda: measure(setup, recorder, first, 45, has_target=False))
    recorder.attempt(TABLE, second, lambda: measure(setup, recorder, second, 28, has_target=True))


def measure(setup: Setup, recorder: Recorder, name: str, limit: int, has_target: bool) -> None:
    """One row.

    Raises:
        RuntimeError: the process failed, or has not ended after `limit` seconds.
    """
    began = time.time()
    command = [sys.executable, str(SCRIPT), str(setup.device), str(int(setup.quick))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        said = error.stderr or ""
        print(said.decode(errors="replace") if isinstance(said, bytes) else said, flush=True)
        raise RuntimeError(f"{SCRIPT.name} was stopped after {limit} s") from None
    if done.returncode:
        print(done.stderr, flush=True)
        raise RuntimeError(f"{SCRIPT.name} failed: {done.stderr.strip()[-200:]}")
    times = [float(line) - began for line in done.stdout.split()]
    cells = dict(zip((f"s to {phase}" for phase in PHASES), times, strict=True))
    recorder.add(
        TABLE,
        name,
        cells,
        ok=setup.met(times[-1] <= SECONDS) if has_target else None,
        target=f"at most {SECONDS:.0f} s" if has_target else "",
    )

"""Part E: from the start of a process to its first token, an 8B model with dummy weights."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from parts.machine import Setup
from parts.record import Recorder

SECONDS = 10.0
LIMIT = 28
SCRIPT = Path(__file__).resolve().parents[1] / "first_token.py"
PHASES = ("imports", "weights", "memory", "first token")


def run(setup: Setup, recorder: Recorder) -> None:
    """Start it twice: the first time fills Triton's cache where it is not yet."""
    for number, name in enumerate(("first process", "second process, warm Triton cache")):
        began = time.time()
        command = [sys.executable, str(SCRIPT), str(setup.device), str(int(setup.quick))]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, check=False, env=os.environ
        )
        if done.returncode:
            raise RuntimeError(f"{SCRIPT.name} failed:\n{done.stderr}")
        times = [float(line) - began for line in done.stdout.split()]
        cells = dict(zip((f"s to {phase}" for phase in PHASES), times, strict=True))
        recorder.add(
            "Llama-3.1-8B bf16, dummy weights",
            name,
            cells,
            ok=setup.met(times[-1] <= SECONDS) if number else None,
            target=f"at most {SECONDS:.0f} s" if number else "",
        )

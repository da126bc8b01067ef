"""B01, B53, SEC-03: the server process with a real engine process (a tiny model) behind it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.fixture
def running(start_real: Callable[..., Any]) -> Any:
    return start_real()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def listening_inodes(pid: int) -> set[str]:
    """Sockets of a process that listen for TCP."""
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening.add(f"socket:[{fields[9]}]")
    held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return held & listening


def test_the_processes_are_what_they_should_be(running: Any) -> None:
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{running.url}/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 3
    pid = running.process.pid
    assert "numpy" not in Path(f"/proc/{pid}/maps").read_text()
    assert "numpy" in Path(f"/proc/{running.engine_pid}/maps").read_text()
    assert len(listening_inodes(pid)) == 1
    assert listening_inodes(running.engine_pid) == set()
    status = Path(f"/proc/{pid}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) < 90 * 1024
    running.process.send_signal(signal.SIGTERM)
    code, _ = running.finish()
    assert code == 0


def test_a_killed_engine_ends_the_server_with_one_sentence(running: Any) -> None:
    os.kill(running.engine_pid, signal.SIGKILL)
    code, line = running.finish()
    assert code == 1
    assert line == "octavo serve: error: the engine process ended unexpectedly (signal 9)"


def test_a_killed_server_takes_the_engine_with_it(running: Any) -> None:
    engine = running.engine_pid
    running.process.kill()
    deadline = time.monotonic() + 2
    while is_alive(engine):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("has_disk", [False, True])
def test_ctrl_c_ends_it_without_a_word(
    start_real: Callable[..., Any], tmp_path: Path, has_disk: bool
) -> None:
    server = start_real(*(["--kv-disk", str(tmp_path / "disk")] if has_disk else []))
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    server.process.send_signal(signal.SIGINT)
    _, errors = server.process.communicate(timeout=10)
    assert server.process.returncode == 0
    said = [line for line in errors.splitlines() if not line.startswith(("Try it:", "  curl"))]
    assert said == []

"""From exec to the first token of `octavo serve`, and the memory of all its processes."""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from octavo.cli.bench.client import get
from octavo.cli.bench.workload import percentile
from octavo.cli.options import add_model, resolve_model
from octavo.errors import ConfigError

DEADLINE_S = 120.0
POLL_S = 0.005
SETTLE_S = 1.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model(parser)
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--memory", metavar="BYTES", default="256MiB", help="default: %(default)s")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Medians over the runs; the model's file is in the page cache after the first."""
    if options.runs < 1:
        raise ConfigError(f"--runs must be at least 1, not {options.runs}")
    resolve_model(options.model)
    runs = [_run_once(options.model, options.memory) for _ in range(options.runs)]
    return {
        "runs": len(runs),
        **{name: percentile([r[name] for r in runs], 50) for name in runs[0]},
    }


def _run_once(model: str, memory: str) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "octavo.cli.main", "serve", model]
    began = time.perf_counter()
    server = subprocess.Popen(
        [*command, "--port", str(port), "--memory", memory],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        live = _until(server, lambda: _status(port, "/live") == 200) - began
        ready = _until(server, lambda: _status(port, "/ready") == 200) - began
        _first_token(port)
        token = time.perf_counter() - began
        resident = _settled_bytes(server.pid)
        metrics = get(urlsplit(f"http://127.0.0.1:{port}"), "/metrics")
        pool, weights = (
            _metric(metrics, name) for name in ("octavo_kv_cache_bytes", "octavo_weights_bytes")
        )
        server.send_signal(signal.SIGINT)
        server.wait(10)
    finally:
        server.kill()
        server.wait()
    return {
        "live_s": live,
        "ready_s": ready,
        "first_token_s": token,
        "resident_mb": resident / 1e6,
        "weights_mb": weights / 1e6,
        "kv_cache_mb": pool / 1e6,
        "beyond_weights_and_kv_mb": (resident - weights - pool) / 1e6,
    }


def _until(server: subprocess.Popen[bytes], is_done: Callable[[], bool]) -> float:
    deadline = time.perf_counter() + DEADLINE_S
    while time.perf_counter() < deadline:
        if server.poll() is not None:
            raise ConfigError(f"octavo serve ended with code {server.returncode}; run it by hand")
        if is_done():
            return time.perf_counter()
        time.sleep(POLL_S)
    raise ConfigError(f"octavo serve was not ready within {DEADLINE_S:.0f} s")


def _status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _first_token(port: int) -> None:
    body = {"model": _model_name(port), "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise ConfigError(f"the first request failed: {response.read()[:300]!r}")
    response.read()
    connection.close()


def _model_name(port: int) -> str:
    models: Any = get(urlsplit(f"http://127.0.0.1:{port}"), "/v1/models")
    return str(models["data"][0]["id"])


def _settled_bytes(pid: int) -> int:
    """Resident memory once it no longer grows: the KV pool is touched in the background."""
    size = -1
    while (now := _resident_bytes(pid)) > size:
        size = now
        time.sleep(SETTLE_S)
    return now


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; shared pages count once (PSS)."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            total = int(line.split()[1]) * 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return total + sum(_resident_bytes(int(child)) for child in children)


def _metric(text: str, name: str) -> float:
    for line in text.splitlines():
        if line.startswith(name) and line[len(name)] in " {":
            return float(line.rsplit(" ", 1)[1])
    raise ConfigError(f"/metrics of the server lacks {name}")

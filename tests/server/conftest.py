"""A real HTTP server over a fake engine, in a process of its own, and ways to talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


class Server:
    """One process with a fake engine."""

    def __init__(self, **settings: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE_SERVER), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.port = int(line)
        self.url = f"http://127.0.0.1:{self.port}"
        keys = settings.get("api_keys")
        key = {"authorization": f"Bearer {keys[0]}"} if isinstance(keys, list) else {}
        self.http = httpx.Client(base_url=self.url, timeout=20, headers=key)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 10
        while self.http.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return self.http.post(path, json=body, **options)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        """A metric by its name and the beginning of its labels; 0 if there is none yet."""
        lines = self.http.get("/metrics").text.splitlines()
        found = [line for line in lines if name in line and not line.startswith("#")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def wait_metric(self, name: str, value: float, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while (found := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.01)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal the server; its exit code and what it wrote to stderr."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def _serve(starting: list[Server]) -> Callable[..., Server]:
    def start(*, is_ready: bool = True, **settings: object) -> Server:
        starting.append(Server(**settings))
        if is_ready:
            starting[-1].wait_ready()
        return starting[-1]

    return start


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts servers with settings of their own, for one test."""
    servers: list[Server] = []
    yield _serve(servers)
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def start_module_server() -> Iterator[Callable[..., Server]]:
    """Starts servers for all tests of a module; they must end well."""
    servers: list[Server] = []
    yield _serve(servers)
    for server in servers:
        assert server.stop() == (0, "")
        server.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server that many tests share; it must end well after all that they did to it."""
    running = Server()
    running.wait_ready()
    yield running
    running.wait_metric("octavo_requests_running", 0)
    code, errors = running.stop()
    assert code == 0 and errors == "", errors
    running.close()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Running:
    """`octavo serve` of the tiny model."""

    def __init__(self, model: Path, *options: str, **environment: str) -> None:
        command = [
            sys.executable,
            "-P",
            "-m",
            "octavo.cli.main",
            "serve",
            str(model),
            "--port",
            "0",
        ]
        command += ["--served-model-name", "tiny", "--memory", "8MiB", *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()  # the greeting comes once requests are welcome
        match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert match, line + self.process.stderr.read()
        self.port = int(match[1])
        self.url = match[0]

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def finish(self) -> tuple[int, str]:
        """The exit code, and the last line on stderr."""
        _, errors = self.process.communicate(timeout=10)
        return self.process.returncode, errors.strip().rpartition("\n")[2]


def _serve_real(model: Path) -> Iterator[Callable[..., Running]]:
    servers: list[Running] = []

    def start(*options: str, **environment: str) -> Running:
        servers.append(Running(model, *options, **environment))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@pytest.fixture
def start_real(tiny_model_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts `octavo serve` of the tiny model with further options, for one test."""
    yield from _serve_real(tiny_model_path)


@pytest.fixture(scope="module")
def start_module_real(tiny_model_path: Path) -> Iterator[Callable[..., Running]]:
    """The same for all tests of a module."""
    yield from _serve_real(tiny_model_path)


def read_response(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer that ends with the connection or its length."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 1 << 60)):
        part = sock.recv(65536)
        if not part:
            break
        body += part
    return int(status.split()[1]), headers, body


@pytest.fixture(name="read_response")
def read_response_fixture() -> Callable[[socket.socket], tuple[int, dict[str, str], bytes]]:
    """`read_response`, for tests in files of their own."""
    return read_response

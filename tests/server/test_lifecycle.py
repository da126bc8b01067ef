"""B01, B02, B07, B12, B60 to B62: starting, draining, stopping."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time

import httpx
import pytest

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.server.options import ServerOptions
from octavo.server.serve import bind, greeting
from octavo.types import Capacity, KVPool


def stream_text(server, prompt: str, max_tokens: int, out: list[str]) -> threading.Thread:
    """Read a stream in a thread; its raw text goes to `out`."""

    def read() -> None:
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as r:
            out.append(str(r.status_code))
            out.extend(r.iter_text())

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_the_port_answers_while_the_model_loads(start_server) -> None:
    server = start_server(is_ready=False, load_s=0.5)
    assert server.http.get("/live").status_code == 200
    response = server.http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "loading", "phase": "weights", "progress": 0.42}
    assert server.http.get("/health").status_code == 503
    response = server.post("/v1/completions", {"prompt": "hi"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_loading"
    assert response.headers["retry-after"] == "1"
    assert server.metric("octavo_ready") == 0
    server.wait_ready()
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert server.post("/v1/completions", {"prompt": "hi"}).status_code == 200
    assert server.metric("octavo_ready") == 1


def test_a_model_that_cannot_be_loaded(start_server) -> None:
    server = start_server(is_ready=False, load_failure="the file is cut off; fetch it again")
    code, errors = server.wait()
    assert code != 0
    assert errors.splitlines()[-1].endswith("the file is cut off; fetch it again")


def test_a_tokenizer_that_cannot_be_loaded(start_server) -> None:
    server = start_server(is_ready=False, tokenizer_failure="there is no vocabulary")
    code, errors = server.wait()
    assert code != 0
    assert errors.splitlines()[-1] == "octavo.errors.ModelFileError: there is no vocabulary"
    both = {"load_failure": "the file is cut off", "tokenizer_failure": "there is no vocabulary"}
    server = start_server(is_ready=False, **both)
    code, errors = server.wait()
    assert code != 0
    assert errors.splitlines()[-1] == "octavo.errors.ConfigError: the file is cut off"
    assert "no vocabulary" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_once(start_server, number) -> None:
    server = start_server()
    with server.connect():  # an idle connection holds up nothing
        began = time.monotonic()
        assert server.stop(number) == (0, "")
    assert time.monotonic() - began < 1


def test_a_loading_server_stops_at_once(start_server) -> None:
    server = start_server(is_ready=False, load_s=30)
    server.http.get("/live")
    began = time.monotonic()
    assert server.stop() == (0, "")
    assert time.monotonic() - began < 2


def test_sigterm_lets_running_requests_finish(start_server) -> None:
    server = start_server()
    out: list[str] = []
    thread = stream_text(server, "SLOW", 20, out)
    server.wait_metric("octavo_requests_running", 1)
    idle = http.client.HTTPConnection("127.0.0.1", server.port)
    idle.request("GET", "/live")
    idle.getresponse().read()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    response = httpx.get(f"{server.url}/ready")
    assert (response.status_code, response.json()) == (503, {"status": "draining"})
    assert httpx.get(f"{server.url}/live").status_code == 200
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 503
    assert response.headers["connection"] == "close"
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "shutting_down"
    assert server.wait() == (0, "")
    idle.close()
    thread.join()
    text = "".join(out[1:])
    assert out[0] == "200"
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_the_drain_has_a_deadline(start_server) -> None:
    """B61: a stream that does not end is told so, and the exit is in time."""
    server = start_server(drain_s=0.3)
    out: list[str] = []
    thread = stream_text(server, "SLOW", 4000, out)
    statuses: list[int] = []

    def ask() -> None:
        body = {"prompt": "SLOW", "max_tokens": 4000}
        statuses.append(server.post("/v1/completions", body).status_code)

    whole = threading.Thread(target=ask)
    whole.start()
    server.wait_metric("octavo_requests_running", 2)
    began = time.monotonic()
    assert server.stop() == (0, "")
    assert time.monotonic() - began < 0.3 + 2
    thread.join()
    whole.join()
    events = "".join(out[1:]).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "abort"
    assert statuses == [503]


def test_a_slow_reader_does_not_hold_up_the_exit(start_server) -> None:
    server = start_server(drain_s=0.3)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "n": 16, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_metric("octavo_requests_running", 1)
        began = time.monotonic()
        assert server.stop() == (0, "")
        assert time.monotonic() - began < 0.3 + 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(start_server, number) -> None:
    server = start_server()
    thread = stream_text_ignoring_errors(server)
    server.wait_metric("octavo_requests_running", 1)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    began = time.monotonic()
    code, errors = server.stop(number)
    assert time.monotonic() - began < 1
    assert (code, errors) == (128 + number, "")
    thread.join()


def stream_text_ignoring_errors(server) -> threading.Thread:
    def read() -> None:
        body = {"prompt": "SLOW", "max_tokens": 400}
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_a_dead_engine_ends_the_server(start_server) -> None:
    server = start_server()
    out: list[str] = []
    thread = stream_text(server, "SLOW DIE", 100, out)
    code, errors = server.wait()
    thread.join()
    assert code == 1
    assert "the engine process ended unexpectedly (signal 9)" in errors.splitlines()[-1]
    text = "".join(out[1:])
    assert '"code":"engine_unavailable"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigError, match=r"taken.*--port"):
        bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ConfigError, match="no address of this machine"):
        bind("203.0.113.5", 0)
    with pytest.raises(ConfigError, match="--host"):
        bind("no-such-host.invalid", 0)


def test_the_greeting_has_a_line_to_try() -> None:
    capacity = Capacity(
        model="m",
        architecture="a",
        num_parameters=1,
        max_model_len=8192,
        kv_pool=KVPool(num_blocks=1, block_size=16, num_bytes=3 << 20),
        weights_bytes=1,
        vocab_size=10,
        backend="cpu",
    )
    config = EngineConfig(model="x", served_name="tiny", memory_bytes=1, num_threads=1)
    for host, url in (("0.0.0.0", "http://127.0.0.1"), ("127.0.0.1", "http://127.0.0.1")):
        with bind(host, 0) as listener:
            port = listener.getsockname()[1]
            text = greeting(ServerOptions(engine=config, host=host), capacity, listener)
        assert f"Octavo serves tiny at {url}:{port} (cpu; context 8192 tokens" in text
        assert f"curl {url}:{port}/v1/chat/completions" in text
    with bind("127.0.0.1", 0) as listener:
        options = ServerOptions(engine=config, api_keys=("secret",), admin_socket="/run/octavo")
        assert "Admin socket" not in text
        text = greeting(options, capacity, listener)
    assert text.endswith("\nAdmin socket: /run/octavo\n")
    assert "Authorization" in text and "secret" not in text

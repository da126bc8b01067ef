"""B20 to B24: a client that leaves costs nothing more, wherever its request was."""

from __future__ import annotations

import json
import socket
import struct

import pytest

CANCELLED = 'octavo_requests_cancelled_total{model_name="fake",reason="disconnect"'


def send(sock: socket.socket, path: str, body: dict[str, object]) -> None:
    encoded = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(encoded)}\r\n\r\n".encode() + encoded)


def reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "SLOW", "max_tokens": 2000},
        {"prompt": "STALL SLOW", "max_tokens": 2000},
        {"prompt": "SLOW", "max_tokens": 2000, "n": 8},
        {"prompt": ["SLOW a", "SLOW b", "SLOW c"], "max_tokens": 2000},
    ],
)
def test_leaving_ends_the_request(server, leave, stream, body) -> None:
    cancelled = server.metric(CANCELLED)
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    sock = server.connect()
    send(sock, "/v1/completions", body | {"stream": stream})
    server.wait_metric("octavo_requests_running", len(prompts))
    if stream and "STALL" not in prompts[0]:
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
    leave(sock)
    server.wait_metric("octavo_requests_running", 0, timeout_s=1)
    server.wait_metric("octavo_kv_cache_blocks_used", 0, timeout_s=1)
    assert server.metric(CANCELLED) == cancelled + 1


def test_leaving_in_the_middle_of_the_body(server) -> None:
    gone = 'endpoint="/v1/completions",status="499"'
    before = server.metric(gone)
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"prompt"'
        )
    server.wait_metric(gone, before + 1)


def test_a_crowd_that_leaves(server) -> None:
    """B24, at the size of a test: afterwards the next request is served at once."""
    socks = []
    for i in range(100):
        socks.append(server.connect())
        send(socks[-1], "/v1/completions", {"prompt": f"SLOW {i}", "max_tokens": 3000})
    server.wait_metric("octavo_requests_running", 100)
    for sock in socks:
        sock.close()
    server.wait_metric("octavo_requests_running", 0)
    assert server.post("/v1/completions", {"prompt": "hi"}).status_code == 200


def test_an_answer_that_was_complete_is_no_cancellation(server) -> None:
    cancelled = server.metric(CANCELLED)
    for stream in (True, False):
        with server.connect() as sock:
            send(sock, "/v1/completions", {"prompt": "hi", "max_tokens": 1, "stream": stream})
            data = b""
            while b"length" not in data.split(b"finish_reason")[-1]:
                data += sock.recv(65536)
    assert server.metric(CANCELLED) == cancelled

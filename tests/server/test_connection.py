"""SEC-10, SEC-11, B23, B26: what one connection may cost, with raw sockets and short deadlines."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path

import pytest

BODY = json.dumps({"model": "fake", "prompt": "hello", "max_tokens": 3}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def hasty(start_module_server):
    """A server whose deadlines pass within a test."""
    return start_module_server(
        limits={
            "header_deadline_s": 0.5,
            "body_window_s": 0.5,
            "keep_alive_s": 1,
            "linger_s": 0.5,
            "write_stall_s": 0.5,
        }
    )


def rss(server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def drip(sock: socket.socket, data: bytes) -> None:
    """Send a byte each 50 ms until all is sent or the server has had enough."""
    for byte in data:
        time.sleep(0.05)
        try:
            sock.sendall(bytes([byte]))
        except OSError:
            return


def test_a_slow_header_is_a_408(hasty, read_response) -> None:
    with hasty.connect() as sock:
        began = time.monotonic()
        drip(sock, b"POST /v1/completions HTTP/1.1\r\n")
        status, headers, body = read_response(sock)
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert time.monotonic() - began < 3


def test_a_slow_body_is_a_408(hasty, read_response) -> None:
    with hasty.connect() as sock:
        sock.sendall(HEAD + LENGTH % 5000)
        drip(sock, b"{" + b" " * 30)
        status, _, body = read_response(sock)
    assert status == 408
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_slow_at_times_is_taken(hasty, read_response) -> None:
    padding = b" " * 600
    with hasty.connect() as sock:
        sock.sendall(HEAD + LENGTH % (len(BODY) + 4 * len(padding)))
        for _ in range(4):
            sock.sendall(padding)
            time.sleep(0.3)
        sock.sendall(BODY)
        assert read_response(sock)[0] == 200


def test_a_silent_connection_is_closed(hasty) -> None:
    with hasty.connect() as sock:
        began = time.monotonic()
        assert sock.recv(100) == b""
        assert 0.3 < time.monotonic() - began < 3


def test_an_idle_connection_is_closed_after_a_while(hasty, read_response) -> None:
    with hasty.connect() as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_response(sock)[0] == 200
        assert sock.recv(100) == b""


@pytest.mark.parametrize("padding", [70_000, 5_000_000])
def test_a_long_header_is_a_431(server, read_response, padding) -> None:
    with server.connect() as sock:
        with contextlib.suppress(OSError):  # refused in the middle
            sock.sendall(b"GET /live HTTP/1.1\r\nx-long: " + b"a" * padding)
        status, _, body = read_response(sock)
    assert status == 431
    assert json.loads(body)["error"]["code"] == "headers_too_large"


def test_headers_below_the_bound_are_taken(server, read_response) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 60_000 + b"\r\n\r\n")
        assert read_response(sock)[0] == 200


def test_many_headers_are_a_431(server, read_response) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n")
        assert read_response(sock)[0] == 431


def test_a_long_url_is_a_431(server, read_response) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /" + b"a" * 100_000)
        assert read_response(sock)[0] == 431


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"FROB nonsense\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\n",
        HEAD + CHUNKED + b"zz\r\n",
    ],
)
def test_what_is_not_http_is_a_400(server, read_response, garbage) -> None:
    with server.connect() as sock:
        sock.sendall(garbage)
        status, _, body = read_response(sock)
    assert status == 400
    assert "error" in json.loads(body)


def test_an_announced_large_body_is_a_413_at_once(server, read_response) -> None:
    with server.connect() as sock:
        began = time.monotonic()
        sock.sendall(HEAD + LENGTH % (9 * MIB))
        status, _, body = read_response(sock)
        assert time.monotonic() - began < 1
    assert status == 413
    assert json.loads(body)["error"]["code"] == "request_too_large"


def test_bounds_hold_for_later_requests_of_a_connection(hasty, read_response) -> None:
    long_header = b"GET /live HTTP/1.1\r\nx: " + b"a" * 70_000
    for request, expected in (
        (HEAD + LENGTH % (9 * MIB), 413),
        (HEAD + LENGTH % 5000, 408),
        (b"GET /li", 408),
        (long_header, 431),
        (b"GARBAGE\r\n\r\n", 400),
    ):
        with hasty.connect() as sock:
            sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_response(sock)[0] == 200
            sock.sendall(request)
            assert read_response(sock)[0] == expected


def test_a_client_that_sends_all_of_a_large_body_sees_the_413(server) -> None:
    response = server.http.post(
        "/v1/completions",
        content=b'{"prompt": "' + b"a" * (9 * MIB) + b'"}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413


def test_a_large_chunked_body_is_a_413_in_bounded_memory(server, read_response) -> None:
    before = rss(server)
    with server.connect() as sock:
        sock.sendall(HEAD + CHUNKED)
        chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
        sent = 0
        try:
            for _ in range(1000):
                sock.sendall(chunk)
                sent += 65536
        except OSError:
            pass
        status, _, _ = read_response(sock)
    assert status == 413
    assert rss(server) - before < 2 * 8 * MIB + 4 * MIB


def test_a_body_at_the_bound_is_taken(server) -> None:
    body = BODY + b" " * (8 * MIB - len(BODY))
    response = server.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200


def test_a_hundred_thousand_tiny_chunks_hurt_nobody(server, read_response) -> None:
    padding = b"6\r\n      \r\n" * 100_000
    began = time.monotonic()
    with server.connect() as sock:
        sock.sendall(HEAD + CHUNKED + padding)
        others = time.monotonic()
        assert server.http.get("/live").status_code == 200
        assert time.monotonic() - others < 1
        sock.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert read_response(sock)[0] in (200, 400)
    assert time.monotonic() - began < 10


def test_endless_framing_is_a_413(start_server, read_response) -> None:
    """Chunk extensions and trailers are bytes too."""
    server = start_server(limits={"max_body_bytes": 20_000})
    for endless in (b"1;" + b"x" * 1_000_000, b"1\r\n \r\n0\r\n" + b"a: b\r\n" * 100_000):
        with server.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(HEAD + CHUNKED + endless)
            assert read_response(sock)[0] in (400, 413)


def test_a_body_that_nobody_reads_is_dropped_and_the_connection_kept(server, read_response) -> None:
    inner = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\n" + LENGTH % len(inner))
        assert read_response(sock)[0] == 404
        sock.sendall(inner + b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        status, _, body = read_response(sock)
        assert (status, json.loads(body)) == (200, {"status": "alive"})


def test_a_body_that_nobody_reads_is_bounded(hasty, read_response) -> None:
    for head, data in ((LENGTH % 5000, b"x"), (CHUNKED, b"10000\r\n" + b"a" * 65536 + b"\r\n")):
        with hasty.connect() as sock:
            sock.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\n" + head)
            assert read_response(sock)[0] == 404
            with pytest.raises(OSError):
                while True:
                    sock.sendall(data)
                    time.sleep(0 if len(data) > 10 else 0.05)
    with hasty.connect() as sock:
        sock.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\n" + LENGTH % 5000)
        assert read_response(sock)[0] == 404
        assert sock.recv(100) == b""  # closed without a second answer


def test_expect_100_continue(server, read_response) -> None:
    with server.connect() as sock:
        sock.sendall(HEAD + b"expect: 100-continue\r\n" + LENGTH % len(BODY))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert read_response(sock)[0] == 200


def test_pipelined_requests_are_answered_in_order(server) -> None:
    request = HEAD + LENGTH % len(BODY) + BODY
    last = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(request + request + last)
        data = b""
        while part := sock.recv(65536):
            data += part
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.rindex(b"text_completion") < data.index(b'"version"')


def test_a_pipelined_body_may_come_after_the_answer_before_it(server, read_response) -> None:
    first = json.dumps({"prompt": "STALL", "max_tokens": 1}).encode()
    with server.connect() as sock:
        sock.sendall(HEAD + LENGTH % len(first) + first + HEAD + LENGTH % len(BODY) + BODY[:5])
        assert read_response(sock)[0] == 200
        sock.sendall(BODY[5:])
        assert read_response(sock)[0] == 200


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_upgrade_is_answered_as_the_request_that_it_is(server, read_response, protocol) -> None:
    upgrade = b"connection: upgrade\r\nupgrade: " + protocol + b"\r\n"
    for request, expected in (
        (b"GET /live HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n", 200),
        (HEAD + upgrade + LENGTH % len(BODY) + BODY, 400),
    ):
        with server.connect() as sock:
            sock.sendall(request)
            status, headers, _ = read_response(sock)
            assert (status, headers["connection"]) == (expected, "close")
            assert sock.recv(100) == b""


def test_http_1_0_is_answered_and_closed(server, read_response) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /live HTTP/1.0\r\n\r\n")
        assert read_response(sock)[0] == 200
        assert sock.recv(100) == b""


def stream_request(prompt: str, max_tokens: int) -> bytes:
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "n": 16}
    encoded = json.dumps(body).encode()
    return HEAD + LENGTH % len(encoded) + encoded


def test_a_slow_reader_is_held_back_and_then_cut_off(hasty) -> None:
    """B26: what the server holds for it is bounded, and its blocks come back."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", hasty.port))
    before = rss(hasty)
    with sock:
        sock.sendall(stream_request("hello", 4000))
        hasty.wait_metric("octavo_requests_running", 1)
        hasty.wait_metric("octavo_requests_running", 0)
        hasty.wait_metric(
            'octavo_requests_cancelled_total{model_name="fake",reason="disconnect"', 1
        )
    assert rss(hasty) - before < 16 * MIB


def test_refusals_are_counted(hasty) -> None:
    assert hasty.metric('octavo_http_refused_total{model_name="fake",status="408"') >= 2

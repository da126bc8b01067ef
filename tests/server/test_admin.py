"""SEC-32: the admin routes stand behind a socket file, for its owner, and for no browser."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.errors import ConfigError
from octavo.server.admin_socket import listen_at
from octavo.server.routes import ADMIN_ROUTES, ROUTES

PROMPT = {"prompt": "a prompt of more than sixteen tokens", "max_tokens": 2}
RESET = "/reset_prefix_cache"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "admin")


def at_socket(path: str, **options: Any) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=path)
    return httpx.Client(transport=transport, base_url="http://localhost", timeout=20, **options)


def cached(server: Any) -> int:
    usage = server.post("/v1/completions", PROMPT).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_the_prefix_cache_is_reset(start_server: Callable[..., Any], path: str) -> None:
    server = start_server(admin_socket=path, api_keys=["a-key"])
    assert [cached(server), cached(server)] == [0, 32]
    with at_socket(path) as admin:
        response = admin.post(RESET)
        assert (response.status_code, response.json()) == (200, {"num_blocks": 1})
        assert "x-request-id" in response.headers
        assert cached(server) == 0
        assert admin.get(RESET).status_code == 405
        assert admin.get("/live").status_code == 200
        assert list(admin.get("/openapi.json").json()["paths"]) == [
            *(route.path for route in ADMIN_ROUTES),
            "/openapi.json",
        ]
    assert server.metric('http_requests_total{model_name="fake",endpoint="/reset_prefix') == 1


def test_no_admin_route_is_at_the_port(start_server: Callable[..., Any], path: str) -> None:
    server = start_server(admin_socket=path)
    assert {route.path for route in ADMIN_ROUTES} - {route.path for route in ROUTES} == {RESET}
    assert server.post(RESET, {}).status_code == 404
    with at_socket(path) as admin:
        for route in ROUTES:
            if route.path != "/live":
                found = admin.request(route.method, route.path.replace("{model}", "fake"))
                assert found.status_code == 404, route.path


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://localhost"},
        {"origin": "null"},
        {"Origin": "https://example.com"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ],
)
def test_browsers_are_refused(
    start_module_server: Callable[..., Any], admin_path: str, headers: dict[str, str]
) -> None:
    with at_socket(admin_path, headers=headers) as admin:
        for method, route in (("POST", RESET), ("OPTIONS", RESET), ("GET", "/live")):
            response = admin.request(method, route)
            assert response.status_code == 403
            assert response.json()["error"]["code"] == "browser_refused"
            assert "access-control-allow-origin" not in response.headers


@pytest.fixture(scope="module")
def admin_path(
    start_module_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = str(tmp_path_factory.mktemp("admin") / "socket")
    start_module_server(admin_socket=path)
    return path


def test_the_file_is_its_owners_and_goes_with_the_server(
    start_server: Callable[..., Any], path: str
) -> None:
    server = start_server(admin_socket=path)
    mode = os.stat(path).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    assert server.stop() == (0, "")
    assert not os.path.exists(path)


def test_while_the_model_loads_there_is_nothing_to_reset(
    start_server: Callable[..., Any], path: str
) -> None:
    start_server(is_ready=False, admin_socket=path, load_s=5)
    with at_socket(path) as admin:
        response = admin.post(RESET)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_loading"


def test_a_file_left_by_a_killed_server_is_replaced(
    start_server: Callable[..., Any], path: str
) -> None:
    server = start_server(admin_socket=path)
    server.process.send_signal(signal.SIGKILL)
    server.wait()
    assert os.path.exists(path)
    start_server(admin_socket=path)
    with at_socket(path) as admin:
        assert admin.post(RESET).status_code == 200


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught, listen_at(path):
        pass
    return str(caught.value)


def test_a_path_that_cannot_be_is_one_sentence(path: str, tmp_path: Path) -> None:
    with listen_at(path):
        assert "another server's" in refusal(path)
        assert os.path.exists(path), "the other server keeps its file"
    assert not os.path.exists(path)
    Path(path).write_text("a letter")
    assert "no socket" in refusal(path)
    assert Path(path).read_text() == "a letter"
    assert "at most 100 bytes" in refusal(str(tmp_path / ("x" * 120)))
    assert "can't be made" in refusal(str(tmp_path / "nowhere" / "admin"))
    with listen_at(None) as nothing:
        assert nothing is None


def test_a_file_that_somebody_else_put_there_meanwhile_is_left_alone(path: str) -> None:
    with listen_at(path), socket.socket(socket.AF_UNIX) as other:
        os.unlink(path)
        other.bind(path)
    assert os.path.exists(path)


def test_the_mask_of_the_process_is_as_before(path: str) -> None:
    before = os.umask(0o022)
    try:
        with listen_at(path):
            assert os.umask(0o022) == 0o022
        refusal(path + "/impossible")
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_real_engine_forgets(start_real: Callable[..., Any], path: str) -> None:
    running = start_real("--admin-socket", path)
    body = {"prompt": [5] * 40, "max_tokens": 1, "cache_pin_s": 100}

    def ask() -> int:
        usage = httpx.post(f"{running.url}/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [ask(), ask()] == [0, 32]
    with at_socket(path) as admin:
        assert admin.post(RESET).json() == {"num_blocks": 2}
        assert admin.post(RESET).json() == {"num_blocks": 0}
    assert ask() == 0
    running.process.send_signal(signal.SIGTERM)
    assert running.finish()[0] == 0
    assert not os.path.exists(path)

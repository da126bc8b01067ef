"""SEC-30, SEC-31: every path but the open ones needs a key, however it is written."""

from __future__ import annotations

import hashlib

import pytest

from octavo.server.app import App
from octavo.server.auth import OPEN_PATHS, KeyRing
from octavo.server.options import ServerOptions
from octavo.server.routes import ROUTES

KEYS = ["first-key", "second-key"]
PATHS = [route.path.replace("{model}", "fake") for route in ROUTES] + ["/openapi.json"]


@pytest.fixture(scope="module")
def locked(start_module_server):
    return start_module_server(api_keys=KEYS)


def raw(server, read_response, method: str, target: str, *headers: str) -> int:
    lines = [f"{method} {target} HTTP/1.1", "host: x", "connection: close", *headers, "", ""]
    with server.connect() as sock:
        sock.sendall("\r\n".join(lines).encode())
        return read_response(sock)[0]


def test_the_open_paths_are_these() -> None:
    """A new path that is open without a key is a decision, not an accident."""
    assert {"/live", "/ready", "/health"} == OPEN_PATHS
    assert ServerOptions is not None and App is not None


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
def test_every_route_needs_a_key(locked, read_response, method) -> None:
    for path in PATHS:
        status = raw(locked, read_response, method, path)
        if path in OPEN_PATHS:
            assert status == (200 if method in ("GET", "HEAD") else 405), path
        else:
            assert status == 401, path


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/../v1/models",
        "/live/../v1/models",
        "/live/",
        "//live",
        "/live%2f..%2fv1/models",
        "/%76%31/models",
        "/v1/models%00",
        "/V1/MODELS",
        "/live;/v1/models",
        "/v1/models?x=/live",
        "/v1/models#/live",
        "http://x/v1/models",
        "/nowhere",
        "/",
        "/openapi.json",
        "/docs",
    ],
)
def test_tricks_with_paths(locked, read_response, target) -> None:
    assert raw(locked, read_response, "GET", target) in (400, 401)


def test_good_and_bad_keys(locked, read_response) -> None:
    for key in KEYS:
        for header in (
            f"authorization: Bearer {key}",
            f"x-api-key: {key}",
            f"Authorization: bearer {key}",
        ):
            assert raw(locked, read_response, "GET", "/v1/models", header) == 200, header
    for header in (
        "authorization: Bearer first-ke",
        "authorization: Bearer first-key2",
        "authorization: Bearer",
        "authorization: Basic first-key",
        "authorization: first-key",
        "x-api-key: ",
        "x-api-key: FIRST-KEY",
        "host: first-key",
        "cookie: x-api-key=first-key",
    ):
        assert raw(locked, read_response, "GET", "/v1/models", header) == 401, header


def test_the_refusal_is_openais(locked) -> None:
    response = locked.http.get("/v1/models", headers={"authorization": "Bearer x"})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_keys_are_nowhere_to_be_read(locked) -> None:
    for path in ("/version", "/metrics", "/openapi.json", "/v1/models"):
        text = locked.http.get(path).text
        assert not any(key in text for key in KEYS)


def test_a_keys_name_is_its_own_after_every_start() -> None:
    """It may name what lies on a disk: it depends on no order and tells nothing of the key."""
    ring, other = KeyRing(KEYS), KeyRing(KEYS[::-1])
    names = [ring.check("/v1/models", {b"x-api-key": key.encode()}) for key in KEYS]
    assert names == [other.check("/v1/models", {b"x-api-key": key.encode()}) for key in KEYS]
    assert len(set(names)) == 2
    digests = {hashlib.sha256(key.encode()).hexdigest() for key in KEYS}
    assert all(len(name) == 64 and name not in digests for name in names)
    assert ring.check("/live", {b"x-api-key": KEYS[0].encode()}) == ""
    assert KeyRing([]).check("/v1/models", {b"x-api-key": KEYS[0].encode()}) == ""


def test_without_keys_everyone_is_welcome(server) -> None:
    assert server.http.get("/v1/models").status_code == 200

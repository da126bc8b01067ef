"""A streaming client of the OpenAI API for benchmarks: standard library, one thread a request."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from octavo.errors import ConfigError


def parse_url(url: str) -> SplitResult:
    """Check the server's address.

    Raises:
        ConfigError: it is not http://host:port.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"--url must look like http://127.0.0.1:8000, not {url!r}")
    return parts


def get(url: SplitResult, path: str, key: str | None = None, timeout_s: float = 10.0) -> Any:
    """The JSON (or text) answer to a GET.

    Raises:
        ConfigError: nobody answers there, or not with 200.
    """
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers=_headers(key))
        response = connection.getresponse()
        body = response.read().decode()
    except OSError as error:
        raise ConfigError(f"no server answers at {url.geturl()}: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise ConfigError(f"{url.geturl()}{path} answers {response.status}: {body[:200]}")
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return json.loads(body) if is_json else body


def stream(url: SplitResult, path: str, body: dict[str, Any], key: str | None) -> Iterator[float]:
    """POST a streaming request and yield the time of each chunk that carries tokens."""
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=600)
    try:
        headers = _headers(key) | {"content-type": "application/json"}
        connection.request("POST", path, json.dumps({**body, "stream": True}), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ConfigError(f"{path} answers {response.status}: {response.read()[:300]!r}")
        for line in response:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ConfigError(f"{path} failed: {chunk['error']}")
                if any(
                    c.get("text") or c.get("delta", {}).get("content") for c in chunk["choices"]
                ):
                    yield now
    finally:
        connection.close()


def _headers(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}

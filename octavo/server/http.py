"""One HTTP exchange over ASGI: what a handler reads and how it answers.

Knows no route, no model and no engine. Every answer carries `x-request-id`; every error has
OpenAI's shape.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import msgspec

from octavo.errors import OverloadedError, RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_JSON = (b"content-type", b"application/json")


class HttpError(RequestError):
    """A refusal with a status of its own (401, 404, 405, 413, 415, 503) and perhaps headers."""

    def __init__(self, status: int, message: str, *, code: str, headers: Headers = ()) -> None:
        """Keep the status and headers beside OpenAI's fields."""
        super().__init__(message, code=code)
        self.status = status
        self.kind = "server_error" if status >= 500 else "invalid_request_error"
        self.headers = headers


class ClientGoneError(Exception):
    """The client left before its request was read; there is nobody to answer."""


def error_body(error: RequestError) -> dict[str, object]:
    """OpenAI's error object for an exception."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


class Exchange:
    """A request and its answer.

    Attributes:
        path: percent-decoded.
        request_id: the client's `x-request-id` if it is a plain word, else a fresh one.
        arrived: `time.monotonic()` when the headers were complete.
        status: of the answer, 0 before it began.
        endpoint: the label that metrics use; the app sets it.
        key_name: of the API key that it came with, empty without; the app sets it.
    """

    __slots__ = (
        "_receive",
        "_send",
        "arrived",
        "endpoint",
        "headers",
        "key_name",
        "method",
        "path",
        "path_params",
        "request_id",
        "status",
    )

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Read the request line and headers of an ASGI scope."""
        self._receive = receive
        self._send = send
        self.arrived = time.monotonic()
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.path_params: dict[str, str] = {}
        given = self.headers.get(b"x-request-id", b"")
        valid = _REQUEST_ID.fullmatch(given) is not None
        self.request_id = given.decode() if valid else "req-" + secrets.token_hex(12)
        self.status = 0
        self.endpoint = "other"
        self.key_name = ""

    async def read_body(self) -> bytes:
        """The whole body; the connection bounds its size and pace.

        Raises:
            ClientGoneError: the client left in the middle.
        """
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            parts.append(message["body"])
            if not message.get("more_body"):
                return b"".join(parts)

    async def wait_gone(self) -> None:
        """Return when the client has left; only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        """Send the status line and headers."""
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"x-request-id", self.request_id.encode())],
            }
        )

    async def write(self, body: bytes, *, more: bool) -> None:
        """Send a part of the body; waits while the client's buffer is full."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, body: bytes, *, status: int = 200, headers: Headers = (_JSON,)) -> None:
        """Send a whole answer."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.write(body, more=False)

    async def answer_json(self, value: object, *, status: int = 200, headers: Headers = ()) -> None:
        """Send a whole answer as JSON."""
        await self.answer(msgspec.json.encode(value), status=status, headers=[_JSON, *headers])

    async def answer_error(self, error: RequestError) -> None:
        """Send an error in OpenAI's shape, with the headers that belong to it."""
        headers = list(error.headers) if isinstance(error, HttpError) else []
        if isinstance(error, OverloadedError):
            headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
        await self.answer_json(error_body(error), status=error.status, headers=headers)

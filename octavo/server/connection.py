"""One HTTP/1.1 connection: uvicorn's parser and response writer, with deadlines and bounds added.

A request that breaks a bound gets an error in OpenAI's shape; what its client still sends is then
read and dropped for a moment, since closing at once would destroy the answer on its way. A client
that takes no bytes for a while is cut off. The application sees a refused request as one whose
client left. Knows no route and no model.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable
from typing import Any

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from octavo.server.http import HttpError, error_body
from octavo.server.options import Limits

_SLICE_BYTES = 16 << 10
"""Data is parsed in such pieces, so that no more than one piece of a header is ever too much."""


class _RefusedError(Exception):
    """Unwinds the parser after a refusal."""


class Connection(HttpToolsProtocol):
    """A connection with limits.

    NOTE: parser callbacks run inside `parser.feed_data`; what they raise comes out of it as
    HttpParserCallbackError.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        *,
        limits: Limits,
        on_refused: Callable[[int], None],
    ) -> None:
        """Prepare for one client.

        Args:
            config: uvicorn's, already loaded.
            server_state: the connections and tasks that all share.
            limits: the bounds.
            on_refused: called with the status of each refusal.
        """
        super().__init__(config, server_state, {})
        self._limits = limits
        self._on_refused = on_refused
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._is_in_headers = True
        self._is_handed_on = False
        self._is_complete = True
        self._is_lingering = False
        self._header_bytes = 0
        self._body_bytes = 0
        self._wire_bytes = 0
        self._bytes_at_window = 0
        self._unsent_at_stall = 0

    # ---- asyncio's callbacks ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; a client that never says anything is closed after the header deadline."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        self._arm(self._limits.header_deadline_s, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """End; the application learns that its client left."""
        self._disarm()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, counting."""
        self._unset_keepalive_if_required()
        for start in range(0, len(data), _SLICE_BYTES):
            if self._is_lingering or self.parser is None:
                return
            self._feed(data[start : start + _SLICE_BYTES])

    def pause_writing(self) -> None:
        """The client does not keep up: wait for it, but not for ever."""
        super().pause_writing()
        self._unsent_at_stall = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self._limits.write_stall_s, self._check_stall)

    def resume_writing(self) -> None:
        """The client caught up."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    # ---- the parser's callbacks ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins: its headers must come soon."""
        super().on_message_begin()
        self._is_in_headers = True
        self._is_handed_on = self._is_complete = False
        self._header_bytes = self._body_bytes = self._wire_bytes = self._bytes_at_window = 0
        self._arm(self._limits.header_deadline_s, self._headers_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer after a chunked body: trailers are dropped."""
        if not self._is_in_headers:
            return
        super().on_header(name, value)
        if len(self.headers) > self._limits.max_headers:
            self._refuse(431, f"More than {self._limits.max_headers} header fields.")

    def on_headers_complete(self) -> None:
        """Hand the request to the application, unless its body is announced to be too large."""
        self._disarm()
        self._is_in_headers = False
        for name, value in self.headers:
            if name == b"content-length" and int(value) > self._limits.max_body_bytes:
                self._refuse_body()
            if name in (b"content-length", b"transfer-encoding") and self.parser.should_upgrade():
                # The parser would take the body for the other protocol.
                self._refuse(400, "A request with a body can't upgrade; leave out 'Upgrade'.")
        super().on_headers_complete()
        self._is_handed_on = True
        self._arm(self._limits.body_window_s, self._check_body)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_body()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has come whole."""
        self._disarm()
        self._is_complete = True
        super().on_message_complete()

    # ---- bounds ----------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as the plain request that it also is; the parser reads no other after it.
            self.cycle.keep_alive = False
            self._is_lingering = True
            return
        except httptools.HttpParserError as error:
            if not isinstance(error.__context__, _RefusedError):
                self._answer(400, "This is not a valid HTTP/1.1 request.")
            return
        if self._is_in_headers and not self._is_complete:
            self._header_bytes += len(data)
            if self._header_bytes > self._limits.max_header_bytes:
                limit = self._limits.max_header_bytes
                self._answer(431, f"The request line and headers are longer than {limit} bytes.")
        elif not self._is_complete:
            self._wire_bytes += len(data)
            # A chunked body may be mostly framing: 11 bytes on the wire for a chunk of 6 are well.
            if self._wire_bytes > 4 * self._limits.max_body_bytes:
                self._answer(413, self._too_large())

    def _refuse_body(self) -> None:
        self._refuse(413, self._too_large())

    def _too_large(self) -> str:
        return f"The body is larger than {self._limits.max_body_bytes} bytes."

    def _refuse(self, status: int, message: str) -> None:
        """Refuse from within the parser."""
        self._answer(status, message)
        raise _RefusedError

    def _answer(self, status: int, message: str) -> None:
        """Answer instead of the application, and read no further request."""
        self._on_refused(status)
        self._disarm()
        cycle = self.cycle
        is_answering = cycle is not None and not cycle.response_complete
        if is_answering and cycle.more_body and not cycle.response_started:
            # The request at fault is the one that the application is reading.
            cycle.disconnected = True
            cycle.message_event.set()
        elif is_answering:
            # An earlier request is being answered, and must not be garbled: no answer to this one.
            cycle.keep_alive = False
            self._is_lingering = True
            return
        is_answered = self._is_handed_on and cycle is not None and cycle.response_complete
        if not is_answered:  # else the answer came before the body, which breaks a bound only now
            self.transport.write(_error_response(status, message))
        self._linger()

    def _linger(self) -> None:
        """Drop what still comes, then close."""
        self._is_lingering = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self._arm(self._limits.linger_s, self.transport.close)

    # ---- deadlines -------------------------------------------------------------------------------

    def _arm(self, delay_s: float, function: Callable[[], object]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(delay_s, function)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _headers_late(self) -> None:
        if self._is_complete:  # not a byte of a request
            self.transport.close()
            return
        limit = self._limits.header_deadline_s
        self._answer(408, f"The headers did not come within {limit:g} s.")

    def _check_body(self) -> None:
        """The end of a window: enough of the body must have come in it."""
        limits = self._limits
        come = self._body_bytes - self._bytes_at_window
        is_waiting_for_us = self.flow.read_paused
        if not is_waiting_for_us and come < limits.min_body_rate * limits.body_window_s:
            self._answer(408, f"The body came slower than {limits.min_body_rate} bytes a second.")
            return
        self._bytes_at_window = self._body_bytes
        self._arm(limits.body_window_s, self._check_body)

    def _check_stall(self) -> None:
        """The client had its time: cut it off unless it took something."""
        unsent = self.transport.get_write_buffer_size()
        if unsent >= self._unsent_at_stall:
            self.transport.abort()
            return
        self._unsent_at_stall = unsent
        self._stall_timer = self.loop.call_later(self._limits.write_stall_s, self._check_stall)


def _error_response(status: int, message: str) -> bytes:
    """A whole answer with OpenAI's error body, after which the connection closes."""
    body = msgspec.json.encode(error_body(HttpError(status, message, code=_CODES[status])))
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


_CODES: dict[int, str] = {
    400: "invalid_http_request",
    408: "request_timeout",
    413: "request_too_large",
    431: "headers_too_large",
}


def protocol_factory(
    app: Any, limits: Limits, state: ServerState, on_refused: Callable[[int], None]
) -> Callable[[], Connection]:
    """What `loop.create_server` calls for each client."""
    config = Config(
        app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(limits.keep_alive_s),
    )
    config.load()
    return lambda: Connection(config, state, limits=limits, on_refused=on_refused)

"""Server-sent events: framing, keep-alive comments, and errors after the status line."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from octavo.errors import RequestError
from octavo.server.http import Exchange, error_body
from octavo.server.options import Limits

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_DONE = b"data: [DONE]\n\n"


class EventStream:
    """The answer of a streaming request.

    The status line waits for the first event, at most `commit_s`: until then an error still gets
    its own status. A stream that is silent for `ping_s` sends a comment, so that proxies and
    clients keep it open.
    """

    def __init__(self, exchange: Exchange, limits: Limits) -> None:
        """Arm the timer; nothing is sent yet."""
        self.has_started = False
        self._exchange = exchange
        self._ping_s = limits.ping_s
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._pinger: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(limits.commit_s, self._tick)
        self._last_write = self._loop.time()

    async def send(self, events: Sequence[object]) -> None:
        """Send events as JSON, in one write; waits while the client does not keep up."""
        await self._write(b"".join([b"data: %b\n\n" % msgspec.json.encode(e) for e in events]))

    async def finish(self) -> None:
        """Say that all was sent, and end the answer."""
        await self._end(_DONE)

    async def fail(self, error: RequestError) -> None:
        """Tell a client, that has the status line already, about an error, and end the answer."""
        await self._end(b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n" + _DONE)

    def close(self) -> None:
        """Stop the timer. Must be called in every case."""
        self._timer.cancel()
        if self._pinger is not None:
            self._pinger.cancel()

    async def _end(self, data: bytes) -> None:
        self.close()
        await self._write(data)
        await self._exchange.write(b"", more=False)

    async def _write(self, data: bytes) -> None:
        self._last_write = self._loop.time()
        async with self._lock:
            if not self.has_started:
                self.has_started = True
                await self._exchange.start(200, _HEADERS)
            if data:
                await self._exchange.write(data, more=True)

    def _tick(self) -> None:
        due = self._last_write + self._ping_s
        if not self.has_started or self._loop.time() >= due:
            data = b": ping\n\n" if self.has_started else b""
            self._pinger = asyncio.create_task(self._write(data))
            due = self._loop.time() + self._ping_s
        self._timer = self._loop.call_at(due, self._tick)

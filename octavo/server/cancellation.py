"""Ends a request's work when its client leaves, or when the server must stop waiting for it."""

from __future__ import annotations

import asyncio
from types import TracebackType

from octavo.server.http import ClientGoneError, Exchange
from octavo.server.service import Service, shutting_down


class Cancellation:
    """An async context: its body is cancelled when the client is gone or `cancel` is called.

    Leaving it turns that cancellation into ClientGoneError or the 503 of a shutdown. The body of
    the request must have been read before.
    """

    def __init__(self, service: Service, exchange: Exchange) -> None:
        """Nothing is watched before the context is entered."""
        self._service = service
        self._exchange = exchange
        self._reason: str | None = None
        self._task: asyncio.Task[object] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Cancellation:
        """Begin to watch the client."""
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._watch())
        self._service.cancellations.add(self.cancel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching; raise what the cancellation means."""
        assert self._task is not None
        assert self._watcher is not None
        self._service.cancellations.discard(self.cancel)
        self._watcher.cancel()
        if self._reason is None or kind is not asyncio.CancelledError:
            return
        self._task.uncancel()
        self._service.metrics.count("octavo_requests_cancelled_total", self._reason)
        raise ClientGoneError if self._reason == "disconnect" else shutting_down()

    def cancel(self, reason: str) -> None:
        """End the body: "disconnect" or "shutdown"."""
        if self._reason is None and self._task is not None:
            self._reason = reason
            self._task.cancel()

    async def _watch(self) -> None:
        await self._exchange.wait_gone()
        self.cancel("disconnect")

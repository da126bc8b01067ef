"""Sends an answer as it comes into being."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from octavo.errors import RequestError
from octavo.server.cancellation import Cancellation
from octavo.server.http import Exchange
from octavo.server.service import SHUTTING_DOWN, Service
from octavo.server.sse import EventStream


async def stream_answer(
    service: Service,
    exchange: Exchange,
    groups: AsyncGenerator[Sequence[object]],
    abort_events: Callable[[], Sequence[object]],
) -> None:
    """Send groups of events; a client that leaves closes `groups`, and with it the engine's work.

    Args:
        service: shared by all.
        exchange: the request.
        groups: what to send, each group in one write.
        abort_events: what to send if the server ends before the answer does.

    Raises:
        RequestError: before anything was sent; later errors become an event.
        ClientGoneError: the client left.
    """
    stream = EventStream(exchange, service.limits)
    try:
        async with Cancellation(service, exchange), aclosing(groups):
            async for events in groups:
                await stream.send(events)
        await stream.finish()
    except RequestError as error:
        if not stream.has_started:
            raise
        if error.code == SHUTTING_DOWN:
            await stream.send(abort_events())
        await stream.fail(error)
    finally:
        stream.close()

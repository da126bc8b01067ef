"""Sends an answer as it comes into being."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from octavo.errors import RequestError
from octavo.server.cancellation import Cancellation
from octavo.server.http import Exchange
from octavo.server.service import Service
from octavo.server.sse import EventStream


async def stream_answer(
    service: Service, exchange: Exchange, groups: AsyncGenerator[Sequence[object]]
) -> None:
    """Send groups of events; a client that leaves closes `groups`, and with it the engine's work.

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
        await stream.fail(error)
    finally:
        stream.close()

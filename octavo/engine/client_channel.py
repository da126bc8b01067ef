"""The parent's end of the connection to an engine process, for an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from octavo.engine.transport import HEADER_BYTES, body_length, decode_from_engine, encode
from octavo.types import FromEngine, ToEngine


class ClientChannel:
    """The parent's end, for an event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take over a stream pair; see `open`."""
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> ClientChannel:
        """Attach a connected socket to the running event loop."""
        sock.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=sock))

    def send(self, record: ToEngine) -> None:
        """Queue one frame to be sent; a closed channel swallows it."""
        if not self._writer.is_closing():
            self._writer.write(encode(record))

    async def receive(self) -> FromEngine | None:
        """The next record; None at the end of the stream."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            return decode_from_engine(await self._reader.readexactly(body_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def close(self) -> None:
        """Close the socket: the engine reads the end of the stream and ends."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

"""Frames between parent and engine process: a length, then one msgpack record of `types.py`.

A frame is read with a typed decoder over a closed set of records: bytes can become a wrong record
or a TransportError, never code. Knows sockets and records, nothing of what they mean. Imports no
numpy.
"""

from __future__ import annotations

import select
import socket
import struct

import msgspec

from octavo.errors import OctavoError
from octavo.types import FromEngine, ToEngine

MAX_FRAME_BYTES = 64 << 20
"""A longer frame is a fault: the longest true one is a prompt, a few bytes a token."""

HEADER_BYTES = 4
_HEADER = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class TransportError(OctavoError):
    """The other side sent what is not a frame: a bug of ours, the connection is useless now."""


def encode(record: ToEngine | FromEngine) -> bytes:
    """The frame of a record."""
    body = _ENCODER.encode(record)
    if len(body) > MAX_FRAME_BYTES:
        raise TransportError(
            f"a frame of {len(body):,} bytes is over the limit of {MAX_FRAME_BYTES:,}"
        )
    return _HEADER.pack(len(body)) + body


def body_length(header: bytes | bytearray, start: int = 0) -> int:
    """The length of the body that follows a header.

    Raises:
        TransportError: it is more than MAX_FRAME_BYTES.
    """
    (length,) = _HEADER.unpack_from(header, start)
    if length > MAX_FRAME_BYTES:
        raise TransportError(
            f"a frame of {length:,} bytes is over the limit of {MAX_FRAME_BYTES:,}"
        )
    return int(length)


def decode_to_engine(body: bytes | bytearray | memoryview) -> ToEngine:
    """The record in a frame that the parent sent."""
    try:
        return _TO_ENGINE.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise TransportError(f"malformed frame: {error}") from error


def decode_from_engine(body: bytes | bytearray | memoryview) -> FromEngine:
    """The record in a frame that the engine sent."""
    try:
        return _FROM_ENGINE.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise TransportError(f"malformed frame: {error}") from error


class FrameBuffer:
    """Bytes as they arrive, cut into the bodies of frames."""

    def __init__(self) -> None:
        """Start empty."""
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; return the bodies that are complete now.

        Raises:
            TransportError: a frame announces more than MAX_FRAME_BYTES.
        """
        self._bytes += data
        bodies = []
        start = 0
        while len(self._bytes) - start >= HEADER_BYTES:
            end = start + HEADER_BYTES + body_length(self._bytes, start)
            if end > len(self._bytes):
                break
            bodies.append(bytes(self._bytes[start + HEADER_BYTES : end]))
            start = end
        del self._bytes[:start]
        return bodies


class EngineChannel:
    """The engine's end: blocking, for the loop that alternates between frames and steps."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self._socket = sock
        self._socket.setblocking(True)
        self._buffer = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, record: FromEngine) -> None:
        """Send one frame; waits while the parent does not read."""
        self._socket.sendall(encode(record))

    def receive(self, *, wait: bool) -> list[ToEngine] | None:
        """The records that have arrived; None at the end of the stream.

        Args:
            wait: sleep until there is something; otherwise return what is there, perhaps nothing.
        """
        records: list[ToEngine] = []
        while self._poll.poll(None if wait and not records else 0):
            data = self._socket.recv(1 << 18)
            if not data:
                return None
            records += [decode_to_engine(body) for body in self._buffer.feed(data)]
        return records

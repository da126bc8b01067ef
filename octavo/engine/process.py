"""The engine process: `python -m octavo.engine.process FD`, FD being a socket to the parent.

Reads StartEngine, loads, decodes a token, says EngineReady, and then steps while there is work and
sleeps while there is none. It ends the moment its parent closes the socket or dies, whatever it is
doing. Knows no text.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import threading
import time

import msgspec

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.debug_log import DEBUG_VARIABLE, write_debug_log
from octavo.engine.transport import EngineChannel, TransportError
from octavo.errors import OctavoError, RequestError
from octavo.types import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStats,
    EngineUpdates,
    PrefixCacheReset,
    RequestRejected,
    ResetPrefixCache,
    StartEngine,
    ToEngine,
    TokenUpdate,
)

PROGRESS_INTERVAL_S = 0.05


class EngineLoop:
    """The loop of a loaded engine: frames in, steps, frames out."""

    def __init__(self, core: EngineCore, channel: EngineChannel) -> None:
        """Serve the parent at the other end of `channel`."""
        self._core = core
        self._channel = channel
        self._sent: EngineStats | None = None

    def run(self) -> None:
        """Serve until the parent closes its end."""
        while (records := self._channel.receive(wait=not self._core.has_work())) is not None:
            for record in records:
                self._take(record)
            updates = self._core.step() if self._core.has_work() else []
            self._send(updates)

    def _take(self, record: ToEngine) -> None:
        match record:
            case AddRequest():
                try:
                    self._core.add(record.request)
                except RequestError as error:
                    self._channel.send(
                        RequestRejected(
                            request_id=record.request.request_id,
                            error=type(error).__name__,
                            message=error.message,
                            param=error.param,
                            code=error.code,
                            retry_after_s=getattr(error, "retry_after_s", 1.0),
                        )
                    )
            case AbortRequest():
                self._core.abort(record.request_id, record.index)
            case ResetPrefixCache():
                num_blocks = self._core.reset_prefix_cache()
                self._channel.send(PrefixCacheReset(record.number, num_blocks))
            case StartEngine():
                raise TransportError("an engine is started once")

    def _send(self, updates: list[TokenUpdate]) -> None:
        stats = self._core.stats()
        if updates or stats != self._sent:
            self._channel.send(EngineUpdates(updates=updates, stats=stats))
            self._sent = stats


def serve(sock: socket.socket) -> int:
    """Be an engine on this socket until its other end closes; return the exit code."""
    channel = EngineChannel(sock)
    try:
        core = _load(channel)
        if core is None:
            return 0
        with contextlib.closing(core):
            # What is there now stays: otherwise a full collection walks it in the midst of a step.
            gc.collect()
            gc.freeze()
            channel.send(EngineReady(capacity=core.capacity))
            EngineLoop(core, channel).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the parent has gone; nobody is left to tell
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            sys.excepthook(type(error), error, error.__traceback__)
        with contextlib.suppress(OSError):
            channel.send(EngineFailed(message=_sentence(error)))
        return 1
    return 0


def _load(channel: EngineChannel) -> EngineCore | None:
    records = channel.receive(wait=True)
    if records is None:
        return None
    if len(records) != 1 or not isinstance(records[0], StartEngine):
        raise TransportError("the first frame must start the engine, and requests wait for it")
    config = msgspec.convert(records[0].config, EngineConfig).validate()
    last_phase, last_time = "", 0.0

    def report(phase: str, fraction: float) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        if phase != last_phase or now - last_time >= PROGRESS_INTERVAL_S:
            last_phase, last_time = phase, now
            channel.send(EngineProgress(phase=phase, fraction=fraction))

    return EngineCore.load(config, progress=report)


def _sentence(error: Exception) -> str:
    if isinstance(error, OctavoError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the engine ran out of memory; lower --memory or --max-num-batched-tokens"
    first, _, _ = str(error).partition("\n")  # Torch goes on with advice for its own users.
    if "out of memory" in first:
        return f"the engine ran out of the device's memory; lower --memory ({first})"
    return f"the engine failed: {type(error).__name__}: {first}"


def _end_with_parent(fd: int) -> None:
    """End this process when the other end of the socket is closed, in whatever call it is.

    NOTE: PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the process ends.
    """
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def main() -> int:
    """Run on the socket whose file descriptor is the first argument."""
    write_debug_log()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    sock = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with_parent, args=(sock.fileno(),), daemon=True).start()
    return serve(sock)


if __name__ == "__main__":
    sys.exit(main())

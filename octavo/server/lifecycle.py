"""Runs the application until it is told to stop: readiness, signals, draining.

The port is open from the beginning; `/ready` is 200 once engine and tokenizer are loaded. SIGTERM
or SIGINT drains: running requests may finish for `drain_s`, new ones get a 503. A second signal
ends the process at once. A dead engine ends it too, since a supervisor can start it again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from email.utils import formatdate

from uvicorn.server import ServerState

from octavo.engine.async_engine import AsyncEngine
from octavo.errors import ConfigError, EngineDeadError
from octavo.server.app import App, create_admin_app, create_app
from octavo.server.connection import Connection, protocol_factory
from octavo.server.options import ServerOptions
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.types import Capacity

_BACKLOG = 2048
_TICK_S = 0.05
_ABORT_S = 1.0
"""Requests that are ended have so long to say so to their clients."""
_FLUSH_S = 0.5
"""Answers that are complete have so long to reach slow clients."""


async def serve(
    options: ServerOptions,
    engine: AsyncEngine,
    listener: socket.socket,
    *,
    load_tokenizer: Callable[[], Tokenizer],
    on_ready: Callable[[Capacity], None],
    admin_listener: socket.socket | None = None,
) -> None:
    """Serve until a signal has come and the requests are drained.

    Args:
        options: everything that was asked for.
        engine: launched, perhaps still loading.
        listener: bound and listening.
        load_tokenizer: called in a thread.
        on_ready: called once requests are welcome.
        admin_listener: a Unix socket for the admin routes, bound and listening.

    Raises:
        ConfigError: the model can't be loaded.
        EngineDeadError: the engine ended after it had been ready.
    """
    server = HttpServer(options, engine)
    try:
        await server.open(listener, admin_listener)
        loading = asyncio.create_task(server.load(load_tokenizer))
        await server.wait_for(loading)
        if not server.is_stopping:
            on_ready(loading.result())
            await server.wait_for_end()
        await server.drain()
        loading.cancel()
    finally:
        await server.close()
        await engine.close()
    if engine.failure is not None and server.is_engine_dead:
        raise EngineDeadError(engine.failure)


class HttpServer:
    """A listening socket, its connections, and the engine behind them.

    Attributes:
        is_stopping: a signal has come.
        is_engine_dead: the engine ended by itself.
    """

    def __init__(self, options: ServerOptions, engine: AsyncEngine) -> None:
        """Make the application; nothing listens yet."""
        self.is_stopping = False
        self.is_engine_dead = False
        self._options = options
        self._engine = engine
        self._app = create_app(engine, lambda: engine.tokenizer, options)
        self._state = ServerState()
        self._servers: list[asyncio.Server] = []
        self._clock: asyncio.TimerHandle | None = None

    async def open(self, listener: socket.socket, admin_listener: socket.socket | None) -> None:
        """Answer requests, and listen to signals."""
        loop = asyncio.get_running_loop()
        # Its warning "socket.send() raised exception" is only a client that left.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        self._tick()
        public = self._protocol_factory(self._app)
        self._servers.append(await loop.create_server(public, sock=listener, backlog=_BACKLOG))
        if admin_listener is not None:
            admin = self._protocol_factory(create_admin_app(self._app.service))
            self._servers.append(await loop.create_unix_server(admin, sock=admin_listener))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    async def load(self, load_tokenizer: Callable[[], Tokenizer]) -> Capacity:
        """Load the tokenizer while the engine loads the model.

        Raises:
            ConfigError: one of them failed.
        """
        tokenizer = asyncio.get_running_loop().run_in_executor(None, load_tokenizer)
        # A broken file fails in both; the engine's sentence is told, and this one is not missed.
        tokenizer.add_done_callback(lambda done: done.cancelled() or done.exception())
        await self._engine.connect()
        try:
            capacity = await self._engine.wait_ready()
        except EngineDeadError as error:
            raise ConfigError(error.message) from None
        self._engine.tokenizer = await tokenizer
        return capacity

    async def wait_for(self, task: asyncio.Task[Capacity]) -> None:
        """Return when the task is done or a signal has come."""
        while not self.is_stopping:
            done, _ = await asyncio.wait([task], timeout=_TICK_S)
            if done:
                return

    async def wait_for_end(self) -> None:
        """Return when a signal has come or the engine is dead."""
        while not self.is_stopping:
            if self._engine.failure is not None:
                self.is_engine_dead = True
                return
            await asyncio.sleep(_TICK_S)

    async def drain(self) -> None:
        """Let running requests finish, then end those that have not."""
        service = self._app.service
        service.is_draining = True
        for connection in list(self._state.connections):
            connection.shutdown()  # closes idle ones; others close after their answer
        if not await self._wait_idle(0.0 if self.is_engine_dead else self._options.drain_s):
            for cancel in list(service.cancellations):
                cancel("shutdown")
            await self._wait_idle(_ABORT_S)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _FLUSH_S
        while self._state.connections and loop.time() < deadline:
            for connection in list(self._state.connections):
                connection.shutdown()
            await asyncio.sleep(_TICK_S)

    async def close(self) -> None:
        """Close the port and every connection."""
        for server in self._servers:
            server.close()
        for connection in list(self._state.connections):
            connection.transport.abort()  # what is still being answered ends as if its client left
        await self._wait_idle(_FLUSH_S)
        if self._clock is not None:
            self._clock.cancel()
        self._app.service.prompts.close()

    def _protocol_factory(self, app: App) -> Callable[[], Connection]:
        metrics = app.service.metrics
        return protocol_factory(
            app,
            self._options.limits,
            self._state,
            lambda status: metrics.count("octavo_http_refused_total", str(status)),
        )

    async def _wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is being answered; False if the time did not suffice."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._state.tasks:
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(_TICK_S)
        return True

    def _tick(self) -> None:
        """Renew the date header, which every answer carries."""
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._clock = asyncio.get_running_loop().call_later(1.0, self._tick)

    def _on_signal(self, number: int) -> None:
        if self.is_stopping:
            os._exit(128 + number)  # the engine ends by itself when it reads end of file
        self.is_stopping = True

"""Starts a server: binds the port, launches the engine, and only then imports the rest.

So a taken port is told at once, clients can connect from the first moment, and the model loads in
its own process while this one imports the HTTP stack and builds the tokenizer.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib
import ipaddress
import shlex
import signal
import socket
import sys
from collections.abc import Callable

from octavo.engine.async_engine import AsyncEngine
from octavo.engine.debug_log import write_debug_log
from octavo.errors import ConfigError
from octavo.server.admin_socket import listen_at
from octavo.server.options import Limits, ServerOptions
from octavo.tokenizer.load import load_tokenizer
from octavo.types import Capacity

__all__ = ["Limits", "ServerOptions", "run"]

_BACKLOG = 2048


def run(options: ServerOptions, *, on_ready: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    Args:
        options: everything that was asked for.
        on_ready: called with a few lines for people once requests are welcome; the default
            writes them to stderr.

    Raises:
        ConfigError: the port is taken or the model can't be loaded; one sentence.
        EngineDeadError: the engine ended while it served.
    """
    say = on_ready or _write
    write_debug_log()
    # Until the event loop handles signals itself, SIGTERM ends this like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            bind(options.host, options.port) as listener,
            listen_at(options.admin_socket) as admin_listener,
        ):
            if not options.api_keys and not _is_loopback(listener):
                _write(
                    f"octavo: warning: {options.host} can be reached from other machines and no "
                    "API key is set: anyone there can use this server; set --api-key-file.\n"
                )
            engine = AsyncEngine.launch(options.engine)
            # Only now, since every import before the launch would delay the engine.
            lifecycle = importlib.import_module("octavo.server.lifecycle")

            def ready(capacity: Capacity) -> None:
                gc.collect()
                gc.freeze()
                say(greeting(options, capacity, listener))

            asyncio.run(
                lifecycle.serve(
                    options,
                    engine,
                    listener,
                    load_tokenizer=lambda: load_tokenizer(options.engine.model),
                    on_ready=ready,
                    admin_listener=admin_listener,
                )
            )
    except KeyboardInterrupt:
        return 130
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is taken, forbidden or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no known address: {error.strerror}") from None
    # NOTE: asyncio sets TCP_NODELAY only where the protocol number is given; without it, an answer
    # in two packets takes 40 ms.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_bind_fault(host, port, error)) from None
    return listener


def _bind_fault(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {port} on {host} is taken by another program; "
                "stop that one or choose another port with --port"
            )
        case errno.EACCES:
            return f"port {port} needs root rights; choose one above 1023 with --port"
        case errno.EADDRNOTAVAIL:
            return f"--host {host} is no address of this machine; try 127.0.0.1 or 0.0.0.0"
        case _:
            return f"can't listen on {host}, port {port}: {error.strerror}"


def greeting(options: ServerOptions, capacity: Capacity, listener: socket.socket) -> str:
    """What people want to know first: where the server is, and a line to try."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    url = f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"
    name = options.model_names[0]
    key = " -H 'Authorization: Bearer KEY'" if options.api_keys else ""
    question = '{"role": "user", "content": "What is the capital of France?"}'
    body = f'{{"messages": [{question}], "temperature": 0}}'
    admin = f"Admin socket: {options.admin_socket}\n" if options.admin_socket else ""
    return (
        f"Octavo serves {name} at {url} ({capacity.backend}; context "
        f"{capacity.max_model_len} tokens; KV cache {capacity.kv_pool.num_bytes / 2**20:.0f} MiB)\n"
        "Try it:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(body)}\n{admin}"
    )


def _is_loopback(listener: socket.socket) -> bool:
    host = listener.getsockname()[0]
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()

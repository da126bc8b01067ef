"""What a server is told, and the limits that it holds every client to.

Imports nothing heavy: `serve.run` reads it before the engine process is started.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo.config import EngineConfig


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what one connection or one request may cost; docs/api.md lists them."""

    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    header_deadline_s: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_window_s: float = 10.0
    """In each such window a body must bring `min_body_rate` bytes a second, or end."""
    min_body_rate: int = 1024
    keep_alive_s: float = 60.0
    linger_s: float = 2.0
    """How long the rest of a refused request is read and dropped: else no answer is seen."""
    write_buffer_bytes: int = 64 << 10
    """Unsent bytes of a connection beyond which its stream waits for the client."""
    write_stall_s: float = 60.0
    """A client that takes nothing for so long is cut off."""
    max_json_depth: int = 64
    max_messages: int = 4096
    max_prompts: int = 256
    max_sequences: int = 1024
    """Prompts times n."""
    commit_s: float = 2.0
    """A stream's status line waits so long for the first token: a refusal gets its own status."""
    ping_s: float = 15.0
    """A silent stream sends a comment so often."""


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `serve.run` needs.

    Attributes:
        engine: the engine to start; its `model` is a local path.
        host: the address to listen on.
        port: 0 takes a free one.
        served_name: the name that requests use; empty takes the engine's.
        aliases: further names of the same model.
        api_keys: with none, every client is welcome.
        cache_scope: "key": only requests under one API key share cached prefixes; "global": all do.
        admin_socket: where to serve the admin routes, as a Unix socket; None: nowhere.
        drain_s: how long running requests may finish after SIGTERM.
        limits: bounds on connections and requests.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str = ""
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cache_scope: Literal["key", "global"] = "key"
    admin_socket: str | None = None
    drain_s: float = 30.0
    limits: Limits = Limits()

    @property
    def model_names(self) -> tuple[str, ...]:
        """The served name first, then the aliases."""
        return (self.served_name or self.engine.served_name, *self.aliases)

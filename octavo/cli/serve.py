"""Serve a model through the OpenAI API."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from octavo.cli.options import add_engine_options, add_model, engine_config
from octavo.errors import ConfigError
from octavo.server.serve import ServerOptions, run


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the server until it is told to stop."""
    add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    group.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="the name that requests use (default: MODEL)"
    )
    group.add_argument(
        "--api-key-file", metavar="FILE", help="a key a line; better than --api-key, which ps shows"
    )
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="requests must carry one of these keys (repeatable)",
    )  # fmt: skip
    group.add_argument(
        "--cache-scope", choices=("key", "global"), default="key",
        help="who shares cached prefixes: those of one API key, or all (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--admin-socket", metavar="PATH",
        help="serve the admin routes at this Unix socket (default: nowhere)",
    )  # fmt: skip
    group.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS",
        help="how long running requests may finish after SIGTERM (default: %(default)s)",
    )  # fmt: skip
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port must be 0 to 65535, not {options.port}")
    return run(
        ServerOptions(
            engine=engine_config(options),
            host=options.host,
            port=options.port,
            served_name=options.served_model_name or options.model,
            api_keys=tuple(options.api_key) + _read_keys(options.api_key_file),
            cache_scope=options.cache_scope,
            admin_socket=options.admin_socket,
            drain_s=options.drain,
        )
    )


def _read_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        keys = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} can't be read: {error.strerror}") from None
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key: write one a line")
    return tuple(keys)

"""Measure start-up, latency, throughput or a running server; --json for machines.

octavo bench startup     from exec to the first token, and the memory of all processes
octavo bench latency     one request at a time: time to first token, time a token
octavo bench throughput  many requests through the engine, without HTTP
octavo bench memory      what every byte of the KV pool is while many requests run
octavo bench serve       many clients against a running server, with HTTP
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

KINDS = ("startup", "latency", "throughput", "memory", "serve")


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run one benchmark and print its figures."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if not arguments or arguments[0] not in KINDS:
        parser.add_argument("kind", choices=KINDS)
        parser.parse_args(arguments)
        return 0
    module = importlib.import_module(f"octavo.cli.bench.{arguments[0]}")
    own = type(parser)(prog=f"{parser.prog} {arguments[0]}", description=module.__doc__)
    own.add_argument("--json", action="store_true", help="machine-readable, one line")
    module.add_options(own)
    options = own.parse_args(arguments[1:])
    figures: dict[str, object] = module.measure(options)
    if options.json:
        print(json.dumps(figures))
        return 0
    width = max(map(len, figures))
    for name, value in figures.items():
        sys.stdout.write(f"{name:<{width}}  {_readable(value)}\n")
    return 0


def _readable(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)

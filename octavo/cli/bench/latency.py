"""One request at a time through the engine in this process: what a single user feels."""

from __future__ import annotations

import argparse

from octavo.cli.bench import throughput
from octavo.cli.bench.workload import add_workload_options
from octavo.cli.options import add_engine_options, add_model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model(parser)
    add_workload_options(parser, requests=8)
    add_engine_options(parser)
    parser.set_defaults(concurrency=1, no_prefix_cache=True)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """A closed loop of one."""
    return throughput.measure(options)

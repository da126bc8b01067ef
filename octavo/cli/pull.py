"""Fetch a model into the cache, check it, and print where it lies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from octavo.cli.options import MODEL_HELP
from octavo.cli.progress import ProgressLine
from octavo.weights import source


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Pull one model."""
    parser.add_argument("model", help=MODEL_HELP)
    options = parser.parse_args(arguments)
    with ProgressLine() as line:
        path = source.pull(options.model, progress=line.bytes)
    print(path)
    return 0

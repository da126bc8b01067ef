"""Remove a model from the cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from octavo.cli.progress import human_bytes
from octavo.weights import source


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Remove one model, by the name that `octavo list` shows."""
    parser.add_argument("model", help="a name that octavo list shows")
    options = parser.parse_args(arguments)
    print(f"Freed {human_bytes(source.remove(options.model))}.")
    return 0

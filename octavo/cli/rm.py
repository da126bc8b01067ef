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
    sizes = {model.name: model.num_bytes for model in source.list_models()}
    source.remove(options.model)
    print(f"Freed {human_bytes(sizes.get(options.model, 0))}.")
    return 0

"""Show the models in the cache: name, size, path."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from octavo.cli.progress import human_bytes
from octavo.weights import source


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Print a line a model."""
    parser.parse_args(arguments)
    models = source.list_models()
    if not models:
        print("The cache is empty; octavo pull smollm2 fetches the default model.")
        return 0
    width = max(len(model.name) for model in models)
    for model in models:
        print(f"{model.name:<{width}}  {human_bytes(model.num_bytes):>10}  {model.path}")
    return 0

"""Start-up, memory, and the default model at C=1, 16 and 64, in the engine and through HTTP.

    python benchmarks/engine.py [--model FILE] [--save]

Calls the commands that anybody can call: `octavo bench startup|throughput|serve`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

from octavo.cli.bench.client import get, parse_url
from octavo.cli.bench.report import save
from octavo.errors import ConfigError

CONCURRENCY = {1: 6, 16: 48, 64: 128}
"""Requests at each number of clients."""


def octavo(*arguments: str) -> dict[str, Any]:
    """The figures of one `octavo bench` command."""
    command = [sys.executable, "-P", "-m", "octavo.cli.main", "bench", *arguments, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def served(model: str) -> dict[str, Any]:
    """The workload through `octavo serve`, at each number of clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "octavo.cli.main", "serve", model, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                get(parse_url(url), "/ready")
                break
            except ConfigError:
                if server.poll() is not None:
                    raise
                time.sleep(0.05)
        return {
            # A seed of its own each, or the prefix cache would know the prompts of the last one.
            str(c): octavo(
                "serve",
                "--url",
                url,
                "--concurrency",
                str(c),
                "--requests",
                str(n),
                "--seed",
                str(c),
            )
            for c, n in CONCURRENCY.items()
        }
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Print and perhaps save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    figures: dict[str, Any] = {"model": options.model}
    figures["startup"] = octavo("startup", options.model)
    print(json.dumps(figures["startup"]), flush=True)
    figures["engine"] = {
        str(c): octavo(
            "throughput", options.model, "--concurrency", str(c), "--requests", str(n),
            "--no-prefix-cache",
        )
        for c, n in CONCURRENCY.items()
    }  # fmt: skip
    figures["http"] = served(options.model)
    for way in ("engine", "http"):
        for c, result in figures[way].items():
            print(
                f"{way:<7} C={c:<3} {result['output_tokens_per_s']:8.1f} output tok/s"
                f"  first token {result['ttft_ms_p50']:8.1f} ms"
                f"  between tokens {result['itl_ms_p50']:6.1f} ms"
            )
    if options.save:
        print(save(pathlib.Path(__file__).parent / "results", "engine", figures))


if __name__ == "__main__":
    main()

"""The machine's own limits now: int8 products, fp32 FMA and bytes read, one thread and all threads.

    python benchmarks/cpu/limits.py [--json]

Two or three seconds. native/limits.cpp measures; the system's C++ compiler ($CXX or c++) builds it
on the first use, into the cache folder. What each figure is stands there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

from octavo.config import available_cpus
from octavo.errors import ConfigError
from octavo.weights.cache import cache_home

NATIVE = pathlib.Path(__file__).resolve().parent / "native"

Limits = dict[str, Any]
"""Threads as text → {"int8": {isa: GOP/s}, "fp32": {isa: GOP/s}, "read": GB/s}."""


def build(name: str, flags: Sequence[str] = (), reads: Sequence[pathlib.Path] = ()) -> pathlib.Path:
    """The program of native/NAME.cpp, compiled unless the same text was before.

    Args:
        name: of the file, without its ending.
        flags: for the compiler, beside -O2.
        reads: files that it includes, whose change means compiling again.

    Raises:
        ConfigError: there is no compiler, or it refuses the file.
    """
    source = NATIVE / f"{name}.cpp"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", "-O2", "-pthread", *flags, str(source)]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in (source, *reads):
        digest.update(path.read_bytes())
    program = cache_home() / "benchmarks" / f"{name}-{digest.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".partial-{os.getpid()}")
        try:
            done = subprocess.run(
                [*command, "-o", str(partial)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ConfigError(f"no C++ compiler: {error}; install one or set CXX") from None
        if done.returncode != 0:
            raise ConfigError(f"{compiler} cannot compile {source.name}: {done.stderr[-2000:]}")
        partial.replace(program)
    return program


def limits(threads: int | None = None) -> Limits:
    """Measure now, with one thread and with this many (default: all CPUs given)."""
    count = available_cpus() if threads is None else threads
    done = subprocess.run(
        [str(build("limits")), str(count)], capture_output=True, text=True, check=True
    )
    measured: Limits = json.loads(done.stdout)
    return measured


def highest(a: Limits, b: Limits) -> Limits:
    """The greater of two measurements, figure by figure: what the machine gave at its best."""
    return {
        key: highest(value, b[key]) if isinstance(value, dict) else max(value, b[key])
        for key, value in a.items()
    }


def describe(measured: Limits) -> str:
    """Lines for people."""
    lines = []
    for threads, figures in measured.items():
        lines.append(f"{threads} thread{'s' if threads != '1' else ''}:")
        for kind, words in (("int8", "int8 GOP/s"), ("fp32", "fp32 GFLOP/s")):
            values = ", ".join(f"{isa} {value:.0f}" for isa, value in figures[kind].items())
            lines.append(f"  {words:<13} {values or 'not measured on this architecture'}")
        lines.append(f"  read GB/s     {figures['read']:.1f}")
    return "\n".join(lines)


def main() -> None:
    """Print the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measured = limits()
    print(json.dumps(measured, indent=1) if options.json else describe(measured))


if __name__ == "__main__":
    main()

"""The `octavo` command: finds the subcommand, imports it alone, turns errors into one last line.

Exit codes: 0 done, 1 a fault that Octavo explains, 2 a wrong option, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from octavo.errors import OctavoError

COMMANDS = {
    "serve": "serve a model through the OpenAI API",
    "chat": "talk to a model in the terminal",
    "run": "answer one prompt",
    "pull": "fetch a model into the cache",
    "list": "show the models in the cache",
    "rm": "remove a model from the cache",
    "plan": "say whether a model fits, before loading it",
    "bench": "measure start-up, latency, throughput or a running server",
}
DEBUG_VARIABLE = "OCTAVO_DEBUG"


class Parser(argparse.ArgumentParser):
    """An argument parser whose last line names the fault and the nearest option that exists."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        hint = ""
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if unknown and unknown[0] != message.split()[0]:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parse all arguments; unknown ones are this parser's own error, with its own options."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in ("-V", "--version", "version"):
        version = importlib.import_module("octavo").__version__
        sys.stdout.write(f"octavo {version}\n")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f" (known: {', '.join(COMMANDS)})"
        sys.stderr.write(f"octavo: error: unknown command {name!r}{hint}\n")
        return 2
    try:
        module = importlib.import_module(f"octavo.cli.{name}")
        code: int = module.main(Parser(prog=f"octavo {name}", description=module.__doc__), rest)
    except OctavoError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        sys.stderr.write(f"octavo {name}: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "Usage: octavo COMMAND [OPTIONS]\n\n"
        + "\n".join(lines)
        + "\n\noctavo COMMAND --help shows a command's options; octavo --version the version.\n"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Answer one prompt: octavo run "What is the capital of France?" (- reads it from stdin)."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from octavo.cli.options import DEFAULT_MODEL, MODEL_HELP, add_engine_options
from octavo.cli.session import Message, add_sampling_options, open_session


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Stream the answer to stdout."""
    parser.add_argument("prompt", help="the prompt, or - to read it from stdin")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    add_sampling_options(parser)
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    return asyncio.run(_run(options))


async def _run(options: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    session = await open_session(options)
    try:
        async for delta in session.answer(messages):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    finally:
        await session.close()
    return 0

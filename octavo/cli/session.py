"""An engine process with its tokenizer for commands that talk to one model: `run` and `chat`."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from octavo.cli.options import engine_config
from octavo.cli.progress import ProgressLine
from octavo.engine.async_engine import AsyncEngine
from octavo.errors import ConfigError
from octavo.tokenizer.load import Tokenizer, load_tokenizer
from octavo.types import OutputDelta, SamplingParams

Message = dict[str, Any]


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add what `run` and `chat` can be told about the answer."""
    group = parser.add_argument_group("answer")
    group.add_argument("--system", metavar="TEXT", help="a system message")
    group.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)"
    )
    group.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="default: 1, none")
    group.add_argument("--seed", type=int, help="makes sampled answers repeatable")


class Session:
    """A loaded model that answers conversations, a delta at a time."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, params: SamplingParams) -> None:
        """Use `open_session` instead."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._params = params
        self._ids = (f"cli-{number}" for number in itertools.count())

    async def answer(self, messages: Sequence[Message]) -> AsyncIterator[OutputDelta]:
        """Stream the answer to a conversation; closing the iterator stops the model."""
        template = self._tokenizer.chat_template
        if template is None:
            spans_ids = self._tokenizer.encode(messages[-1]["content"])
        else:
            spans_ids = self._tokenizer.encode_spans(template.render(list(messages)))
        stream = self._engine.generate(spans_ids, self._params, request_id=next(self._ids))
        async for delta in stream:
            yield delta

    async def close(self) -> None:
        """End the engine process."""
        await self._engine.close()


async def open_session(options: argparse.Namespace) -> Session:
    """Start the engine process and load the tokenizer beside it, with a progress line."""
    config = engine_config(options)
    engine = AsyncEngine.launch(config)
    try:
        with ProgressLine() as line:
            await engine.connect()
            tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
            engine.tokenizer = tokenizer
            ready = asyncio.ensure_future(engine.wait_ready())
            while not ready.done():
                if sys.stderr.isatty():
                    line.fraction(engine.phase, engine.progress)
                await asyncio.wait([ready], timeout=0.05)
            ready.result()
    except BaseException:
        await engine.close()
        raise
    if engine.failure is not None:
        raise ConfigError(engine.failure)
    params = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        max_tokens=options.max_tokens,
    )
    return Session(engine, tokenizer, params)

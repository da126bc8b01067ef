"""Talk to a model in the terminal. The conversation is remembered; Ctrl-C stops an answer."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from octavo.cli.options import add_engine_options, add_model
from octavo.cli.session import Message, Session, add_sampling_options, open_session
from octavo.errors import RequestError
from octavo.weights.cache import cache_home

HELP = """\
/clear          forget the conversation
/system TEXT    set the system message and begin anew
/retry          answer the last question once more
/stats          show or hide tokens a second
/exit           leave (Ctrl-D too); Ctrl-C stops an answer
A line that ends with \\ goes on in the next one."""
PROMPT, BOLD, DIM, PLAIN = "> ", "\x1b[1m", "\x1b[2m", "\x1b[0m"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the conversation until the user leaves."""
    add_model(parser)
    add_sampling_options(parser)
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    history = _line_history(cache_home() / "chat_history")
    with history:
        return asyncio.run(_chat(options))


async def _chat(options: argparse.Namespace) -> int:
    session = await open_session(options)
    try:
        conversation = Conversation(session, options.system)
        print(f"{options.model} is ready. /help shows the commands.")
        while (line := await _read()) is not None:
            if line.startswith("/"):
                if not await conversation.command(line):
                    break
            elif line.strip():
                await conversation.ask(line)
    finally:
        await session.close()
    return 0


class Conversation:
    """The messages so far and what can be done with them."""

    def __init__(self, session: Session, system: str | None) -> None:
        """Begin with the system message, if there is one."""
        self._session = session
        self._shows_stats = False
        self._begin(system)

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._messages: list[Message] = []
        if system:
            self._messages.append({"role": "system", "content": system})

    async def command(self, line: str) -> bool:
        """Obey a /command; false means leave."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/clear":
            self._begin(self._system)
        elif name == "/system":
            self._begin(rest.strip() or None)
        elif name == "/stats":
            self._shows_stats = not self._shows_stats
        elif name == "/retry":
            questions = [m["content"] for m in self._messages if m["role"] == "user"]
            if questions:
                while self._messages.pop()["role"] != "user":
                    pass
                await self.ask(questions[-1])
        else:
            print(HELP)
        return True

    async def ask(self, question: str) -> None:
        """Stream one answer and remember it; a stopped answer is remembered as far as it came."""
        self._messages.append({"role": "user", "content": question})
        task = asyncio.ensure_future(self._stream())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            answer = await task
        except RequestError as error:
            self._messages.pop()
            sys.stderr.write(f"{error}\n")
            return
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        self._messages.append({"role": "assistant", "content": answer})

    async def _stream(self) -> str:
        text, count, began, first = "", 0, time.perf_counter(), 0.0
        stream = self._session.answer(self._messages)
        try:
            async for delta in stream:
                first = first or time.perf_counter()
                count += len(delta.token_ids)
                text += delta.text
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        except asyncio.CancelledError:
            sys.stdout.write(f" {DIM}(stopped){PLAIN}")
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        sys.stdout.write("\n")
        if self._shows_stats and count > 1:
            rate = (count - 1) / max(time.perf_counter() - first, 1e-9)
            waited = (first - began) * 1e3
            print(f"{DIM}{count} tokens, first after {waited:.0f} ms, {rate:.1f}/s{PLAIN}")
        return text


async def _read() -> str | None:
    """One question, perhaps over several lines; None at the end of input."""
    lines: list[str] = []
    while True:
        try:
            line = await asyncio.to_thread(input, PROMPT if not lines else "  ")
        except EOFError:
            print()
            return None
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


@contextlib.contextmanager
def _line_history(path: Path):  # type: ignore[no-untyped-def]
    """Arrow keys bring earlier questions back, also from earlier conversations."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)

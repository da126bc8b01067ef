"""AsyncEngine: an engine process, and an async iterator of text for each request.

`launch` starts the process before anything heavy is imported, so that the model loads while its
caller sets itself up. Knows text and ids; imports no numpy.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from octavo.config import EngineConfig
from octavo.engine.client_channel import ClientChannel
from octavo.engine.delta_queue import DeltaQueue
from octavo.engine.launch import EngineProcess
from octavo.engine.output import OutputProcessor
from octavo.engine.validation import complete_request
from octavo.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
)
from octavo.types import (
    OPEN_CACHE,
    AbortRequest,
    AddRequest,
    CacheParams,
    Capacity,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStats,
    EngineUpdates,
    FromEngine,
    OutputDelta,
    PrefixCacheReset,
    RequestRejected,
    ResetPrefixCache,
    SamplingParams,
)

if TYPE_CHECKING:  # an engine is launched before the tokenizers library is imported
    from octavo.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger("octavo.engine")

CLOSE_TIMEOUT_S = 2.0
"""How long the engine process may take to end by itself, and again after SIGTERM."""


class AsyncEngine:
    """The client's side of one engine process.

    Attributes:
        tokenizer: turns ids into text; set before the first `generate`.
        phase: "starting", a phase of loading, "ready", "failed" or "closed".
        progress: the fraction of that phase that is done.
        capacity: None until the engine is ready.
        failure: why the engine is dead, one sentence; None while it is alive.
        stats: as of the engine's last step.
    """

    def __init__(self, process: EngineProcess, tokenizer: Tokenizer | None = None) -> None:
        """Take over a process that was just started; see `launch`."""
        self._process = process
        self._channel: ClientChannel | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._settled = asyncio.Event()
        self._queues: dict[str, DeltaQueue] = {}
        self._resets: dict[int, asyncio.Future[int]] = {}
        self._numbers = itertools.count()
        self.phase = "starting"
        self.progress = 0.0
        self.capacity: Capacity | None = None
        self.failure: str | None = None
        self.stats = EngineStats()
        self.tokenizer = tokenizer

    @classmethod
    def launch(cls, config: EngineConfig, tokenizer: Tokenizer | None = None) -> AsyncEngine:
        """Start the engine process; needs no event loop and waits for nothing.

        Raises:
            ConfigError: the configuration is at fault.
        """
        return cls(EngineProcess.start(config), tokenizer)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that turns ids into text."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._processor = None if tokenizer is None else OutputProcessor(tokenizer)

    @property
    def pid(self) -> int:
        """The process id of the engine."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code of the engine process, negative for a signal; None while it runs."""
        return self._process.exit_code

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._queues)

    async def connect(self) -> None:
        """Begin to listen to the engine, in the running event loop; idempotent."""
        async with self._connecting:
            if self._channel is None and self.failure is None:
                self._channel = await ClientChannel.open(self._process.socket)
                self._reader = asyncio.create_task(self._listen(self._channel))

    async def wait_ready(self) -> Capacity:
        """Wait until the engine has decoded its first token.

        Raises:
            EngineDeadError: it failed instead; the message is one sentence with the cause.
        """
        await self.connect()
        await self._settled.wait()
        if self.capacity is None or self.failure is not None:
            raise EngineDeadError(self.failure or "the engine is closed")
        return self.capacity

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache: CacheParams = OPEN_CACHE,
        client: str = "",
    ) -> AsyncIterator[OutputDelta]:
        """Answer a prompt, a delta at a time.

        Closing or cancelling the iterator ends the request in the engine. A consumer that is slow
        gets fewer and longer deltas.

        Raises:
            InvalidRequestError, ContextLengthError, OverloadedError: the request is refused.
            EngineDeadError: the engine ended before the request did.
        """
        capacity = await self.wait_ready()
        assert self._channel is not None and self._processor is not None, "set `tokenizer` first"
        # Requests are numbered on the wire: a number is never used twice, so an update of an
        # aborted request cannot be taken for one of a later request that bears the same name.
        number = str(next(self._numbers))
        request = complete_request(
            number,
            prompt_ids,
            params,
            capacity,
            priority=priority,
            cache=cache,
            client=client,
        )
        _log.debug("request %s is %s in the engine", request_id, number)
        self._processor.add(number, len(prompt_ids), request.params, shown_id=request_id)
        queue = self._queues[number] = DeltaQueue()
        self._channel.send(AddRequest(request=request))
        try:
            running = params.n
            while running:
                delta = await queue.get()
                running -= delta.finish_reason is not None
                yield delta
        finally:
            self._forget(number)
            if running and not queue.is_failed:
                self._channel.send(AbortRequest(request_id=number))

    async def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes, pinned ones too; return how many blocks they had.

        Requests that run go on; what they compute is not cached.

        Raises:
            EngineDeadError: the engine has ended.
        """
        await self.wait_ready()
        assert self._channel is not None
        number = next(self._numbers)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._resets[number] = done
        self._channel.send(ResetPrefixCache(number))
        try:
            return await done
        finally:
            del self._resets[number]

    async def close(self) -> None:
        """End the engine process; requests still running get an EngineDeadError. Idempotent."""
        self._end("the engine was closed", phase="closed")
        if self._channel is not None:
            await self._channel.close()
        self._process.socket.close()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                self._process.signal(number)
            if await self._wait_exit(CLOSE_TIMEOUT_S) is not None:
                break

    async def _listen(self, channel: ClientChannel) -> None:
        failure = None
        try:
            while (record := await channel.receive()) is not None:
                self._take(record)
        except Exception as error:  # a bug of ours, here or there: nobody may wait for ever
            failure = f"the engine's output cannot be read: {type(error).__name__}: {error}"
            self._process.signal(signal.SIGKILL)
        if failure is None and self.failure is None:
            code = await self._wait_exit(1.0)
            failure = f"the engine process ended unexpectedly ({_describe_exit(code)})"
        self._end(failure or "", phase="failed")

    def _take(self, record: FromEngine) -> None:
        match record:
            case EngineUpdates():
                self._update(record)
            case EngineProgress():
                self.phase, self.progress = record.phase, record.fraction
            case EngineReady():
                self.capacity = record.capacity
                self.phase, self.progress = "ready", 1.0
                self._settled.set()
            case EngineFailed():
                self._end(record.message, phase="failed")
            case RequestRejected():
                queue = self._queues.get(record.request_id)
                if queue is not None:
                    queue.fail(_rejection(record))
            case PrefixCacheReset():
                done = self._resets.get(record.number)
                if done is not None and not done.done():
                    done.set_result(record.num_blocks)

    def _update(self, record: EngineUpdates) -> None:
        self.stats = record.stats
        assert self._channel is not None
        for update in record.updates:
            queue = self._queues.get(update.request_id)
            if queue is None or self._processor is None:
                continue  # closed by its consumer meanwhile
            result = self._processor.process(update)
            for delta in result.deltas:
                queue.put(delta)
            if result.is_stopped_here:
                self._channel.send(AbortRequest(request_id=update.request_id, index=update.index))

    def _forget(self, number: str) -> None:
        del self._queues[number]
        if self._processor is not None:
            self._processor.remove(number)

    def _end(self, failure: str, *, phase: str) -> None:
        """Note the end, once, and tell every request."""
        if self.failure is None:
            self.failure = failure
            self.phase = phase
        self._settled.set()
        for queue in self._queues.values():
            queue.fail(EngineDeadError(self.failure))
        for done in self._resets.values():
            if not done.done():
                done.set_exception(EngineDeadError(self.failure))

    async def _wait_exit(self, timeout_s: float) -> int | None:
        """Wait for the process to end; None if it is still alive after the time."""
        deadline = time.monotonic() + timeout_s
        while (code := self.exit_code) is None and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return code


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "its connection is closed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _rejection(record: RequestRejected) -> RequestError:
    match record.error:
        case "ContextLengthError":
            return ContextLengthError(record.message, param=record.param)
        case "OverloadedError":
            return OverloadedError(
                record.message, retry_after_s=record.retry_after_s, code=record.code
            )
        case _:
            return InvalidRequestError(record.message, param=record.param, code=record.code)

"""Runs the prompts of one request: merges their answers, keeps time, counts tokens."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from octavo.errors import RequestError
from octavo.server.answers import PromptTokensDetails, Usage
from octavo.server.http import Exchange
from octavo.server.service import Service
from octavo.types import CacheParams, FinishReason, OutputDelta, SamplingParams, TokenLogprob


class Choice:
    """One answer so far."""

    __slots__ = ("finish_reason", "last_token_at", "logprobs", "num_tokens", "stop_reason", "texts")

    def __init__(self) -> None:
        """Empty."""
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.last_token_at = 0.0


class Generation:
    """The answers to one request: `len(prompts)` times `params.n` choices.

    Choices are numbered prompt by prompt, as OpenAI does.

    Attributes:
        id: of the answer, such as "chatcmpl-...".
        created: Unix time.
        choices: filled while `deltas` runs.
    """

    def __init__(
        self,
        service: Service,
        exchange: Exchange,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        answer_id: str,
        priority: int,
        cache: CacheParams,
    ) -> None:
        """Nothing runs before `deltas` is iterated."""
        self.id = answer_id
        self.created = int(time.time())
        self.choices = [Choice() for _ in range(len(prompts) * params.n)]
        self._service = service
        self._exchange = exchange
        self._prompts = prompts
        self._params = params
        self._priority = priority
        self._cache = cache
        self._cached = [0] * len(prompts)

    def usage(self) -> Usage:
        """The usage so far."""
        prompt = sum(len(ids) for ids in self._prompts)
        completion = sum(choice.num_tokens for choice in self.choices)
        cached = PromptTokensDetails(sum(self._cached))
        return Usage(prompt, completion, prompt + completion, cached)

    async def run(self) -> None:
        """Wait for all answers, collected in `choices`."""
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choice = self.choices[delta.index]
                choice.texts.append(delta.text)
                choice.logprobs += delta.logprobs

    async def deltas(self) -> AsyncGenerator[OutputDelta]:
        """What is new, with `index` numbered over all prompts. Closing it aborts what still runs.

        Raises:
            RequestError: the engine refused the request, or can't finish it.
        """
        source = self._one(0) if len(self._prompts) == 1 else self._merged()
        async with aclosing(source) as deltas:
            async for delta in deltas:
                self._record(delta)
                yield delta
        metrics = self._service.metrics
        metrics.e2e_latency.observe(time.monotonic() - self._exchange.arrived)
        metrics.prompt_tokens.observe(sum(len(ids) for ids in self._prompts))
        metrics.generation_tokens.observe(sum(choice.num_tokens for choice in self.choices))

    async def _one(self, number: int) -> AsyncGenerator[OutputDelta]:
        """The deltas of one prompt, renumbered."""
        first = number * self._params.n
        answer = self._service.engine.generate(
            self._prompts[number],
            self._params,
            request_id=self._service.new_engine_id(self._exchange.request_id),
            priority=self._priority,
            client=self._exchange.key_name,
            cache=self._cache,
        )
        async with aclosing(cast("AsyncGenerator[OutputDelta]", answer)) as deltas:
            async for delta in deltas:
                self._cached[number] = delta.usage.num_cached_tokens
                if first == 0:
                    yield delta
                    continue
                yield OutputDelta(
                    request_id=delta.request_id,
                    index=first + delta.index,
                    text=delta.text,
                    token_ids=delta.token_ids,
                    logprobs=delta.logprobs,
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )

    async def _merged(self) -> AsyncGenerator[OutputDelta]:
        """The deltas of all prompts as they come."""
        queue: asyncio.Queue[OutputDelta | Exception | None] = asyncio.Queue(256)

        async def pump(number: int) -> None:
            try:
                async with aclosing(self._one(number)) as deltas:
                    async for delta in deltas:
                        await queue.put(delta)
                await queue.put(None)
            except Exception as error:  # handed on, below
                await queue.put(error)

        tasks = [asyncio.create_task(pump(i)) for i in range(len(self._prompts))]
        try:
            num_open = len(tasks)
            while num_open:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _record(self, delta: OutputDelta) -> None:
        """Keep time and count; raise if the sequence ended in an error."""
        metrics = self._service.metrics
        choice = self.choices[delta.index]
        num_new = len(delta.token_ids)
        if num_new:
            now = time.monotonic()
            if choice.num_tokens == 0:
                metrics.time_to_first_token.observe(now - self._exchange.arrived)
            else:
                gap = (now - choice.last_token_at) / num_new
                metrics.inter_token_latency.observe(gap, num_new)
            choice.last_token_at = now
            choice.num_tokens += num_new
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
            metrics.count("octavo_sequences_finished_total", delta.finish_reason)
            if delta.finish_reason == "error":
                raise RequestError(
                    "The model's output was not a finite number, so the request was ended.",
                    code="numerical_error",
                )


def new_answer_id(prefix: str, asked: str | None) -> str:
    """An id for an answer: with what the client asked for, or a random one."""
    return f"{prefix}-{asked or secrets.token_hex(12)}"

"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing

from msgspec import UNSET

from octavo.engine.validation import validate_params
from octavo.errors import InvalidRequestError
from octavo.server.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
)
from octavo.server.cancellation import Cancellation
from octavo.server.generation import Generation, new_answer_id
from octavo.server.http import Exchange
from octavo.server.logprobs import chat_logprobs
from octavo.server.parsing import parse_generation
from octavo.server.ports import Tokenizer
from octavo.server.prompts import ChatPrompt
from octavo.server.protocol import ChatFields, GenerationFields, StreamOptions
from octavo.server.service import Service
from octavo.server.streaming import stream_answer
from octavo.types import OutputDelta, SamplingParams, TokenLogprob


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Answer a conversation."""
    body = await service.read_json(exchange)
    shared, own = parse_generation(body, GenerationFields, ChatFields)
    model = service.model_name(shared.model)
    params = _params(shared, own)
    tokenizer, capacity = service.require_ready()
    validate_params(params, capacity.vocab_size)
    prompt = ChatPrompt(
        own.messages,
        own.chat_template_kwargs,
        add_generation_prompt=own.add_generation_prompt,
        continue_final_message=own.continue_final_message,
    )

    async def begin() -> Generation:
        ids = await service.prompts.encode_chat(prompt, tokenizer, capacity)
        answer_id = new_answer_id("chatcmpl", shared.request_id)
        return Generation(
            service,
            exchange,
            [ids],
            params,
            answer_id=answer_id,
            priority=shared.priority,
            cache=service.cache_params(exchange, shared),
        )

    writer = _Writer(
        model,
        tokenizer,
        has_logprobs=own.logprobs,
        options=shared.stream_options or StreamOptions(),
    )
    if shared.stream:
        await stream_answer(service, exchange, writer.stream(begin()), writer.abort_events)
        return
    async with Cancellation(service, exchange):
        generation = await begin()
        await generation.run()
    await exchange.answer_json(writer.whole(generation))


def _params(shared: GenerationFields, own: ChatFields) -> SamplingParams:
    if own.top_logprobs and not own.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if shared.stream_options is not None and not shared.stream:
        raise InvalidRequestError("stream_options needs stream.", param="stream_options")
    newer, older = own.max_completion_tokens, shared.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ; give one of them.",
            param="max_completion_tokens",
        )
    return shared.sampling_params(
        max_tokens=older if newer is None else newer,
        logprobs=own.top_logprobs if own.logprobs else None,
    )


class _Writer:
    """Puts a generation into OpenAI's chat objects."""

    def __init__(
        self, model: str, tokenizer: Tokenizer, *, has_logprobs: bool, options: StreamOptions
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._options = options
        self._generation: Generation | None = None

    def whole(self, generation: Generation) -> ChatCompletion:
        """The answer of a request that does not stream."""
        return ChatCompletion(
            id=generation.id,
            created=generation.created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=i,
                    message=AssistantMessage("".join(choice.texts)),
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=choice.finish_reason or "abort",
                    stop_reason=choice.stop_reason,
                )
                for i, choice in enumerate(generation.choices)
            ],
            usage=generation.usage(),
        )

    async def stream(self, begin: Awaitable[Generation]) -> AsyncGenerator[Sequence[ChatChunk]]:
        """The events of a request that streams."""
        generation = self._generation = await begin
        begun: set[int] = set()

        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                events = []
                if delta.index not in begun:
                    begun.add(delta.index)
                    first = Delta(role="assistant", content="")
                    events.append(self._chunk([ChatChunkChoice(index=delta.index, delta=first)]))
                events += [self._chunk([choice]) for choice in self._choices(delta)]
                if events:
                    yield events
        if self._options.include_usage:
            yield [self._chunk([], is_last=True)]

    def abort_events(self) -> list[ChatChunk]:
        """What tells a stream's client that the rest of the answer will not come."""
        choices = self._generation.choices if self._generation is not None else []
        return [
            self._chunk([ChatChunkChoice(index=i, delta=Delta(), finish_reason="abort")])
            for i, choice in enumerate(choices)
            if choice.finish_reason is None
        ]

    def _chunk(self, choices: list[ChatChunkChoice], *, is_last: bool = False) -> ChatChunk:
        assert self._generation is not None
        has_usage = is_last or self._options.continuous_usage_stats
        without = None if self._options.include_usage else UNSET
        return ChatChunk(
            id=self._generation.id,
            created=self._generation.created,
            model=self._model,
            choices=choices,
            usage=self._generation.usage() if has_usage else without,
        )

    def _choices(self, delta: OutputDelta) -> list[ChatChunkChoice]:
        found = []
        if delta.text or (self._has_logprobs and delta.logprobs):
            found.append(
                ChatChunkChoice(
                    index=delta.index,
                    delta=Delta(content=delta.text),
                    logprobs=self._logprobs(delta.logprobs),
                )
            )
        if delta.finish_reason is not None:
            found.append(
                ChatChunkChoice(
                    index=delta.index,
                    delta=Delta(),
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
            )
        return found

    def _logprobs(self, positions: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, positions) if self._has_logprobs else None

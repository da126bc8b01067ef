"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing

import msgspec
from msgspec import UNSET

from octavo.engine.validation import validate_params
from octavo.errors import InvalidRequestError
from octavo.server.answers import Completion, CompletionChoice, CompletionLogprobs
from octavo.server.cancellation import Cancellation
from octavo.server.generation import Generation, new_answer_id
from octavo.server.http import Exchange
from octavo.server.logprobs import completion_logprobs
from octavo.server.options import Limits
from octavo.server.parsing import parse_generation
from octavo.server.ports import Tokenizer
from octavo.server.protocol import CompletionFields, GenerationFields, StreamOptions
from octavo.server.service import Service
from octavo.server.streaming import stream_answer
from octavo.types import TokenLogprob

_DEFAULT_MAX_TOKENS = 16


async def completions(service: Service, exchange: Exchange) -> None:
    """Continue one text or many."""
    body = await service.read_json(exchange)
    shared, own = parse_generation(body, GenerationFields, CompletionFields)
    model = service.model_name(shared.model)
    prompts = _prompts(shared, own, service.limits)
    tokenizer, capacity = service.require_ready()
    max_tokens = _DEFAULT_MAX_TOKENS if shared.max_tokens is None else shared.max_tokens
    params = shared.sampling_params(max_tokens=max_tokens, logprobs=own.logprobs)
    validate_params(params, capacity.vocab_size)
    writer = _Writer(
        model,
        tokenizer,
        shared.n,
        has_logprobs=own.logprobs is not None,
        options=shared.stream_options or StreamOptions(),
    )

    async def begin() -> Generation:
        ids = [await encode(prompt) for prompt in prompts]
        if own.echo:
            writer.echoes = [await echo(prompt) for prompt in prompts]
        room = capacity.max_model_len - max(len(prompt) for prompt in ids)
        fitting = params
        if shared.max_tokens is None and 0 < room < _DEFAULT_MAX_TOKENS:
            fitting = msgspec.structs.replace(params, max_tokens=room)
        answer_id = new_answer_id("cmpl", shared.request_id)
        return Generation(
            service,
            exchange,
            ids,
            fitting,
            answer_id=answer_id,
            priority=shared.priority,
            cache=service.cache_params(exchange, shared),
        )

    async def encode(prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return await service.prompts.encode_text(
            prompt, tokenizer, capacity, add_special_tokens=own.add_special_tokens
        )

    async def echo(prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return await service.prompts.decode(
            prompt, tokenizer, capacity, skip_special_tokens=shared.skip_special_tokens
        )

    if shared.stream:
        await stream_answer(service, exchange, writer.stream(begin()), writer.abort_events)
        return
    async with Cancellation(service, exchange):
        generation = await begin()
        await generation.run()
    await exchange.answer_json(writer.whole(generation))


def _prompts(
    shared: GenerationFields, own: CompletionFields, limits: Limits
) -> list[str | list[int]]:
    """The prompts as a list, after the checks that need no model."""
    if own.echo and own.logprobs is not None:
        raise InvalidRequestError(
            "echo with logprobs is not supported: log probabilities are of the answer only.",
            param="echo",
        )
    if shared.stream_options is not None and not shared.stream:
        raise InvalidRequestError("stream_options needs stream.", param="stream_options")
    prompts = _as_list(own.prompt)
    if len(prompts) > limits.max_prompts:
        raise InvalidRequestError(
            f"prompt holds {len(prompts)} prompts; at most {limits.max_prompts} are taken.",
            param="prompt",
        )
    name, count = ("n", shared.n) if shared.best_of is None else ("best_of", shared.best_of)
    if len(prompts) * count > limits.max_sequences:
        raise InvalidRequestError(
            f"{len(prompts)} prompts times {name} = {count} are more than the "
            f"{limits.max_sequences} answers that one request may have.",
            param=name,
        )
    return prompts


def _as_list(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    ids = [item for item in prompt if isinstance(item, int)]
    for found in (texts, lists):
        if found and len(found) == len(prompt):
            return [*found]
    if ids and len(ids) == len(prompt):
        return [ids]
    fault = "mixes texts, ids and lists" if prompt else "is empty"
    raise InvalidRequestError(
        f"prompt {fault}; give a text, a list of texts, token ids, or lists of token ids.",
        param="prompt",
    )


class _Writer:
    """Puts a generation into OpenAI's text completion objects.

    Attributes:
        echoes: what each prompt's texts begin with, if that was asked for.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        n: int,
        *,
        has_logprobs: bool,
        options: StreamOptions,
    ) -> None:
        self.echoes: list[str] = []
        self._model = model
        self._tokenizer = tokenizer
        self._n = n
        self._has_logprobs = has_logprobs
        self._options = options
        self._generation: Generation | None = None

    def whole(self, generation: Generation) -> Completion:
        """The answer of a request that does not stream."""
        return Completion(
            id=generation.id,
            created=generation.created,
            model=self._model,
            choices=[
                CompletionChoice(
                    index=i,
                    text=self._echo(i) + "".join(choice.texts),
                    logprobs=self._logprobs(choice.logprobs, 0),
                    finish_reason=choice.finish_reason or "abort",
                    stop_reason=choice.stop_reason,
                )
                for i, choice in enumerate(generation.choices)
            ],
            usage=generation.usage(),
        )

    async def stream(self, begin: Awaitable[Generation]) -> AsyncGenerator[Sequence[Completion]]:
        """The events of a request that streams."""
        generation = self._generation = await begin
        offsets: dict[int, int] = {}

        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                text = (
                    delta.text if delta.index in offsets else self._echo(delta.index) + delta.text
                )
                logprobs = self._logprobs(delta.logprobs, offsets.setdefault(delta.index, 0))
                if not text and delta.finish_reason is None and not (logprobs and delta.logprobs):
                    continue
                if logprobs:
                    offsets[delta.index] += sum(map(len, logprobs.tokens))
                choice = CompletionChoice(
                    index=delta.index,
                    text=text,
                    logprobs=logprobs,
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
                yield [self._event([choice])]
        if self._options.include_usage:
            yield [self._event([], is_last=True)]

    def abort_events(self) -> list[Completion]:
        """What tells a stream's client that the rest of the answer will not come."""
        choices = self._generation.choices if self._generation is not None else []
        return [
            self._event([CompletionChoice(index=i, text="", finish_reason="abort")])
            for i, choice in enumerate(choices)
            if choice.finish_reason is None
        ]

    def _event(self, choices: list[CompletionChoice], *, is_last: bool = False) -> Completion:
        assert self._generation is not None
        has_usage = is_last or self._options.continuous_usage_stats
        without = None if self._options.include_usage else UNSET
        return Completion(
            id=self._generation.id,
            created=self._generation.created,
            model=self._model,
            choices=choices,
            usage=self._generation.usage() if has_usage else without,
        )

    def _echo(self, index: int) -> str:
        return self.echoes[index // self._n] if self.echoes else ""

    def _logprobs(
        self, positions: Sequence[TokenLogprob], offset: int
    ) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        return completion_logprobs(self._tokenizer, positions, offset)

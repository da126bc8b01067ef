"""From messages or texts to token ids: bounded, and off the event loop where it could take long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from octavo.errors import ContextLengthError, InvalidRequestError
from octavo.server.options import Limits
from octavo.server.ports import ChatTemplate, Tokenizer
from octavo.server.protocol import ChatMessage, ContentPart
from octavo.types import Capacity, Span

T = TypeVar("T")

_INLINE_BYTES = 2048
"""Shorter texts are tokenized at once: handing them to a thread would cost more."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_RESERVED = frozenset({"self", "messages", "add_generation_prompt"})


class ChatPrompt:
    """The parts of a request that a prompt is rendered from."""

    __slots__ = ("add_generation_prompt", "continue_final_message", "kwargs", "messages")

    def __init__(
        self,
        messages: list[ChatMessage],
        kwargs: dict[str, object],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> None:
        """Check what the struct's types can't say.

        Raises:
            InvalidRequestError: a role or a part of a message is not supported.
        """
        if reserved := _RESERVED & kwargs.keys():
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {min(reserved)}.", param="chat_template_kwargs"
            )
        self.messages = [_for_template(m, f"messages[{i}]") for i, m in enumerate(messages)]
        if continue_final_message and self.messages[-1]["role"] != "assistant":
            raise InvalidRequestError(
                "continue_final_message needs a last message of the assistant.",
                param="continue_final_message",
            )
        self.kwargs = kwargs
        self.add_generation_prompt = add_generation_prompt and not continue_final_message
        self.continue_final_message = continue_final_message


class PromptEncoder:
    """Renders and tokenizes for one model."""

    def __init__(self, limits: Limits) -> None:
        """Threads start when the first long prompt comes."""
        self._limits = limits
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="octavo-prompt")
        self._longest_token: int | None = None

    async def encode_chat(
        self, prompt: ChatPrompt, tokenizer: Tokenizer, capacity: Capacity
    ) -> list[int]:
        """Token ids of a conversation.

        Raises:
            InvalidRequestError: the model has no template, or it refuses these messages.
            ContextLengthError: more text than the context could ever hold.
        """
        template = tokenizer.chat_template
        if template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        if len(prompt.messages) > self._limits.max_messages:
            raise InvalidRequestError(
                f"messages holds {len(prompt.messages)} messages; "
                f"at most {self._limits.max_messages} are taken.",
                param="messages",
            )
        size = sum(len(str(m["content"])) for m in prompt.messages)
        await self._refuse_hopeless(size, tokenizer, capacity, "messages")
        is_short = size < _INLINE_BYTES and len(prompt.messages) < 20 and not prompt.kwargs
        spans = await self._render(prompt, template, is_short=is_short)
        return await self._call(lambda: tokenizer.encode_spans(spans), is_short=is_short)

    async def encode_text(
        self, text: str, tokenizer: Tokenizer, capacity: Capacity, *, add_special_tokens: bool
    ) -> list[int]:
        """Token ids of a raw prompt: whoever sends one writes its special tokens out.

        Raises:
            ContextLengthError: more text than the context could ever hold.
        """
        await self._refuse_hopeless(len(text), tokenizer, capacity, "prompt")
        return await self._call(
            lambda: tokenizer.encode(
                text, add_special_tokens=add_special_tokens, parse_special=True
            ),
            is_short=len(text) < _INLINE_BYTES,
        )

    async def decode(
        self, ids: list[int], tokenizer: Tokenizer, capacity: Capacity, *, skip_special_tokens: bool
    ) -> str:
        """Text of token ids.

        Raises:
            InvalidRequestError: an id is not in the vocabulary.
        """
        for token_id in ids:
            if not 0 <= token_id < capacity.vocab_size:
                raise InvalidRequestError(
                    f"{token_id} is not a token id of this model: they are 0 to "
                    f"{capacity.vocab_size - 1}.",
                    param="tokens",
                )
        return await self._call(
            lambda: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens),
            is_short=len(ids) < _INLINE_BYTES,
        )

    def close(self) -> None:
        """Let the threads go."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _render(
        self, prompt: ChatPrompt, template: ChatTemplate, *, is_short: bool
    ) -> list[Span]:
        def render() -> list[Span]:
            return template.render(
                prompt.messages,
                add_generation_prompt=prompt.add_generation_prompt,
                **prompt.kwargs,
            )

        spans = await self._call(render, is_short=is_short)
        if prompt.continue_final_message:
            spans = _cut_after_message(spans, str(prompt.messages[-1]["content"]))
        return spans

    async def _refuse_hopeless(
        self, num_chars: int, tokenizer: Tokenizer, capacity: Capacity, param: str
    ) -> None:
        """Raise if so many characters can't fit, even in the longest tokens that there are."""
        if num_chars <= 4 * capacity.max_model_len:
            return
        if self._longest_token is None:
            ids = range(capacity.vocab_size)
            self._longest_token = await self._call(
                lambda: max(len(tokenizer.token_bytes(i)) for i in ids), is_short=False
            )
        least = -(-num_chars // max(1, self._longest_token))
        if least >= capacity.max_model_len:
            raise ContextLengthError(
                f"This model's context is {capacity.max_model_len} tokens, but the {num_chars} "
                f"characters of the prompt are at least {least} tokens; shorten the prompt.",
                param=param,
            )

    async def _call(self, function: Callable[[], T], *, is_short: bool) -> T:
        if is_short:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)


def _for_template(message: ChatMessage, where: str) -> dict[str, object]:
    """A message as templates expect it."""
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError(
            f"{where}.role: {message.role[:100]!r} is not supported; "
            "use system, user or assistant.",
            param=f"{where}.role",
        )
    for name in ("tool_calls", "function_call", "tool_call_id", "audio", "refusal", "annotations"):
        if getattr(message, name):
            raise InvalidRequestError(
                f"{where}.{name} is not supported: only text messages are.",
                param=f"{where}.{name}",
                code="unsupported_parameter",
            )
    if message.content is None:
        raise InvalidRequestError(f"{where}.content is required.", param=f"{where}.content")
    found: dict[str, object] = {"role": role, "content": _text_of(message.content, where)}
    if message.name is not None:
        found["name"] = message.name
    if reasoning := message.reasoning_content or message.reasoning:
        found["reasoning_content"] = reasoning
    return found


def _text_of(content: str | list[ContentPart], where: str) -> str:
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise InvalidRequestError(
                f"{where}.content[{i}]: a part of type {part.type[:100]!r} is not supported; "
                "use type text with a text.",
                param=f"{where}.content[{i}].type",
            )
    return "\n".join(part.text for part in content if part.text is not None)


def _cut_after_message(spans: list[Span], content: str) -> list[Span]:
    """The prompt without what the template wrote after the last message."""
    for i in range(len(spans) - 1, -1, -1):
        if not spans[i].is_template:
            if content.strip().endswith(spans[i].text.strip()):
                return spans[: i + 1]
            break
    raise InvalidRequestError(
        "continue_final_message is not possible: the model's template rewrites the last message.",
        param="continue_final_message",
    )

"""What handlers need of an engine and of a tokenizer; tests can bring their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from octavo.types import (
    OPEN_CACHE,
    CacheParams,
    Capacity,
    EngineStats,
    OutputDelta,
    SamplingParams,
    Span,
)


class Engine(Protocol):
    """The part of `engine.AsyncEngine` that handlers use; tests have a second one."""

    @property
    def phase(self) -> str:
        """What loading is doing, or that it is done."""

    @property
    def progress(self) -> float:
        """How much of that is done, 0 to 1."""

    @property
    def capacity(self) -> Capacity | None:
        """None until a token was decoded."""

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, if it is."""

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters, as of the last step."""

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache: CacheParams = OPEN_CACHE,
        client: str = "",
    ) -> AsyncIterator[OutputDelta]:
        """The answer, piece by piece: an async generator; closing it aborts the request."""

    async def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes; return how many blocks they had."""


class ChatTemplate(Protocol):
    """Turns messages into a prompt."""

    def render(
        self, messages: Any, *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[Span]:
        """The prompt; raises InvalidRequestError if the template refuses the messages."""


class Tokenizer(Protocol):
    """The part of a tokenizer that handlers use."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """None: the model has none, so there is no chat."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids; special tokens in the text are plain text unless `parse_special`."""

    def encode_spans(self, spans: Sequence[Span]) -> list[int]:
        """Token ids; special tokens count only in the template's own spans."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""

    def token_text(self, token_id: int) -> str:
        """A token for people to read."""

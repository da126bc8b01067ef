"""A server with a fake engine and tokenizer, as a process: `fake_server.py '{"drain_s": 1}'`.

The HTTP side is the real one, signals and all. A token is a byte plus 3; the answer to a prompt is
its last 64 tokens again and again, so it depends on the prompt alone. Words in the prompt choose
what the engine does: SLOW (50 ms a token), STALL (0.5 s before the first one), FULL, NAN, DIE, and
STOP (end of text after five tokens). Prints its port once it listens.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncGenerator, Sequence

import msgspec

from octavo.config import EngineConfig
from octavo.engine.validation import complete_request
from octavo.errors import EngineDeadError, InvalidRequestError, ModelFileError, OverloadedError
from octavo.server.admin_socket import listen_at
from octavo.server.lifecycle import serve
from octavo.server.options import Limits, ServerOptions
from octavo.server.serve import bind
from octavo.types import (
    OPEN_CACHE,
    CacheParams,
    CacheStats,
    Capacity,
    EngineStats,
    KVPool,
    OutputDelta,
    PromptUsage,
    SamplingParams,
    Span,
    TokenLogprob,
)

FIRST_BYTE = 3
BLOCK_SIZE = 16


class FakeTemplate:
    def render(
        self,
        messages: Sequence[dict[str, str]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> list[Span]:
        if kwargs.get("refuse"):
            raise InvalidRequestError("the template refuses", param="messages")
        spans = []
        for message in messages:
            spans += [
                Span(f"<{message['role']}>", True),
                Span(message["content"], False),
                Span("\n", True),
            ]
        return [*spans, Span("<assistant>", True)] if add_generation_prompt else spans


class FakeTokenizer:
    def __init__(self, *, has_template: bool = True) -> None:
        self.chat_template = FakeTemplate() if has_template else None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        ids = [b + FIRST_BYTE for b in text.encode()]
        return [1, *ids] if add_special_tokens else ids

    def encode_spans(self, spans: Sequence[Span]) -> list[int]:
        return self.encode("".join(s.text for s in spans), add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id < FIRST_BYTE else bytes([token_id - FIRST_BYTE])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("latin-1") or f"<{token_id}>"

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


class FakeEngine:
    def __init__(self, *, load_s: float, max_model_len: int, load_failure: str | None) -> None:
        self.phase, self.progress = "weights", 0.42
        self.capacity: Capacity | None = None
        self.failure: str | None = None
        self.tokenizer: FakeTokenizer | None = None
        self._load_s = load_s
        self._load_failure = load_failure
        self._max_model_len = max_model_len
        self._running: dict[str, int] = {}
        self._num_steps = self._num_prompt = 0
        self._cached: set[tuple[str, str, str]] = set()

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            cache=CacheStats(
                num_blocks=1000,
                num_blocks_used=sum(n // BLOCK_SIZE + 1 for n in self._running.values()),
            ),
            num_steps=self._num_steps,
            generation_tokens=self._num_steps,
            prompt_tokens=self._num_prompt,
        )

    async def connect(self) -> None:
        return

    async def wait_ready(self) -> Capacity:
        await asyncio.sleep(self._load_s)
        if self._load_failure:
            raise EngineDeadError(self._load_failure)
        self.capacity = Capacity(
            model="fake",
            architecture="fake",
            num_parameters=0,
            max_model_len=self._max_model_len,
            kv_pool=KVPool(num_blocks=1000, block_size=BLOCK_SIZE, num_bytes=123456),
            weights_bytes=0,
            vocab_size=256 + FIRST_BYTE,
            backend="fake",
        )
        return self.capacity

    async def close(self) -> None:
        return

    async def reset_prefix_cache(self) -> int:
        num_prompts = len(self._cached)
        self._cached.clear()
        return num_prompts

    async def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache: CacheParams = OPEN_CACHE,
        client: str = "",
    ) -> AsyncGenerator[OutputDelta]:
        assert self.capacity is not None and self.tokenizer is not None
        params = complete_request(
            request_id, prompt_ids, params, self.capacity, priority=priority, cache=cache
        ).params
        text = self.tokenizer.decode(prompt_ids)
        if "FULL" in text:
            raise OverloadedError("the queue is full", retry_after_s=3)
        assert request_id not in self._running
        self._running[request_id] = len(prompt_ids)
        self._num_prompt += len(prompt_ids)
        name = (cache.scope, cache.salt, text)
        cached = (len(prompt_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE if name in self._cached else 0
        self._cached.add(name)
        try:
            if "STALL" in text:
                await asyncio.sleep(0.5)
            async for delta in self._tokens(prompt_ids, params, text):
                yield msgspec.structs.replace(
                    delta,
                    request_id=request_id,
                    usage=PromptUsage(num_prompt_tokens=len(prompt_ids), num_cached_tokens=cached),
                )
        finally:
            del self._running[request_id]

    async def _tokens(
        self, prompt_ids: list[int], params: SamplingParams, text: str
    ) -> AsyncGenerator[OutputDelta]:
        assert self.tokenizer is not None and params.max_tokens is not None
        source = itertools.cycle([i for i in prompt_ids[-64:] if i >= FIRST_BYTE])
        for position in range(params.max_tokens):
            await asyncio.sleep(0.05 if "SLOW" in text else 0)
            if position == 3 and "DIE" in text:
                self.failure = "the engine process ended unexpectedly (signal 9)"
                raise EngineDeadError(self.failure)
            token_id = next(source)
            is_last = position == params.max_tokens - 1
            ends = position == 4 and "STOP" in text
            fails = position == 2 and "NAN" in text
            reason = "error" if fails else "stop" if ends else "length" if is_last else None
            logprobs: tuple[TokenLogprob, ...] = ()
            if params.logprobs is not None:
                others = [(token_id, -0.5), (5, float("-inf"))][: params.logprobs]
                logprobs = (TokenLogprob(token_id, -0.5, tuple(others)),)
            for index in range(params.n):
                self._num_steps += 1
                yield OutputDelta(
                    request_id="",
                    index=index,
                    text="" if ends else self.tokenizer.decode([token_id]),
                    token_ids=(token_id,),
                    logprobs=logprobs,
                    finish_reason=reason,
                )
            if reason:
                return


def main() -> None:
    settings = json.loads(sys.argv[1])
    limits = Limits(**settings.pop("limits", {}))
    engine = FakeEngine(
        load_s=settings.pop("load_s", 0.0),
        max_model_len=settings.pop("max_model_len", 4096),
        load_failure=settings.pop("load_failure", None),
    )
    has_template = settings.pop("has_template", True)
    tokenizer_failure = settings.pop("tokenizer_failure", None)
    engine_settings = {"model": "x", "served_name": "fake", "memory_bytes": 1, "num_threads": 1}
    config = EngineConfig(**engine_settings | settings.pop("engine", {}))
    options = ServerOptions(
        engine=config, port=0, limits=limits, **msgspec.convert(settings, dict[str, object])
    )

    def load_tokenizer() -> FakeTokenizer:
        if tokenizer_failure:
            raise ModelFileError(tokenizer_failure)
        return FakeTokenizer(has_template=has_template)

    listener = bind(options.host, options.port)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    assert "numpy" not in sys.modules
    with listen_at(options.admin_socket) as admin_listener:
        asyncio.run(
            serve(
                options,
                engine,  # type: ignore[arg-type]
                listener,
                load_tokenizer=load_tokenizer,  # type: ignore[arg-type]
                on_ready=lambda capacity: None,
                admin_listener=admin_listener,
            )
        )


if __name__ == "__main__":
    main()

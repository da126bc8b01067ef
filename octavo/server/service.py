"""What every handler shares: engine, tokenizer, options, metrics, and whether work is welcome."""

from __future__ import annotations

import time
from collections.abc import Callable

from octavo import __version__
from octavo.errors import EngineDeadError, ModelNotFoundError, OverloadedError
from octavo.metrics import Metrics
from octavo.server.http import Exchange, HttpError
from octavo.server.json_body import decode_object
from octavo.server.options import ServerOptions
from octavo.server.ports import Engine, Tokenizer
from octavo.server.prompts import PromptEncoder
from octavo.server.protocol import GenerationFields
from octavo.types import CacheParams, Capacity

SHUTTING_DOWN = "shutting_down"


class Service:
    """One served model and everything around it.

    Attributes:
        tokenizer_getter: gives None until the tokenizer is loaded.
        is_draining: SIGTERM came: running requests finish, new ones are refused.
        created: Unix time, as OpenAI's model list wants it.
        cancellations: one for each request that is being answered; call one to end its request.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer_getter: Callable[[], Tokenizer | None],
        options: ServerOptions,
    ) -> None:
        """Collect the parts; none is used yet."""
        self.engine = engine
        self.options = options
        self.limits = options.limits
        self.metrics = Metrics(options.model_names[0], __version__)
        self.version = __version__
        self.prompts = PromptEncoder(options.limits)
        self.tokenizer_getter = tokenizer_getter
        self.is_draining = False
        self.created = int(time.time())
        self.cancellations: set[Callable[[str], None]] = set()
        self._num_ids = 0

    @property
    def state(self) -> str:
        """ready, loading, draining or failed."""
        if self.engine.failure is not None:
            return "failed"
        if self.is_draining:
            return "draining"
        ready = self.engine.capacity is not None and self.tokenizer_getter() is not None
        return "ready" if ready else "loading"

    def require_loaded(self) -> tuple[Tokenizer, Capacity]:
        """Tokenizer and capacity; raises the 503 that fits when the model is not to be had."""
        if self.engine.failure is not None:
            raise EngineDeadError("The engine has stopped; the server is about to end.")
        if self.is_draining:
            raise shutting_down()
        tokenizer, capacity = self.tokenizer_getter(), self.engine.capacity
        if tokenizer is None or capacity is None:
            raise HttpError(
                503,
                f"The model is still loading ({self.engine.phase}); try again in a moment.",
                code="model_loading",
                headers=[(b"retry-after", b"1")],
            )
        return tokenizer, capacity

    def require_ready(self) -> tuple[Tokenizer, Capacity]:
        """What a request needs; raises the 503 that fits when it is not to be had."""
        tokenizer, capacity = self.require_loaded()
        # Each of these is running or waiting, so the engine's queue is full: say so before the
        # work of tokenizing. The engine itself has the last word.
        config = self.options.engine
        if len(self.cancellations) >= config.max_num_waiting + config.max_num_seqs:
            raise OverloadedError(
                f"{len(self.cancellations)} requests are running or waiting, no more are accepted: "
                "try again in a moment."
            )
        return tokenizer, capacity

    async def read_json(self, exchange: Exchange) -> dict[str, object]:
        """The body of a request as an object; raises a 415 or 400 for anything else."""
        kind = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise HttpError(
                415,
                "The body must be JSON: send the header 'Content-Type: application/json'.",
                code="unsupported_media_type",
            )
        return decode_object(await exchange.read_body(), max_depth=self.limits.max_json_depth)

    def model_name(self, asked: str) -> str:
        """The name to answer with; raises ModelNotFoundError for a model that is not served."""
        names = self.options.model_names
        if not asked:
            return names[0]
        if asked not in names:
            raise ModelNotFoundError(
                f"The model {asked[:200]!r} is not served here; this server has {', '.join(names)}."
            )
        return asked

    def cache_params(self, exchange: Exchange, fields: GenerationFields) -> CacheParams:
        """What a request asks of the prefix cache, and with whom it may share."""
        return CacheParams(
            salt=fields.cache_salt or "",
            scope=exchange.key_name if self.options.cache_scope == "key" else "",
            pin_s=fields.cache_pin_s,
        )

    def new_engine_id(self, request_id: str) -> str:
        """An id that no other request of this server has, and that shows the client's."""
        self._num_ids += 1
        return f"{request_id}/{self._num_ids}"


def shutting_down() -> HttpError:
    """The answer to requests that come, or can't be finished, during shutdown."""
    return HttpError(
        503,
        "The server is shutting down; ask another one or try again later.",
        code=SHUTTING_DOWN,
        headers=[(b"retry-after", b"5"), (b"connection", b"close")],
    )

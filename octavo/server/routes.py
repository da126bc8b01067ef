"""Every route of the port and of the admin socket; `/openapi.json` is generated from them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from octavo.server.admin import reset_prefix_cache
from octavo.server.answers import (
    ChatCompletion,
    Completion,
    DetokenizeAnswer,
    ModelCard,
    ModelList,
    PrefixCacheReset,
    TokenizeAnswer,
)
from octavo.server.chat import chat_completions
from octavo.server.completions import completions
from octavo.server.health import live, metrics, ready, version
from octavo.server.http import Exchange
from octavo.server.models import get_model, list_models
from octavo.server.protocol import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    GenerationFields,
    TokenizeFields,
)
from octavo.server.service import Service
from octavo.server.tokenize import detokenize, tokenize

Handler = Callable[[Service, Exchange], Awaitable[None]]


class Route(msgspec.Struct, frozen=True):
    """One method of one path.

    Attributes:
        path: ends in `{name}` to take the rest of the path, slashes included.
        request: structs whose fields stand side by side in the body; none: no body is read.
        answer: the struct of a good answer; None: not JSON, or a small free object.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    request: tuple[type[msgspec.Struct], ...] = ()
    answer: type[msgspec.Struct] | None = None


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "Answer a conversation",
        (GenerationFields, ChatFields),
        ChatCompletion,
    ),
    Route(
        "POST",
        "/v1/completions",
        completions,
        "Continue one text or many",
        (GenerationFields, CompletionFields),
        Completion,
    ),
    Route("GET", "/v1/models", list_models, "List the served models", (), ModelList),
    Route("GET", "/v1/models/{model}", get_model, "Describe one served model", (), ModelCard),
    Route(
        "POST",
        "/tokenize",
        tokenize,
        "Turn a prompt or messages into token ids",
        (TokenizeFields,),
        TokenizeAnswer,
    ),
    Route(
        "POST",
        "/detokenize",
        detokenize,
        "Turn token ids into text",
        (DetokenizeFields,),
        DetokenizeAnswer,
    ),
    Route("GET", "/live", live, "Say that the process answers"),
    Route("GET", "/ready", ready, "Say whether requests are welcome"),
    Route("GET", "/health", ready, "The same as /ready"),
    Route("GET", "/metrics", metrics, "Metrics for Prometheus"),
    Route("GET", "/version", version, "The version of Octavo"),
)

ADMIN_ROUTES = (
    Route(
        "POST",
        "/reset_prefix_cache",
        reset_prefix_cache,
        "Forget all cached prefixes",
        (),
        PrefixCacheReset,
    ),
    Route("GET", "/live", live, "Say that the process answers"),
)

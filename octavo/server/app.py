"""The ASGI applications: ask who is there, find the route, give every failure OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.errors import RequestError
from octavo.server.admin import refuse_browsers
from octavo.server.auth import KeyRing
from octavo.server.http import ClientGoneError, Exchange, HttpError, Receive, Send
from octavo.server.openapi import describe
from octavo.server.options import ServerOptions
from octavo.server.ports import Engine, Tokenizer
from octavo.server.routes import ADMIN_ROUTES, ROUTES, Handler, Route
from octavo.server.service import Service

_log = logging.getLogger("octavo.server")


def create_app(
    engine: Engine, tokenizer_getter: Callable[[], Tokenizer | None], options: ServerOptions
) -> App:
    """An ASGI application that serves one engine.

    Args:
        engine: may still be loading; requests get a 503 until it is ready.
        tokenizer_getter: gives None until the tokenizer is loaded.
        options: names, keys and limits.
    """
    keys = KeyRing(options.api_keys)

    def ask_for_key(exchange: Exchange) -> None:
        exchange.key_name = keys.check(exchange.path, exchange.headers)

    return App(Service(engine, tokenizer_getter, options), ROUTES, ask_for_key)


def create_admin_app(service: Service) -> App:
    """The application of the admin socket: who may open the socket may use it; no browser may."""
    return App(service, ADMIN_ROUTES, refuse_browsers)


class App:
    """An application of one service.

    Attributes:
        service: what the handlers share.
        routes: the table, with /openapi.json added.
    """

    def __init__(
        self, service: Service, routes: Sequence[Route], guard: Callable[[Exchange], None]
    ) -> None:
        """Index the routes; `guard` raises a RequestError for a request that is not welcome."""
        self.service = service
        self.routes = (*routes, Route("GET", "/openapi.json", self._openapi, "This description"))
        self._guard = guard
        self._exact: dict[str, dict[str, Route]] = {}
        self._prefixes: list[tuple[str, str, dict[str, Route]]] = []
        for route in self.routes:
            head, brace, name = route.path.partition("{")
            if brace:
                self._prefixes.append((head, name.rstrip("}"), {route.method: route}))
            else:
                self._exact.setdefault(route.path, {})[route.method] = route

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(exchange)
        except ClientGoneError:
            exchange.status = 499
        except asyncio.CancelledError:
            exchange.status = 499
            if not self.service.is_draining:
                raise
        finally:
            status = str(exchange.status)
            self.service.metrics.count("octavo_http_requests_total", exchange.endpoint, status)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            self._guard(exchange)
            handler = self._find(exchange)
            await handler(self.service, exchange)
        except RequestError as error:
            await exchange.answer_error(error)
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except Exception:
            _log.exception("request %s to %s failed", exchange.request_id, exchange.endpoint)
            if exchange.status:
                raise  # a half sent answer can only be cut off
            await exchange.answer_error(
                HttpError(
                    500,
                    f"Octavo failed to answer; its log has details under {exchange.request_id}.",
                    code="internal_error",
                )
            )

    def _find(self, exchange: Exchange) -> Handler:
        """The handler of a request; raises a 404 or 405."""
        methods = self._exact.get(exchange.path)
        if methods is None:
            for head, name, found in self._prefixes:
                if exchange.path.startswith(head) and len(exchange.path) > len(head):
                    exchange.path_params = {name: exchange.path[len(head) :]}
                    methods = found
        if methods is None:
            raise HttpError(
                404,
                f"There is no {exchange.path[:200]!r} here; /openapi.json lists what there is.",
                code="not_found",
            )
        method = "GET" if exchange.method == "HEAD" else exchange.method
        route = methods.get(method)
        if route is None:
            allowed = ", ".join(methods)
            raise HttpError(
                405,
                f"{exchange.path} takes {allowed}, not {exchange.method[:20]}.",
                code="method_not_allowed",
                headers=[(b"allow", allowed.encode())],
            )
        exchange.endpoint = route.path
        return route.handler

    async def _openapi(self, service: Service, exchange: Exchange) -> None:
        await exchange.answer_json(describe(self.routes, service.version))

"""The routes of the admin socket. They change the server's state and read nobody's prompts."""

from __future__ import annotations

from octavo.server.answers import PrefixCacheReset
from octavo.server.http import Exchange, HttpError
from octavo.server.service import Service

_BROWSERS_HEADERS = (b"origin", b"sec-fetch-site")


async def reset_prefix_cache(service: Service, exchange: Exchange) -> None:
    """Forget all cached prefixes, pinned ones too; requests that run go on."""
    service.require_loaded()
    num_blocks = await service.engine.reset_prefix_cache()
    await exchange.answer_json(PrefixCacheReset(num_blocks))


def refuse_browsers(exchange: Exchange) -> None:
    """Raise a 403 if a web page could have sent the request: a page is not its reader's order.

    A browser opens no Unix socket, but a proxy in front of one would hand its requests on.
    """
    if any(name in exchange.headers for name in _BROWSERS_HEADERS):
        raise HttpError(
            403,
            "Web pages may not use the admin socket; send the request without a browser.",
            code="browser_refused",
        )

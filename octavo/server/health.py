"""GET /live, /ready, /health, /metrics and /version: what watches the server."""

from __future__ import annotations

from octavo.server.http import Exchange
from octavo.server.service import Service

_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


async def live(service: Service, exchange: Exchange) -> None:
    """The process answers: 200 in every state."""
    await exchange.answer_json({"status": "alive"})


async def ready(service: Service, exchange: Exchange) -> None:
    """200 once a token was decoded and while requests are welcome, else 503 with the reason."""
    state = service.state
    body: dict[str, object] = {"status": state}
    if state == "loading":
        engine = service.engine
        body |= {"phase": engine.phase, "progress": round(engine.progress, 3)}
    headers = () if state == "ready" else ((b"retry-after", b"1"),)
    status = 200 if state == "ready" else 503
    await exchange.answer_json(body, status=status, headers=headers)


async def metrics(service: Service, exchange: Exchange) -> None:
    """Prometheus' text format."""
    engine = service.engine
    text = service.metrics.render(engine.stats, engine.capacity, is_ready=service.state == "ready")
    await exchange.answer(text.encode(), headers=[(b"content-type", _METRICS_TYPE)])


async def version(service: Service, exchange: Exchange) -> None:
    """The version of Octavo."""
    await exchange.answer_json({"version": service.version})

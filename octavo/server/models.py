"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from octavo.server.answers import ModelCard, ModelList
from octavo.server.http import Exchange
from octavo.server.service import Service


async def list_models(service: Service, exchange: Exchange) -> None:
    """Every name that requests may use."""
    cards = [_card(service, name) for name in service.options.model_names]
    await exchange.answer_json(ModelList(cards))


async def get_model(service: Service, exchange: Exchange) -> None:
    """One of them; a 404 for any other."""
    name = service.model_name(exchange.path_params["model"])
    await exchange.answer_json(_card(service, name))


def _card(service: Service, name: str) -> ModelCard:
    capacity = service.engine.capacity
    return ModelCard(
        id=name,
        created=service.created,
        root=service.options.model_names[0],
        max_model_len=capacity.max_model_len if capacity else None,
    )

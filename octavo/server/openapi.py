"""The OpenAPI description, generated from the routes and the structs that they name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from octavo.server.answers import ErrorAnswer
from octavo.server.auth import OPEN_PATHS
from octavo.server.fields import HARMLESS, UNSUPPORTED
from octavo.server.protocol import GenerationFields
from octavo.server.routes import Route

_TEMPLATE = "#/components/schemas/{name}"


def describe(routes: Iterable[Route], version: str) -> dict[str, object]:
    """An OpenAPI 3.1 document."""
    routes = list(routes)
    kinds = {kind for r in routes for kind in (*r.request, r.answer, ErrorAnswer) if kind}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_TEMPLATE)
    components: dict[str, Any] = dict(schemas)
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        operation = _operation(route, components)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: Route, components: dict[str, Any]) -> dict[str, object]:
    good: dict[str, object] = {"description": "OK"}
    if route.answer is not None:
        good["content"] = _json(_TEMPLATE.format(name=route.answer.__name__))
    error = {"description": "Error", "content": _json(_TEMPLATE.format(name="ErrorAnswer"))}
    operation: dict[str, object] = {
        "summary": route.summary,
        "operationId": route.handler.__name__.strip("_"),
        "responses": {"200": good, "default": error},
    }
    if route.path not in OPEN_PATHS:
        operation["security"] = [{}, {"bearer": []}, {"header": []}]
    if "{" in route.path:
        name = route.path.partition("{")[2].rstrip("}")
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if route.request:
        name = route.request[-1].__name__.removesuffix("Fields") + "Request"
        components[name] = _merge([components[kind.__name__] for kind in route.request])
        if GenerationFields in route.request:
            components[name]["properties"] |= _listed_fields(components[name]["properties"])
        reference = _TEMPLATE.format(name=name)
        operation["requestBody"] = {"required": True, "content": _json(reference)}
    return operation


def _json(reference: str) -> dict[str, object]:
    return {"application/json": {"schema": {"$ref": reference}}}


def _merge(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One object with the fields of all; every optional one may be null."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for schema in schemas:
        needed = schema.get("required", [])
        required += needed
        for name, field in schema["properties"].items():
            nullable = name in needed or {"type": "null"} in field.get("anyOf", [])
            properties[name] = field if nullable else _or_null(field)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    outer: dict[str, Any] = {key: field[key] for key in ("default", "description") if key in field}
    inner = {key: value for key, value in field.items() if key not in outer}
    return {"anyOf": [inner, {"type": "null"}], **outer}


def _listed_fields(known: dict[str, object]) -> dict[str, object]:
    """The fields of `fields.py`: without effect, or allowed only with a neutral value."""
    found: dict[str, object] = {
        field.name: {"description": f"Accepted without effect: {field.why}."} for field in HARMLESS
    }
    for field in UNSUPPORTED:
        if field.name not in known:
            values = [*field.neutral, None]
            found[field.name] = {"enum": values, "description": f"Not supported: {field.why}."}
    return found

"""The OpenAPI 3.1 document of the routes, made of their types: what is not declared is not in it, and what is, is so.

Knows routes and types; no handler, no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

import chimera
from chimera.server.errors import AnthropicErrorBody, ErrorBody, is_anthropic
from chimera.server.routes import Route

_EVERY_ROUTE = (401, 403, 500, 503)
_WITH_A_BODY = (400, 413)
_REFERENCE = "#/components/schemas/{name}"


def document(routes: Iterable[Route]) -> dict[str, Any]:
    routes = list(routes)
    kinds = [
        kind for route in routes for kind in (route.takes, route.gives, route.streams, _error_of(route)) if kind is not None
    ]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    schema_of = {id(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "chimera", "version": chimera.__version__, "description": "Many language models at one address."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"x-api-key": []}],  # which of them, its operator decides
    }


def _operation(route: Route, schema_of: dict[int, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"summary": route.what, "operationId": _name(route), "tags": [_whose(route)]}
    places = re.findall(r"{(\w+)}", route.path)
    if places:
        told["parameters"] = [
            {"name": place, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for place in places
        ]
    if route.takes is not None:
        content = {"application/json": {"schema": schema_of[id(route.takes)]}}
        told["requestBody"] = {"required": True, "content": content}
    failure = {"application/json": {"schema": schema_of[id(_error_of(route))]}}
    fails = sorted({*_EVERY_ROUTE, *(_WITH_A_BODY if route.takes is not None else ()), *route.fails})
    told["responses"] = {
        "200": {"description": "As asked.", "content": _good(route, schema_of)},
        **{str(status): {"description": HTTPStatus(status).phrase, "content": failure} for status in fails},
    }
    return told


def _whose(route: Route) -> str:
    """Whose key it asks for, where there are keys."""
    return "operator" if route.admin else "anyone" if route.open else "client"


def _good(route: Route, schema_of: dict[int, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.gives is not None:
        content["application/json"] = {"schema": schema_of[id(route.gives)]}
    if route.streams is not None:  # JSON schema speaks of one event; the stream is a text
        named = {"type": "string", "description": "Server-sent events, the data of each as in x-event."}
        content["text/event-stream"] = {"schema": named, "x-event": schema_of[id(route.streams)]}
    if route.text is not None:
        content[route.text] = {"schema": {"type": "string"}}
    return content


def _error_of(route: Route) -> type[msgspec.Struct]:
    return AnthropicErrorBody if is_anthropic(route.path) else ErrorBody


def _name(route: Route) -> str:
    return re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_")

"""The OpenAPI document says what is served: every route is in it, and answers are what it says."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from chimera.core.access import Access
from chimera.server.app import App
from chimera.server.catalogue import Catalogue
from chimera.server.gate import Gate

from tests.server.conftest import Stage

pytestmark = pytest.mark.asyncio(loop_scope="module")

HI = [{"role": "user", "content": "hi"}]
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "n": 2, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {"prompt": ["a", "b"], "logprobs": 1},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": HI},
    "/generate": {"text": "a", "return_logprob": True, "top_logprobs_num": 2},
    "/v1/embeddings": {"model": "e", "input": ["a", "b"]},
    "/encode": {"model": "e", "text": "a"},
    "/models/pin": {"pin": True},
}


async def document(standing: Stage) -> dict[str, Any]:
    async with standing.client.get(standing.url + "/openapi.json") as response:
        assert response.content_type == "application/json"
        told: dict[str, Any] = await response.json()
        return told


def schema_of(document: dict[str, Any], method: str, path: str, status: int = 200) -> dict[str, Any]:
    answer = document["paths"][path][method]["responses"][str(status)]
    schema: dict[str, Any] = {**answer["content"]["application/json"]["schema"], "components": document["components"]}
    return schema


async def test_every_route_is_in_it(standing: Stage) -> None:
    told = await document(standing)
    assert told["openapi"].startswith("3.1")
    app = App(Catalogue(), standing.front.desk, None, Gate(Access())).build()  # type: ignore[arg-type]
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert served and served == {(method, path) for path, methods in told["paths"].items() for method in methods}


@pytest.mark.parametrize("path", ASKS)
async def test_an_answer_is_what_it_says(embedding: Stage, path: str) -> None:
    told = await document(embedding)
    status, body = await embedding.post(path, {"model": "m", **ASKS[path]})
    assert status == 200, body
    jsonschema.validate(body, schema_of(told, "post", path))
    jsonschema.Draft202012Validator.check_schema(schema_of(told, "post", path))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/health", "/snapshot", "/ledger", "/policy"])
async def test_what_can_be_read_is_what_it_says(standing: Stage, path: str) -> None:
    told = await document(standing)
    async with standing.client.get(standing.url + path) as response:
        body = await response.json()
    jsonschema.validate(body, schema_of(told, "get", "/v1/models/{name}" if path == "/v1/models/m" else path))


@pytest.mark.parametrize("path", ASKS)
async def test_a_refusal_is_what_it_says(standing: Stage, path: str) -> None:
    told = await document(standing)
    for body, expected in (({"model": 7}, 400), ({**ASKS[path], "model": "absent"}, 404)):
        status, refusal = await standing.post(path, body)
        assert status == expected
        jsonschema.validate(refusal, schema_of(told, "post", path, status))

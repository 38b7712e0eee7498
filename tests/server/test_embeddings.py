"""Embeddings, in OpenAI's words and in SGLang's; and what is told to those who ask the wrong model."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.server.conftest import Stage
from tests.server.rehearsal import CONTEXT, numbers_for, tokens_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

HI: Any = [{"role": "user", "content": "hi"}]


async def test_the_official_client_as_numbers_and_as_base64(embedding: Stage) -> None:
    async with AsyncOpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0) as client:
        packed = await client.embeddings.create(model="e", input=["a", "bc"])
        plain = await client.embeddings.create(model="e", input=["a", "bc"], encoding_format="float")
        one = await client.embeddings.create(model="e", input=tokens_of("bc"))
    for told in (packed, plain):
        assert [entry.index for entry in told.data] == [0, 1]
        assert [entry.embedding for entry in told.data] == [numbers_for([0, *tokens_of(text)]) for text in ("a", "bc")]
        assert told.usage.prompt_tokens == len("a") + len("bc") + 2  # each begins with a mark
    assert [entry.embedding for entry in one.data] == [numbers_for(tokens_of("bc"))]


async def test_sglangs_words(embedding: Stage) -> None:
    status, body = await embedding.post("/encode", {"model": "e", "text": "a", "rid": "mine"})
    assert (status, body["embedding"]) == (200, numbers_for([0, *tokens_of("a")]))
    assert (body["meta_info"]["id"], body["meta_info"]["prompt_tokens"]) == ("mine", 2)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "m"}, "unsupported_parameter", "model"),
        ({"dimensions": 8}, "unsupported_parameter", "dimensions"),
        ({"input": []}, "bad_request", "input"),
        ({"input": [[]]}, "bad_request", "input"),
        ({"input": ["a"] * 129}, "bad_request", "input"),
        ({"input": [10**6]}, "bad_request", "input"),
        ({"input": [65] * CONTEXT}, "context_length_exceeded", "input"),
        ({"encoding_format": "hex"}, "bad_request", "encoding_format"),
    ],
)
async def test_what_cannot_be_embedded_is_named(embedding: Stage, change: dict[str, Any], code: str, param: str) -> None:
    status, body = await embedding.post("/v1/embeddings", {"model": "e", "input": "a", **change})
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, code, param), body


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 5}),
        ("/generate", {"text": "a"}),
    ],
)
async def test_a_model_that_embeds_says_nothing(embedding: Stage, path: str, ask: dict[str, Any]) -> None:
    status, body = await embedding.post(path, {"model": "e", **ask})
    assert status == 400 and "makes embeddings; it generates no text" in body["error"]["message"]

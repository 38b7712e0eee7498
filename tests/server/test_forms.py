"""Answers held to a form: what an engine is asked for in each API's words, and what is told when it cannot."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from chimera.msg.stream import Grammar

from tests.server.conftest import Stage

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}}
CHAT, COMPLETION, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"


@pytest.mark.parametrize(
    ("path", "ask", "kind", "text"),
    [
        (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        (
            CHAT,
            {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            "json_schema",
            SCHEMA,
        ),
        (CHAT, {"messages": HI, "regex": "a+"}, "regex", "a+"),
        (COMPLETION, {"prompt": "a", "ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        (GENERATE, {"text": "a", "sampling_params": {"json_schema": json.dumps(SCHEMA)}}, "json_schema", SCHEMA),
        (GENERATE, {"text": "a", "sampling_params": {"regex": "a+"}}, "regex", "a+"),
        (GENERATE, {"text": "a", "sampling_params": {"structural_tag": {"x": 1}}}, "structural_tag", {"x": 1}),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
            "json_schema",
            SCHEMA,
        ),
        (
            "/v1/messages",
            {"messages": HI, "max_tokens": 9, "output_format": {"type": "json_schema", "schema": SCHEMA}},
            "json_schema",
            SCHEMA,
        ),
    ],
)
async def test_a_form_reaches_the_engine(stage: Stage, path: str, ask: dict[str, Any], kind: str, text: Any) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post(path, {"model": "m", **ask}))
    request, payload = await stage.rehearsal.next_ask()
    grammar = payload.sampling.grammar
    assert grammar is not None and grammar.kind == kind
    assert (grammar.text if isinstance(text, str) else json.loads(grammar.text)) == text
    await stage.rehearsal.worker.fail(request, "bad_request", "it makes no sense")
    status, body = await asking
    assert status == 400 and "it makes no sense" in body["error"]["message"]


async def test_a_form_that_makes_no_sense_is_blamed_by_name(stage: Stage) -> None:
    stage.rehearsal.hold = True
    ask = {"model": "m", "messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}
    asking = asyncio.create_task(stage.post(CHAT, ask))
    await stage.rehearsal.worker.fail(await stage.rehearsal.next_request(), "bad_request", "no such type")
    status, body = await asking
    assert (status, body["error"]["param"], body["error"]["message"]) == (
        400,
        "response_format",
        "response_format: no such type",
    )


async def test_an_answer_that_goes_on_elsewhere_tells_how_much_of_it_there_is(stage: Stage) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post(CHAT, {"model": "m", "messages": HI, "max_tokens": 9, "regex": "[a-z]+"}))
    request, payload = await stage.rehearsal.next_ask()
    assert payload.resumed_tokens == 0
    await stage.rehearsal.worker.say(request, "abc")
    await stage.rehearsal.worker.fail(request, "requeue", "moved", requeue=True)
    request, again = await stage.rehearsal.next_ask()
    assert again.resumed_tokens == 3 and again.input_ids[:-3] == payload.input_ids
    assert again.sampling.grammar == Grammar("regex", "[a-z]+")
    asking.cancel()


async def test_a_bias_reaches_the_engine(stage: Stage) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post(CHAT, {"model": "m", "messages": HI, "logit_bias": {"65": -100, "7": 1.5}}))
    _, payload = await stage.rehearsal.next_ask()
    assert payload.sampling.logit_bias == {65: -100.0, 7: 1.5}
    asking.cancel()

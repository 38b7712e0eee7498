"""Anthropic's words: the wire shapes by hand, and the official client where it is installed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from chimera.msg.events import Outcome

from tests.server.conftest import Stage

PATH = "/v1/messages"
ASK: dict[str, Any] = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}


async def events(stage: Stage, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each event by its name, which its data repeats."""
    async with stage.client.post(stage.url + PATH, json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        blocks = (await response.text()).removesuffix("\n\n").split("\n\n")
    pairs = [block.split("\n") for block in blocks]
    told = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]
    assert all(name == body["type"] for name, body in told)
    return told


async def test_a_message_is_a_list_of_one_block_of_text(stage: Stage) -> None:
    status, body = await stage.post(PATH, {**ASK, "system": "be kind"})
    assert status == 200 and body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "m")
    [block] = body["content"]
    assert block["type"] == "text" and len(block["text"]) == 23
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"]["input_tokens"] == len("<system>be kind<user>hi<assistant>")
    assert body["usage"]["output_tokens"] == 24


async def test_a_streamed_message_is_named_events_around_the_same_text(stage: Stage) -> None:
    _, whole = await stage.post(PATH, ASK)
    told = await events(stage, ASK)
    names = [name for name, _ in told]
    assert names[:2] == ["message_start", "content_block_start"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = told[0][1]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None) and start["usage"]["input_tokens"] > 0
    assert "".join(body["delta"]["text"] for name, body in told if name == "content_block_delta") == whole["content"][0]["text"]
    assert told[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert told[-2][1]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_an_answer_without_text_still_has_its_block(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming = asyncio.create_task(events(stage, ASK))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, [], Outcome.STOP)
    names = [name for name, _ in await streaming]
    assert names == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"max_tokens": 3}, ("max_tokens", None)), ({"stop_sequences": ["zz", "b"]}, ("stop_sequence", "b"))],
)
async def test_why_it_stopped_is_said(stage: Stage, change: dict[str, Any], reason: tuple[str, str | None]) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post(PATH, {**ASK, **change}))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "abc", Outcome.LENGTH)
    _, body = await asking
    assert (body["stop_reason"], body["stop_sequence"]) == reason


async def test_the_tokens_of_a_prompt_are_counted_as_they_are_charged(stage: Stage) -> None:
    _, whole = await stage.post(PATH, {**ASK, "system": [{"type": "text", "text": "be kind"}]})
    counted = {name: ASK[name] for name in ("model", "messages")}
    status, body = await stage.post(f"{PATH}/count_tokens", {**counted, "system": "be kind"})
    assert (status, body) == (200, {"input_tokens": whole["usage"]["input_tokens"]})


@pytest.mark.parametrize(
    ("change", "status", "kind", "named"),
    [
        ({"model": "absent"}, 404, "not_found_error", "absent"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "image"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"tools": [{"name": "t", "type": "bash_20250124"}]}, 400, "invalid_request_error", "tools[0]"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
        ({"mcp_servers": [{"name": "s"}]}, 400, "invalid_request_error", "mcp_servers"),
    ],
)
async def test_a_refusal_has_anthropics_shape(stage: Stage, change: dict[str, Any], status: int, kind: str, named: str) -> None:
    got, body = await stage.post(PATH, {**ASK, **change})
    assert (got, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert named in body["error"]["message"]
    async with stage.client.get(stage.url + PATH) as response:
        assert response.status == 405 and (await response.json())["type"] == "error"


async def test_an_error_in_the_middle_is_an_event_of_its_own(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming = asyncio.create_task(events(stage, ASK))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "a")
    await stage.rehearsal.worker.fail(request, "worker_lost", "the engine was lost")
    name, body = (await streaming)[-1]
    assert (name, body["error"]) == ("error", {"type": "api_error", "message": "the engine was lost"})


async def test_the_official_client(stage: Stage) -> None:
    anthropic = pytest.importorskip("anthropic")
    async with anthropic.AsyncAnthropic(base_url=stage.url, api_key="none", max_retries=0) as client:
        whole = await client.messages.create(**ASK)
        async with client.messages.stream(**ASK) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            last = await stream.get_final_message()
        assert text == whole.content[0].text == last.content[0].text and last.stop_reason == "end_turn"
        counted = await client.messages.count_tokens(model="m", messages=ASK["messages"])
        assert counted.input_tokens == whole.usage.input_tokens == last.usage.input_tokens
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**ASK, "model": "absent"})

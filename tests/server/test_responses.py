"""OpenAI's `/v1/responses`, told by the official client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from chimera.msg.events import Outcome
from openai import AsyncOpenAI

from tests.server.conftest import Stage


@pytest.fixture
async def client(stage: Stage) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_response_says_what_the_chat_says(client: AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    response = await client.responses.create(model="m", input="hi")
    assert response.id.startswith("resp_") and response.status == "completed"
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None and chat.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat.usage.prompt_tokens, 24)


async def test_what_was_said_before_and_instructions_reach_the_prompt(client: AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="m",
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    )
    response = await client.responses.create(
        model="m",
        instructions="s",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "role": "assistant", "content": "b"},
        ],
    )
    assert response.output_text == chat.choices[0].message.content


async def test_a_streamed_response_is_a_numbered_sequence_of_events(client: AsyncOpenAI) -> None:
    whole = await client.responses.create(model="m", input="hi", max_output_tokens=4)
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    stream = await client.responses.create(model="m", input="hi", max_output_tokens=4, stream=True)
    told: list[Any] = [event async for event in stream]
    kinds = [event.type.removeprefix("response.") for event in told]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 4,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == whole.output_text
    assert told[-1].response.output_text == told[-4].text == whole.output_text
    assert (told[0].response.status, told[-1].response.usage.output_tokens) == ("in_progress", 4)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0]"),
    ],
)
async def test_what_is_not_served_is_refused_by_name(client: AsyncOpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(**{"model": "m", "input": "hi", **change})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", param)


async def test_an_error_in_the_middle_reaches_the_client(stage: Stage, client: AsyncOpenAI) -> None:
    stage.rehearsal.hold = True
    opening = asyncio.create_task(client.responses.create(model="m", input="hi", stream=True))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "a")
    stream = await opening
    await stage.rehearsal.worker.fail(request, "worker_lost", "the engine was lost")
    told: list[Any] = [event async for event in stream]
    assert (told[-1].type, told[-1].message) == ("error", "the engine was lost")


async def test_an_answer_that_is_empty_is_complete_all_the_same(stage: Stage, client: AsyncOpenAI) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(client.responses.create(model="m", input="hi"))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, [], Outcome.STOP)
    assert (await asking).output_text == ""


async def test_embeddings_are_refused_for_the_model_that_was_asked(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="m generates text; it makes no embeddings"):
        await client.embeddings.create(model="m", input="hi")
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="absent", input="hi")

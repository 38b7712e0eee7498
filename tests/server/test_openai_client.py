"""The official client, unmodified, against the front-end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from chimera.msg.events import Outcome
from openai import AsyncOpenAI

from tests.server.conftest import Stage
from tests.server.rehearsal import CONTEXT

HI: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(stage: Stage) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=HI)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "m"
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content is not None
    assert len(choice.message.content) == 23 and choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("<user>hi<assistant>"), 24)


async def test_a_streamed_chat_says_what_the_whole_one_says_one_chunk_a_token(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="m", messages=HI)
    chunks = [chunk async for chunk in await client.chat.completions.create(model="m", messages=HI, stream=True)]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert [len(delta.content or "") for delta in deltas] == [0, *[1] * 23, 0]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * 24, "stop"]
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_in_one_last_chunk_when_asked_for(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m", messages=HI, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 3
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)


async def test_a_completion_of_text_and_of_tokens(client: AsyncOpenAI) -> None:
    text = await client.completions.create(model="m", prompt="the", max_tokens=5)
    assert text.object == "text_completion" and len(text.choices[0].text) == 5
    assert text.choices[0].finish_reason == "length"
    assert text.usage is not None
    prompt = [0, 258 + 1]  # what "the" is, with the token that begins every text
    assert text.usage.prompt_tokens == len(prompt)
    tokens = await client.completions.create(model="m", prompt=prompt, max_tokens=5)
    assert tokens.choices[0].text == text.choices[0].text
    stream = await client.completions.create(model="m", prompt=["the"], max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == text.choices[0].text


async def test_the_settings_of_a_request_reach_the_engine(stage: Stage, client: AsyncOpenAI) -> None:
    stage.rehearsal.hold = True
    stream = client.chat.completions.create(
        model="also-m",
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        max_completion_tokens=9,
        temperature=0,
        top_p=0.5,
        seed=7,
        frequency_penalty=0.25,
        presence_penalty=-1,
        extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [4], "something_new": 1},
    )
    waiting = asyncio.create_task(stream)
    request, payload = await stage.rehearsal.next_ask()
    await stage.rehearsal.worker.say(request, "x", Outcome.STOP)
    assert (await waiting).model == "also-m"
    assert request.model == "m" and request.max_tokens == 9 and request.front == "front-0"
    assert request.prompt_tokens == len(payload.input_ids) == len("<user>ab<assistant>")
    sampling = payload.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (9, 0.0, 0.5, 7)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.25, -1)
    assert (sampling.top_k, sampling.min_p, sampling.ignore_eos, sampling.stop_token_ids) == (3, 0.1, True, (4,))


async def test_a_chat_without_a_limit_may_fill_the_context(stage: Stage, client: AsyncOpenAI) -> None:
    stage.rehearsal.hold = True
    waiting = asyncio.create_task(client.chat.completions.create(model="m", messages=HI))
    request = await stage.rehearsal.next_request()
    assert request.prompt_tokens + request.max_tokens == CONTEXT
    await stage.rehearsal.worker.say(request, "x", Outcome.STOP)
    await waiting


async def test_a_stop_string_ends_the_answer_and_the_engines_work(stage: Stage, client: AsyncOpenAI) -> None:
    whole = (await client.chat.completions.create(model="m", messages=HI)).choices[0].message.content
    assert whole is not None
    stop = whole[10:13]
    answer = await client.chat.completions.create(model="m", messages=HI, stop=[stop, "never"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.removeprefix("chatcmpl-") == await stage.rehearsal.cancelled.get()
    chunks = await client.chat.completions.create(model="m", messages=HI, stop=stop, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == whole[: whole.index(stop)]


async def test_models_are_listed_and_found_by_name_and_alias(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["m"]
    assert (await client.models.retrieve("m")).owned_by == "chimera"
    assert (await client.models.retrieve("also-m")).id == "m"


async def test_errors_are_the_clients_own_classes(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'm'"):
        await client.chat.completions.create(model="mm", messages=HI)
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/absent")
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="m", prompt="a", best_of=2)
    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "unsupported_parameter",
        "best_of",
        "invalid_request_error",
    )


async def test_an_error_after_the_first_token_reaches_the_client(stage: Stage, client: AsyncOpenAI) -> None:
    stage.rehearsal.hold = True
    opening = asyncio.create_task(client.chat.completions.create(model="m", messages=HI, stream=True))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "a")
    stream = await opening
    await stage.rehearsal.worker.fail(request, "worker_lost", "the engine was lost")
    with pytest.raises(openai.APIError, match="the engine was lost"):
        _ = [chunk async for chunk in stream]

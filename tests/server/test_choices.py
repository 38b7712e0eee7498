"""Several answers to one request, and what each token of an answer was worth; told by the official client and by hand."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator

import openai
import pytest
from chimera.core.model import Slo
from chimera.msg.events import Outcome
from openai import AsyncOpenAI

from tests.server.conftest import Stage, until
from tests.server.rehearsal import tokens_of

HI: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(stage: Stage) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_several_choices_share_one_prompt_and_differ_by_their_seeds(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=HI, n=3, seed=7, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3 and all(choice.finish_reason == "length" for choice in answer.choices)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("<user>hi<assistant>"), 15)
    alone = await client.chat.completions.create(model="m", messages=HI, seed=8, max_tokens=5)
    assert alone.choices[0].message.content == texts[1]


async def test_streamed_choices_are_told_apart_and_end_together(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="m", messages=HI, n=2, seed=7)
    stream = await client.chat.completions.create(
        model="m", messages=HI, n=2, seed=7, stream=True, stream_options={"include_usage": True}
    )
    texts: defaultdict[int, str] = defaultdict(str)
    roles, ends, usages = [], [], []
    async for chunk in stream:
        if chunk.usage is not None:
            usages.append(chunk.usage.completion_tokens)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            ends += [(choice.index, choice.finish_reason)] if choice.finish_reason else []
    assert [texts[0], texts[1]] == [choice.message.content for choice in whole.choices]
    assert sorted(roles) == [0, 1] and sorted(ends) == [(0, "stop"), (1, "stop")] and usages == [48]


async def test_a_completion_of_several_prompts_answers_each_in_turn(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt=["the", "a"], n=2, max_tokens=4, seed=1)
    alone = [await client.completions.create(model="m", prompt=prompt, max_tokens=4, seed=1) for prompt in ("the", "a")]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [answer.choices[0].text, answer.choices[2].text] == [one.choices[0].text for one in alone]
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage is not None)


async def test_a_client_that_leaves_takes_all_its_choices_with_it(stage: Stage) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post("/v1/completions", {"model": "m", "prompt": "a", "n": 3}))
    requests = {(await stage.rehearsal.next_request()).request_id for _ in range(3)}
    asking.cancel()
    assert {await stage.rehearsal.cancelled.get() for _ in range(3)} == requests
    assert stage.front.desk.open_answers == 0


async def test_one_choice_that_fails_ends_the_stream_in_one_error_and_the_others_with_it(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming = asyncio.create_task(stage.events("/v1/completions", {"model": "m", "prompt": "a", "n": 2}))
    first, second = [await stage.rehearsal.next_request() for _ in range(2)]
    await stage.rehearsal.worker.say(first, "x")
    await stage.rehearsal.worker.fail(second, "worker_lost", "the engine was lost")
    await stage.rehearsal.worker.say(first, "y", Outcome.STOP)
    *events, last = await streaming
    assert json.loads(last)["error"]["message"] == "the engine was lost"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "x"
    await until(lambda: stage.front.desk.open_answers == 0)


async def test_a_choice_goes_on_elsewhere_by_itself(stage: Stage) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post("/v1/completions", {"model": "m", "prompt": "a", "n": 2, "logprobs": 0}))
    first, second = [await stage.rehearsal.next_request() for _ in range(2)]
    await stage.rehearsal.worker.say(first, "one", Outcome.STOP, alternatives=0)
    await stage.rehearsal.worker.say(second, "tw", alternatives=0)
    await until(lambda: any(answer.emitted for answer in stage.front.desk._open.values()))
    stage.rehearsal.requeue(second)
    again, payload = await stage.rehearsal.next_ask()
    assert payload.logprobs == 0 and payload.input_ids[-2:] == tokens_of("tw")
    await stage.rehearsal.worker.say(again, "o", Outcome.STOP, alternatives=0)
    _, body = await asking
    assert [choice["text"] for choice in body["choices"]] == ["one", "two"]
    assert ["".join(choice["logprobs"]["tokens"]) for choice in body["choices"]] == ["one", "two"]


async def test_logprobs_of_a_chat_are_told_token_by_token(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=HI, max_tokens=3, logprobs=True, top_logprobs=2)
    [choice] = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None and choice.message.content is not None
    assert [entry.token for entry in choice.logprobs.content] == list(choice.message.content)
    for entry in choice.logprobs.content:
        assert (entry.logprob, entry.bytes) == (-0.5, list(entry.token.encode()))
        assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.5] and entry.top_logprobs[0].token == entry.token


async def test_streamed_logprobs_come_once_each_with_their_text(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="m", messages=HI, logprobs=True, stream=True)
    text, tokens = "", []
    async for chunk in stream:
        [choice] = chunk.choices
        text += choice.delta.content or ""
        tokens += [entry.token for entry in (choice.logprobs.content or [])] if choice.logprobs else []
    assert len(text) == 23 and "".join(tokens) == text  # the token that stopped it is neither shown nor told


async def test_logprobs_of_a_completion_have_their_places_in_the_text(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt="a", max_tokens=3, logprobs=2)
    [choice] = answer.choices
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [0, 1, 2] and choice.logprobs.token_logprobs == [-0.5] * 3
    assert choice.logprobs.top_logprobs is not None
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2, 2, 2]


async def test_half_a_character_is_told_with_the_text_it_completes(stage: Stage) -> None:
    stage.rehearsal.hold = True
    ask = {"model": "m", "messages": HI, "logprobs": True}
    streaming = asyncio.create_task(stage.events("/v1/chat/completions", ask))
    request = await stage.rehearsal.next_request()
    for token_id in tokens_of("🦊"):
        await stage.rehearsal.worker.say(request, [token_id], alternatives=0)
    await stage.rehearsal.worker.say(request, [], Outcome.STOP, alternatives=0)
    *events, _ = await streaming
    choices = [json.loads(event)["choices"][0] for event in events]
    told = [(c["delta"]["content"], c["logprobs"]) for c in choices if c["delta"].get("content")]
    assert [text for text, _ in told] == ["🦊"]
    assert bytes(b for entry in told[0][1]["content"] for b in entry["bytes"]).decode() == "🦊"


async def test_logprobs_in_sglangs_words(stage: Stage) -> None:
    ask = {"text": "a", "sampling_params": {"max_new_tokens": 2}, "return_logprob": True, "top_logprobs_num": 2}
    _, body = await stage.post("/generate", {**ask, "return_text_in_logprobs": True})
    told = body["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in told] == body["output_ids"] and [entry[0] for entry in told] == [-0.5, -0.5]
    assert "".join(entry[2] for entry in told) == body["text"]
    assert [[top[0] for top in tops] for tops in body["meta_info"]["output_top_logprobs"]] == [[-0.5, -1.5]] * 2
    _, plain = await stage.post("/generate", ask)
    assert {entry[2] for entry in plain["meta_info"]["output_token_logprobs"]} == {None}


async def test_several_answers_in_sglangs_words_are_a_list(stage: Stage) -> None:
    ask = {"text": "a", "sampling_params": {"max_new_tokens": 2, "n": 2, "sampling_seed": 3}}
    _, whole = await stage.post("/generate", ask)
    assert [len(one["text"]) for one in whole] == [2, 2] and whole[0]["text"] != whole[1]["text"]
    *events, done = await stage.events("/generate", ask)
    last = {state["index"]: state["text"] for state in map(json.loads, events)}
    assert done == "[DONE]" and last == {0: whole[0]["text"], 1: whole[1]["text"]}


@pytest.mark.parametrize(
    ("given", "slo"),
    [
        ({"slo": {"ttft_ms": 200}}, Slo(ttft_s=0.2)),
        ({"slo": {"ttft_ms": 200, "tpot_ms": 40}}, Slo(ttft_s=0.2, tpot_s=0.04)),
        ({"slo": 1.5}, Slo(ttft_s=1.5)),
        ({}, Slo()),
    ],
)
async def test_a_request_may_have_its_own_slo_and_priority(stage: Stage, given: dict[str, object], slo: Slo) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post("/v1/completions", {"model": "m", "prompt": "a", "priority": 5, **given}))
    request = await stage.rehearsal.next_request()
    assert (request.slo, request.priority) == (slo, 5)
    await stage.rehearsal.worker.say(request, "x", Outcome.STOP)
    assert (await asking)[0] == 200


async def test_choices_that_fail_together_make_one_error(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming = asyncio.create_task(stage.events("/v1/completions", {"model": "m", "prompt": "a", "n": 2}))
    first, second = [await stage.rehearsal.next_request() for _ in range(2)]
    await stage.rehearsal.worker.say(first, "x")
    for request in (first, second):  # in one breath: both are heard before the handler runs again
        await stage.rehearsal.worker.fail(request, "worker_lost", "the engine was lost")
    events = await streaming
    assert ["error" in json.loads(event) for event in events] == [False, True]

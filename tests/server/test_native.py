from __future__ import annotations

import asyncio
import json

from chimera.msg.events import Outcome

from tests.server.conftest import Stage
from tests.server.rehearsal import EOS, model, tokens_of


async def test_generate_answers_in_sglangs_words(stage: Stage) -> None:
    ask = {"model": "m", "text": "the", "sampling_params": {"max_new_tokens": 4}, "rid": "mine"}
    status, body = await stage.post("/generate", ask)
    assert status == 200 and len(body["text"]) == 4 and body["output_ids"] == tokens_of(body["text"])
    meta = body["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 4},
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "cached_tokens": 0,
    }


async def test_streamed_text_is_cumulative(stage: Stage) -> None:
    ask = {"model": "m", "text": "the", "sampling_params": {"max_new_tokens": 4}}
    _, whole = await stage.post("/generate", ask)
    *events, done = await stage.events("/generate", ask)
    states = [json.loads(event) for event in events]
    assert done == "[DONE]"
    assert [state["text"] for state in states] == [whole["text"][:n] for n in range(1, 5)]
    assert [state["meta_info"]["completion_tokens"] for state in states] == [1, 2, 3, 4]
    assert [bool(state["meta_info"]["finish_reason"]) for state in states] == [False, False, False, True]


async def test_the_token_that_stopped_it_is_reported_and_not_shown(stage: Stage) -> None:
    _, body = await stage.post("/generate", {"model": "m", "text": "the"})
    assert body["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    assert body["output_ids"][-1] == EOS and len(body["text"]) == len(body["output_ids"]) - 1


async def test_a_prompt_may_come_as_tokens_and_the_model_may_go_without_saying(stage: Stage) -> None:
    _, named = await stage.post("/generate", {"model": "m", "text": "the", "sampling_params": {"max_new_tokens": 4}})
    _, unnamed = await stage.post("/generate", {"input_ids": [0, *tokens_of("the")], "sampling_params": {"max_new_tokens": 4}})
    assert named["text"] == unnamed["text"]
    stage.rehearsal.register(model("other", stage.run_dir / "m"))
    await stage.client.get(stage.url + "/snapshot")  # control's answer comes after its news
    status, body = await stage.post("/generate", {"text": "the"})
    assert status == 404 and body["error"]["param"] == "model"


async def test_a_stop_string_is_reported_as_what_matched(stage: Stage) -> None:
    stage.rehearsal.hold = True
    waiting = asyncio.create_task(stage.post("/generate", {"text": "a", "sampling_params": {"stop": ["wo"]}}))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "hello w")
    await stage.rehearsal.worker.say(request, "orld", Outcome.LENGTH)
    _, body = await waiting
    assert body["text"] == "hello " and body["meta_info"]["finish_reason"] == {"type": "stop", "matched": "wo"}


async def test_what_was_held_back_is_shown_when_the_answer_ends(stage: Stage) -> None:
    """The beginning of a stop string that did not come, and of a character that was cut off."""
    stage.rehearsal.hold = True
    for words, shown in [(tokens_of("the EN"), "the EN"), (tokens_of("a🦊")[:-1], "a�")]:
        ask = {"text": "a", "sampling_params": {"stop": "END"}}
        waiting = asyncio.create_task(stage.post("/generate", ask))
        request = await stage.rehearsal.next_request()
        await stage.rehearsal.worker.say(request, words)
        await stage.rehearsal.worker.say(request, [], Outcome.LENGTH)
        _, body = await waiting
        assert body["text"] == shown

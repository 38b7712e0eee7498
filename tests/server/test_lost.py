"""What is lost on the way: clients, workers, control. Every answer ends once, whole or in one clear error."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from chimera.msg.events import Outcome

from tests.server.conftest import Stage, until
from tests.server.rehearsal import model, model_folder, tokens_of

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
PROMPT = "<user>hi<assistant>"


class Streaming:
    """A client in the middle of a streamed answer."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    @classmethod
    async def begin(cls, stage: Stage, **change: Any) -> Streaming:
        response = await stage.client.post(stage.url + CHAT, json={**ASK, **change, "stream": True})
        assert response.status == 200, await response.text()
        return cls(response)

    async def rest(self) -> tuple[str, str | None, list[str]]:
        """The text, the message of the error if there was one, and how the stream ended."""
        events = [line.removeprefix("data: ") for line in (await self.response.text()).split("\n\n") if line]
        ends = [event for event in events if event == "[DONE]"]
        bodies = [json.loads(event) for event in events if event != "[DONE]"]
        errors = [body["error"]["message"] for body in bodies if "error" in body]
        assert len(errors) <= 1
        text = "".join(body["choices"][0]["delta"].get("content", "") for body in bodies if body.get("choices"))
        return text, (errors[0] if errors else None), ends


async def begun(stage: Stage) -> tuple[Streaming, Any]:
    """A stream whose first word, `one`, is out, and its request."""
    opening = asyncio.create_task(Streaming.begin(stage))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "one")
    return await opening, request


async def test_a_client_that_leaves_cancels_its_request(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, request = await begun(stage)
    streaming.response.close()
    assert await stage.rehearsal.cancelled.get() == request.request_id
    assert stage.front.desk.open_answers == 0


async def test_a_client_that_left_before_the_headers_is_no_fault_of_ours(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def gone(self: web.StreamResponse, request: web.BaseRequest) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(web.StreamResponse, "prepare", gone)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await stage.client.post(stage.url + CHAT, json={**ASK, "stream": True})
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_leaves_before_the_first_token_cancels_too(stage: Stage) -> None:
    stage.rehearsal.hold = True
    for stream in (True, False):
        waiting = asyncio.create_task(stage.client.post(stage.url + CHAT, json={**ASK, "stream": stream}))
        request = await stage.rehearsal.next_request()
        waiting.cancel()
        assert await stage.rehearsal.cancelled.get() == request.request_id
    assert stage.front.desk.open_answers == 0


async def test_an_answer_that_ended_is_not_cancelled(stage: Stage) -> None:
    await stage.post(CHAT, ASK)
    await stage.events(CHAT, ASK)
    await stage.client.get(stage.url + "/snapshot")  # whatever was sent before has arrived
    assert stage.rehearsal.cancelled.empty()


async def test_a_rejection_before_the_first_token_has_its_status(stage: Stage) -> None:
    stage.rehearsal.hold = True
    for stream in (True, False):
        waiting = asyncio.create_task(stage.client.post(stage.url + CHAT, json={**ASK, "stream": stream}))
        request = await stage.rehearsal.next_request()
        stage.rehearsal.reject(request, "queue_full", "1024 requests wait for m", retry_after_s=2.3)
        response = await waiting
        body = await response.json()
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        assert body["error"]["code"] == "queue_full" and body["error"]["type"] == "rate_limit_error"


async def test_a_failure_after_the_first_token_is_one_event_and_no_done(stage: Stage) -> None:
    stage.rehearsal.hold = True
    for who in ("worker", "control"):
        streaming, request = await begun(stage)
        if who == "worker":
            await stage.rehearsal.worker.fail(request, "internal_error", "out of slots")
        else:
            stage.rehearsal.reject(request, "worker_lost", "out of slots")
        assert await streaming.rest() == ("one", "out of slots", [])


async def test_a_requeued_answer_goes_on_where_it_was(stage: Stage) -> None:
    stage.rehearsal.hold = True
    for who in ("worker", "control"):
        streaming, request = await begun(stage)
        if who == "worker":
            await stage.rehearsal.worker.fail(request, "requeue", "m/0 left", requeue=True)
        else:
            stage.rehearsal.requeue(request)
        again, payload = await stage.rehearsal.next_ask()
        assert payload.input_ids == tokens_of(PROMPT + "one")
        assert (again.prompt_tokens, again.max_tokens, payload.sampling.max_new_tokens) == (len(PROMPT) + 3, 7, 7)
        assert (again.emitted_tokens, again.tries, again.final_tokens) == (3, 1, request.final_tokens)
        await stage.rehearsal.worker.say(request, "late")  # about the try that was given back
        await stage.rehearsal.worker.say(again, "two", Outcome.STOP)
        assert await streaming.rest() == ("onetwo", None, ["[DONE]"])


async def test_an_answer_requeued_with_nothing_left_to_say_is_whole(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, request = await begun(stage)
    await stage.rehearsal.worker.say(request, "fourtwo")
    stage.rehearsal.requeue(request)
    assert await streaming.rest() == ("onefourtwo", None, ["[DONE]"])


async def test_a_request_that_is_given_back_for_ever_ends_in_one_error(stage: Stage) -> None:
    stage.rehearsal.hold = True
    waiting = asyncio.create_task(stage.post(CHAT, ASK))
    for tries in range(4):
        request = await stage.rehearsal.next_request()
        assert request.tries == tries
        await stage.rehearsal.worker.fail(request, "requeue", "no room", requeue=True)
    status, body = await waiting
    assert status == 503 and "4 tries" in body["error"]["message"] and "no room" in body["error"]["message"]
    assert stage.rehearsal.enqueued.empty()


async def test_a_lost_workers_answers_wait_for_controls_word_and_then_end(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, _ = await begun(stage)
    await stage.rehearsal.worker.die()
    text, error, ends = await streaming.rest()
    assert (text, ends) == ("one", []) and error is not None and "lost" in error


async def test_a_lost_workers_answer_that_control_requeues_goes_on(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, request = await begun(stage)
    await stage.rehearsal.worker.die()
    stage.rehearsal.requeue(request)
    again = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(again, "two", Outcome.STOP)
    assert await streaming.rest() == ("onetwo", None, ["[DONE]"])


async def test_a_lost_worker_is_nothing_to_the_answers_of_others(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, request = await begun(stage)
    other = stage.rehearsal.another_worker(stage.run_dir)
    await other.say(request, "not mine")  # a second worker with the same request: only the first is heard
    await other.die()
    await stage.rehearsal.worker.say(request, "two", Outcome.STOP)
    assert await streaming.rest() == ("onetwo", None, ["[DONE]"])


async def test_without_control_a_stream_goes_on(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, request = await begun(stage)
    await stage.rehearsal.stop()
    await until(lambda: not stage.front.ready)
    await stage.rehearsal.worker.say(request, "two", Outcome.STOP)
    assert await streaming.rest() == ("onetwo", None, ["[DONE]"])


async def test_requests_that_nobody_began_to_answer_are_sent_to_the_next_control(stage: Stage) -> None:
    stage.rehearsal.hold = True
    before = asyncio.create_task(stage.post(CHAT, ASK))
    request = await stage.rehearsal.next_request()
    streaming, _ = await begun(stage)
    await stage.rehearsal.stop()
    await until(lambda: not stage.front.ready)
    during = asyncio.create_task(stage.post(CHAT, ASK))
    await until(lambda: stage.front.desk.open_answers == 3)
    await stage.rehearsal.start()
    first, second = await stage.rehearsal.next_request(), await stage.rehearsal.next_request()
    assert first == request
    for again in (first, second):
        await stage.rehearsal.worker.say(again, "x", Outcome.STOP)
    assert [(await waiting)[0] for waiting in (before, during)] == [200, 200]
    assert stage.rehearsal.enqueued.empty()  # the one under way was not sent again
    streaming.response.close()


async def test_without_control_requests_end_in_503_after_a_while(stage: Stage) -> None:
    stage.rehearsal.hold = True
    waiting = asyncio.create_task(stage.client.post(stage.url + CHAT, json=ASK))
    await stage.rehearsal.next_request()
    await stage.rehearsal.stop()
    response = await waiting
    assert response.status == 503 and int(response.headers["Retry-After"]) >= 1
    late = await stage.client.post(stage.url + CHAT, json=ASK)
    assert late.status == 503 and (await late.json())["error"]["code"] == "service_unavailable"
    assert stage.front.desk.open_answers == 0


async def test_control_hears_on_its_return_who_left_meanwhile(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, request = await begun(stage)
    await stage.rehearsal.stop()
    await until(lambda: not stage.front.ready)
    streaming.response.close()
    await until(lambda: stage.front.desk.open_answers == 0)
    await stage.rehearsal.start()
    assert await stage.rehearsal.cancelled.get() == request.request_id


async def test_what_breaks_the_contract_ends_only_its_own_connection(stage: Stage) -> None:
    stage.rehearsal.hold = True
    streaming, request = await begun(stage)
    _, stranger = await asyncio.open_unix_connection(str(stage.run_dir / "front-0.sock"))
    stranger.write(b"GET / HTTP/1.1\r\n\r\n")
    await stranger.drain()
    stranger.close()
    await stranger.wait_closed()
    await stage.rehearsal.worker.say(request, "two", Outcome.STOP)
    assert await streaming.rest() == ("onetwo", None, ["[DONE]"])


async def test_a_client_that_never_reads_is_taken_for_gone(stage: Stage) -> None:
    stage.rehearsal.hold = True
    host, port = stage.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    body = json.dumps({**ASK, "stream": True}).encode()
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
    request = await stage.rehearsal.next_request()
    word = tokens_of("a") * 100_000
    async with asyncio.timeout(20):
        while stage.rehearsal.cancelled.empty():
            await stage.rehearsal.worker.say(request, word)
            await asyncio.sleep(0)
    assert stage.rehearsal.cancelled.get_nowait() == request.request_id
    writer.close()


async def test_a_client_of_http_1_0_gets_a_stream_without_chunks(stage: Stage) -> None:
    host, port = stage.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({**ASK, "stream": True, "max_tokens": 2}).encode()
    writer.write(b"POST %b HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
    head, _, events = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200") and b"chunked" not in head
    assert events.startswith(b"data: {") and events.endswith(b"data: [DONE]\n\n")
    writer.close()
    await writer.wait_closed()


async def test_a_full_queue_says_how_long_and_where_one_would_have_stood(stage: Stage) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.client.post(stage.url + CHAT, json=ASK))
    request = await stage.rehearsal.next_request()
    stage.rehearsal.reject(request, "queue_full", "7 requests for m wait already", 3.25, 8)
    async with await asking as response:
        told = [response.headers[name] for name in ("Retry-After", "x-estimated-wait", "x-queue-position")]
        assert (response.status, told) == (429, ["4", "3.250", "8"])


async def test_a_model_whose_folder_was_deleted_before_it_was_asked_says_so_and_is_served_when_it_is_back(stage: Stage) -> None:
    folder = model_folder(stage.run_dir / "gone")
    shutil.rmtree(folder)
    stage.rehearsal.register(model("gone", folder))
    await until(lambda: len(stage.front.catalogue.models) == 2)
    body = {"model": "gone", "prompt": "hello", "max_tokens": 3}
    status, told = await stage.post("/v1/completions", body)
    assert (status, told["error"]["code"]) == (503, "model_unavailable") and str(folder) in told["error"]["message"]
    assert (await stage.post("/v1/completions", {**body, "model": "m"}))[0] == 200
    model_folder(folder)
    assert (await stage.post("/v1/completions", body))[0] == 200

"""What clients send by mistake or on purpose: one clear error each, in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import asyncio
import logging
from io import BytesIO
from typing import Any

import pytest
from chimera.server import bodies, front

from tests.server.conftest import Stage, set_up
from tests.server.rehearsal import CONTEXT

pytestmark = pytest.mark.asyncio(loop_scope="module")

NO_OBJECTS = [
    *(b"", b"{", b"[1]", b'"x"', b"{\x00}", b"[" * 100_000),
    *(b'{"model": "\xff"}', b'{"model": "\\ud800"}', b'{"model": 1e999}'),
]
HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION, GENERATE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
BAD_CALL = {"id": "1", "function": {"name": "f", "arguments": "no object"}}
CALLED = "messages[1].tool_calls[0].function.arguments"


async def error_of(standing: Stage, path: str, data: bytes | BytesIO, method: str = "POST") -> tuple[int, dict[str, Any]]:
    async with standing.client.request(method, standing.url + path, data=data) as response:
        body = await response.json()
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        return response.status, body["error"]


@pytest.mark.parametrize("path", [CHAT, COMPLETION, GENERATE])
@pytest.mark.parametrize("body", NO_OBJECTS)
async def test_a_body_that_is_no_json_object(standing: Stage, path: str, body: bytes) -> None:
    status, error = await error_of(standing, path, body)
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "bad_request")


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"content": "no role"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
        (CHAT, {"model": 7}, "model"),
        (CHAT, {"model": None}, "model"),
        (CHAT, {"max_tokens": -1}, "max_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": "many"}, "max_completion_tokens"),
        (CHAT, {"max_tokens": 10**30}, "max_tokens"),
        (CHAT, {"temperature": -0.1}, "temperature"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"top_p": 1.1}, "top_p"),
        (CHAT, {"seed": 1.5}, "seed"),
        (CHAT, {"stream": "yes"}, "stream"),
        (CHAT, {"stop": 1}, "stop"),
        (CHAT, {"stop": ""}, "stop"),
        (CHAT, {"stop": ["x"] * 17}, "stop"),
        (CHAT, {"stream_options": True}, "stream_options"),
        (COMPLETION, {"prompt": 5}, "prompt"),
        (COMPLETION, {"prompt": []}, "prompt"),
        (COMPLETION, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETION, {"prompt": ["a"] * 129}, "n"),
        (COMPLETION, {"prompt": ["a", "b"], "n": 65}, "n"),
        (COMPLETION, {"logprobs": 21}, "logprobs"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"logit_bias": {"none": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"65": 101}}, "logit_bias[...]"),
        (CHAT, {"logit_bias": {"1000000": 1}}, "logit_bias"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0]"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (CHAT, {"messages": [HI[0], {"role": "assistant", "tool_calls": [BAD_CALL]}]}, CALLED),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (RESPONSES, {"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "input[0].arguments"),
        (CHAT, {"n": 129}, "n"),
        (CHAT, {"logprobs": 2}, "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"priority": 1001}, "priority"),
        (CHAT, {"slo": {"ttft_ms": 0}}, "slo.ttft_ms"),
        (CHAT, {"slo": -1}, "slo"),
        (COMPLETION, {"prompt": [10**6]}, "prompt"),
        (COMPLETION, {"prompt": [-1]}, "prompt"),
        (COMPLETION, {"max_tokens": -1}, "max_tokens"),
        (GENERATE, {"text": 1}, "text"),
        (GENERATE, {"input_ids": [1], "text": "both"}, "text"),
        (GENERATE, {"text": None}, "text"),
        (GENERATE, {"text": None, "input_ids": [10**6]}, "input_ids"),
        (GENERATE, {"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        (GENERATE, {"sampling_params": []}, "sampling_params"),
    ],
)
async def test_a_field_of_a_wrong_kind_is_named(standing: Stage, path: str, change: dict[str, Any], param: str) -> None:
    status, body = await standing.post(path, {**good(path), **change})
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "bad_request", param), body
    assert param.split(".")[0].split("[")[0] in body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"modalities": ["audio"]}, "modalities"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        (COMPLETION, {"echo": True}, "echo"),
        (COMPLETION, {"best_of": 3}, "best_of"),
        (COMPLETION, {"suffix": "the end"}, "suffix"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools[0]"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (GENERATE, {"text": ["a", "b"]}, "text"),
        (GENERATE, {"text": None, "input_ids": [[1], [2]]}, "input_ids"),
        (GENERATE, {"return_logprob": True, "logprob_start_len": 0}, "logprob_start_len"),
        (GENERATE, {"lora_path": "somewhere"}, "lora_path"),
    ],
)
async def test_what_is_known_and_not_served_is_refused_by_name(
    standing: Stage, path: str, change: dict[str, Any], param: str
) -> None:
    status, body = await standing.post(path, {**good(path), **change})
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "unsupported_parameter", param), body


@pytest.mark.parametrize("harmless", [{"n": 1}, {"tools": []}, {"logprobs": False}, {"temperature": None}, {"x": {}}])
async def test_what_asks_for_nothing_or_is_unknown_is_tolerated(standing: Stage, harmless: dict[str, Any]) -> None:
    status, _ = await standing.post(CHAT, {**good(CHAT), **harmless})
    assert status == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETION, GENERATE])
async def test_an_unknown_model_is_told_the_nearest_name(standing: Stage, path: str) -> None:
    status, body = await standing.post(path, {**good(path), "model": "also_m"})
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    assert "did you mean 'also-m'?" in body["error"]["message"]


@pytest.mark.parametrize("tokens", [CONTEXT, 3 * CONTEXT])
async def test_a_prompt_as_long_as_the_context_is_refused_with_both_lengths(standing: Stage, tokens: int) -> None:
    status, body = await standing.post(COMPLETION, {"model": "m", "prompt": [65] * tokens, "max_tokens": 1})
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert str(CONTEXT) in body["error"]["message"] and str(tokens) in body["error"]["message"]


async def test_a_prompt_and_an_answer_that_do_not_fit_together_are_refused(standing: Stage) -> None:
    ask = {"model": "m", "prompt": [65] * (CONTEXT - 10)}
    assert (await standing.post(COMPLETION, {**ask, "max_tokens": 10}))[0] == 200
    status, body = await standing.post(COMPLETION, {**ask, "max_tokens": 11})
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_body_over_the_limit_is_not_read(standing: Stage) -> None:
    status, error = await error_of(standing, CHAT, BytesIO(b" " * (16 * 2**20 + 1)))
    assert (status, error["type"], error["code"]) == (413, "invalid_request_error", "body_too_large")


async def test_a_long_prompt_within_the_limit_is_counted_not_served(standing: Stage) -> None:
    status, body = await standing.post(CHAT, {"model": "m", "messages": [{"role": "user", "content": "lorem " * 50_000}]})
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


async def raw(standing: Stage, said: bytes, within_s: float = 5.0) -> bytes:
    """What the server first answers to bytes that no client library would send."""
    host, port = standing.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(said)
    try:
        async with asyncio.timeout(within_s):
            return await reader.read(1 << 16)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "header",
    [b"Authorization: Bearer sk-very-secret\x00", b"x-api-key: sk-very-secret" + b"x" * 10_000, b"sk-very-secret"],
)
async def test_a_request_that_is_no_http_is_refused_and_its_key_is_not_logged(
    standing: Stage, header: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = await raw(standing, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
    assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400")), answer
    assert "sk-very-secret" not in caplog.text and "is no HTTP" in caplog.text


async def test_headers_that_never_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_IDLE_S", 0.05)
    async with set_up() as stage:
        assert await raw(stage, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""


async def test_a_body_that_does_not_come_is_given_up(standing: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_BODY_WITHIN_S", 0.05)
    answer = await raw(standing, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 400") and b"did not arrive within 0.05 s" in answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", COMPLETION, 405),
        ("GET", GENERATE, 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models/m", 405),
        ("POST", "/v1/embedding", 404),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc", 404),
    ],
)
async def test_a_wrong_method_or_path_is_told_so(standing: Stage, method: str, path: str, status: int) -> None:
    got, error = await error_of(standing, path, b"{}", method)
    assert got == status and error["type"] == "invalid_request_error"


def good(path: str) -> dict[str, Any]:
    asked = {CHAT: {"messages": HI}, COMPLETION: {"prompt": "a"}, GENERATE: {"text": "a"}, RESPONSES: {"input": "a"}}
    return {"model": "m", **asked[path]}

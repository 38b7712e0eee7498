"""Who is let in, to what, how often, and from which sites."""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from chimera.core.access import Access, ApiKey, hash_of
from chimera.errors import RequestError
from chimera.server.gate import Guest

from tests.server.conftest import Stage, set_up

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
KEYS = (
    ApiKey(name="anna", hash=hash_of("sk-anna"), requests_per_minute=2),
    ApiKey(name="bert", hash=hash_of("sk-bert"), models=("other",)),
    ApiKey(name="root", hash=hash_of("sk-root"), admin=True),
    ApiKey(name="few", hash=hash_of("sk-few"), tokens_per_minute=20),
)


async def ask(stage: Stage, headers: dict[str, str], path: str = CHAT, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    async with stage.client.post(stage.url + path, json=body or ASK, headers=headers) as response:
        return response.status, await response.json()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        bearer("sk-root"),
        {"x-api-key": "sk-root"},
        {"Authorization": "Basic " + base64.b64encode(b"anyone:sk-root").decode()},
    ],
)
async def test_a_key_is_taken_in_any_of_three_places(headers: dict[str, str]) -> None:
    async with set_up(Access(keys=KEYS)) as stage:
        assert (await ask(stage, headers))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("sk-nobody"),
        bearer(""),
        bearer(hash_of("sk-root")),
        {"Authorization": "sk-root"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Digest sk-root"},
    ],
)
async def test_without_a_known_key_nobody_comes_further(headers: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with set_up(Access(keys=KEYS)) as stage:
        status, body = await ask(stage, headers)
        assert (status, body["error"]["type"], body["error"]["code"]) == (401, "authentication_error", "invalid_api_key")
        status, body = await ask(stage, headers, "/v1/messages", {**ASK})
        assert (status, body["error"]["type"]) == (401, "authentication_error")
        for path in ("/v1/models", "/snapshot", "/models/events", "/no/such/path"):
            async with stage.client.get(stage.url + path, headers=headers) as response:
                assert response.status == 401
        async with stage.client.get(stage.url + "/health") as response:
            assert response.status == 200
    assert "sk-nobody" not in caplog.text


async def test_a_key_may_be_for_some_models_only() -> None:
    async with set_up(Access(keys=KEYS)) as stage:
        status, body = await ask(stage, bearer("sk-bert"))
        assert (status, body["error"]["type"]) == (403, "permission_error") and "'bert'" in body["error"]["message"]
        async with stage.client.get(stage.url + "/v1/models", headers=bearer("sk-bert")) as response:
            assert (await response.json())["data"] == []
        status, _ = await ask(stage, bearer("sk-bert"), "/v1/messages/count_tokens", {k: ASK[k] for k in ("model", "messages")})
        assert status == 403


async def test_orders_need_an_operators_key() -> None:
    async with set_up(Access(keys=KEYS)) as stage:
        for path in ("/models/load", "/models/unload", "/models/pin", "/activate", "/deactivate"):
            assert (await ask(stage, bearer("sk-anna"), path, {"model": "absent"}))[0] == 403
        async with stage.client.delete(stage.url + "/models/m", headers=bearer("sk-anna")) as response:
            assert response.status == 403
        async with stage.client.put(stage.url + "/policy", json={}, headers=bearer("sk-anna")) as response:
            assert response.status == 403
        assert (await ask(stage, bearer("sk-root"), "/models/load", {"model": "absent"}))[0] == 404


async def test_requests_per_minute_are_counted_and_the_wait_is_computed() -> None:
    async with set_up(Access(keys=KEYS)) as stage:
        assert [(await ask(stage, bearer("sk-anna")))[0] for _ in range(2)] == [200, 200]
        async with stage.client.post(stage.url + CHAT, json=ASK, headers=bearer("sk-anna")) as response:
            body = await response.json()
            assert (response.status, body["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 25 <= int(response.headers["Retry-After"]) <= 30
        assert (await ask(stage, bearer("sk-root")))[0] == 200


async def test_tokens_per_minute_count_prompts_and_answers() -> None:
    async with set_up(Access(keys=KEYS)) as stage:
        assert (await ask(stage, bearer("sk-few")))[0] == 200  # 19 of prompt and 5 of answer
        status, body = await ask(stage, bearer("sk-few"))
        assert status == 429 and "tokens" in body["error"]["message"]


def test_an_allowance_comes_back_with_time() -> None:
    now = 0.0
    guest = Guest(ApiKey(name="k", hash="", requests_per_minute=60, tokens_per_minute=600), 0.5, lambda: now)
    for _ in range(30):  # half of it: the other front-end has the other half
        guest.admit()
    with pytest.raises(RequestError) as refused:
        guest.admit()
    assert refused.value.retry_after_s == pytest.approx(2.0)
    now = 2.0
    guest.admit()
    guest.charge(900)
    with pytest.raises(RequestError, match="requests"):
        guest.admit()
    now = 60.0
    with pytest.raises(RequestError, match="tokens"):
        guest.admit()
    now = 300.0
    guest.admit()


async def test_pages_of_other_sites_may_not_read_answers_unless_told_so() -> None:
    origin = {"Origin": "https://app.example"}
    async with set_up() as stage:
        async with stage.client.post(stage.url + CHAT, json=ASK, headers=origin) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
        assert (await ask(stage, origin, "/models/unload", {"model": "m"}))[0] == 403
    async with set_up(Access(keys=KEYS, cors_origins=("https://app.example",))) as stage:
        async with stage.client.options(stage.url + CHAT, headers=origin) as response:
            assert response.status == 204 and "x-api-key" in response.headers["Access-Control-Allow-Headers"]
        body = {**ASK, "stream": True}
        async with stage.client.post(stage.url + CHAT, json=body, headers={**origin, **bearer("sk-root")}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert (await response.text()).endswith("data: [DONE]\n\n")
        async with stage.client.post(stage.url + CHAT, json=ASK, headers=origin) as response:
            assert response.status == 401 and response.headers["Access-Control-Allow-Origin"] == "https://app.example"
        async with stage.client.options(stage.url + CHAT, headers={"Origin": "https://evil.example"}) as response:
            assert response.status == 401 and "Access-Control-Allow-Origin" not in response.headers


async def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, words, check=True, capture_output=True)
    async with set_up(Access(tls_cert=str(cert), tls_key=str(key))) as stage:
        assert stage.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(cert))
        body = {**ASK, "stream": True}
        async with stage.client.post(stage.url + CHAT, json=body, ssl=trust) as response:
            assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_thousands_of_keys_are_told_apart_in_little_time_and_leave_no_trace_in_the_metrics() -> None:
    keys = tuple(ApiKey(name=f"client-{number}", hash=hash_of(f"sk-{number}")) for number in range(5000))
    async with set_up(Access(keys=keys)) as stage:
        took_s = []
        for number in (0, 2500, 4999):
            began_s = time.perf_counter()
            assert (await ask(stage, bearer(f"sk-{number}")))[0] == 200
            took_s.append(time.perf_counter() - began_s)
            assert (await stage.rehearsal.records.get()).key == f"client-{number}"
        assert (await ask(stage, bearer("sk-5000")))[0] == 401
        assert min(took_s) < 0.5, took_s
        async with stage.client.get(stage.url + "/metrics", headers=bearer("sk-1")) as response:
            page = await response.text()
        assert "chimera_http_answers_total" in page and "client-" not in page and "sk-" not in page

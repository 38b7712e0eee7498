"""Health, models and the snapshot: what readers of a running server see."""

from __future__ import annotations

from typing import Any

import msgspec
from chimera.core.ledger_view import LedgerView

from tests.server.conftest import Stage, until
from tests.server.rehearsal import model, model_folder

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def get(stage: Stage, path: str) -> tuple[int, dict[str, Any]]:
    async with stage.client.get(stage.url + path) as response:
        return response.status, await response.json()


async def test_health_says_whether_requests_can_be_taken(stage: Stage) -> None:
    assert await get(stage, "/health") == (200, {"status": "ok"})
    await stage.rehearsal.stop()
    await until(lambda: not stage.front.ready)
    async with stage.client.get(stage.url + "/health") as response:
        assert response.status == 503 and int(response.headers["Retry-After"]) >= 1
    await stage.rehearsal.start()
    await until(lambda: stage.front.ready)
    assert (await get(stage, "/health"))[0] == 200


async def test_health_generate_asks_a_model_that_is_up_for_a_token(stage: Stage) -> None:
    status, body = await get(stage, "/health_generate")
    assert (status, body["status"], body["model"]) == (200, "ok", "m")
    stage.rehearsal.serving.clear()
    assert (await get(stage, "/health_generate"))[0] == 503


async def test_the_snapshot_is_controls(stage: Stage) -> None:
    status, body = await get(stage, "/snapshot")
    assert status == 200
    assert body["policy"] == "static" and body["waiting"] == {"absent": 3}
    assert [spec["name"] for spec in body["models"]] == ["m"]


async def test_the_ledger_is_the_agents(stage: Stage) -> None:
    status, body = await get(stage, "/ledger")
    view = msgspec.convert(body, LedgerView)
    assert status == 200
    assert [(ledger.gpu.gpu_id, ledger.free) for ledger in view.gpus] == [(0, 1024)]


async def test_without_control_there_is_no_snapshot(stage: Stage) -> None:
    await stage.rehearsal.stop()
    await until(lambda: not stage.front.ready)
    assert (await get(stage, "/snapshot"))[0] == 503


async def test_models_come_and_go_while_serving(stage: Stage) -> None:
    stage.rehearsal.register(model("new", model_folder(stage.run_dir / "new")))
    await get(stage, "/snapshot")
    assert (await stage.post("/generate", {"model": "new", "text": "a"}))[0] == 200
    stage.rehearsal.remove("new")
    await get(stage, "/snapshot")
    assert (await stage.post("/generate", {"model": "new", "text": "a"}))[0] == 404


async def test_a_model_that_left_while_control_was_away_is_forgotten(stage: Stage) -> None:
    stage.rehearsal.register(model("new", stage.run_dir / "m"))
    await get(stage, "/snapshot")
    await stage.rehearsal.stop()
    await until(lambda: not stage.front.ready)
    stage.rehearsal.models.pop()
    await stage.rehearsal.start()
    await until(lambda: stage.front.ready)
    assert [spec.name for spec, _ in stage.front.catalogue.models] == ["m"]


async def test_templates_verdict_on_the_messages_is_the_clients_to_read(stage: Stage) -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('one message, please') }}{% endif %}x"
    (stage.run_dir / "m" / "chat_template.jinja").write_text(template)
    status, body = await stage.post("/v1/chat/completions", {"model": "m", "messages": ASK["messages"] * 2})
    assert (status, body["error"]["param"]) == (400, "messages") and "one message, please" in body["error"]["message"]


async def test_a_model_whose_folder_is_gone_is_our_fault_and_says_which(stage: Stage) -> None:
    (stage.run_dir / "m" / "tokenizer.json").rename(stage.run_dir / "moved")
    status, body = await stage.post("/v1/chat/completions", ASK)
    assert (status, body["error"]["type"]) == (503, "server_error") and "no tokenizer.json" in body["error"]["message"]
    (stage.run_dir / "moved").rename(stage.run_dir / "m" / "tokenizer.json")
    assert (await stage.post("/v1/chat/completions", ASK))[0] == 200

"""`chimera chat` and `chimera status` against a front-end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from chimera.cli.main import main
from chimera.cli.status import render
from chimera.core.gpu import Gpu
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.msg.events import Outcome

from tests.server.conftest import Stage
from tests.server.rehearsal import model


async def chimera(*words: str) -> int:
    """A verb, in a thread: the server it talks to is in this loop."""
    return await asyncio.to_thread(main, list(words))


async def test_one_message_gets_one_answer(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.rehearsal.hold = True
    words = ("chat", "m", "--url", stage.url, "--system", "be brief", "-m", "hi", "--max-tokens", "9")
    speaking = asyncio.create_task(chimera(*words))
    request, payload = await stage.rehearsal.next_ask()
    assert payload.sampling.max_new_tokens == 9 and len(payload.input_ids) == len("<system>be brief<user>hi<assistant>")
    await stage.rehearsal.worker.say(request, "well, ")
    await stage.rehearsal.worker.say(request, "hello", Outcome.STOP)
    assert await speaking == 0
    assert capsys.readouterr().out == "well, hello\n"


async def test_a_conversation_remembers_what_was_said(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.rehearsal.hold = True
    lines = iter(["hi", "", "and?"])

    def type_in(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_in)
    speaking = asyncio.create_task(chimera("chat", "m", "--url", stage.url))
    for prompt, answer in [("<user>hi<assistant>", "one"), ("<user>hi<assistant>one<user>and?<assistant>", "two")]:
        request, payload = await stage.rehearsal.next_ask()
        assert len(payload.input_ids) == len(prompt)
        await stage.rehearsal.worker.say(request, answer, Outcome.STOP)
    assert await speaking == 0
    assert capsys.readouterr().out == "one\ntwo\n\n"


async def test_ctrl_c_stops_the_answer_and_frees_its_engine(stage: Stage) -> None:
    stage.rehearsal.hold = True
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chimera", "chat", "m", "--url", stage.url, "-m", "hi"), stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "well")
    assert await program.stdout.readexactly(4) == b"well"
    program.send_signal(signal.SIGINT)
    assert await stage.rehearsal.cancelled.get() == request.request_id
    assert (await program.stdout.read()).decode() == " …stopped\n"
    assert await program.wait() == 130


async def test_the_servers_refusal_is_printed_as_it_is(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert await chimera("chat", "mm", "--url", stage.url, "-m", "hi") == 1
    assert "did you mean 'm'?" in capsys.readouterr().err


async def test_an_answer_that_fails_half_way_says_so(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.rehearsal.hold = True
    speaking = asyncio.create_task(chimera("chat", "m", "--url", stage.url, "-m", "hi"))
    request = await stage.rehearsal.next_request()
    await stage.rehearsal.worker.say(request, "well")
    await stage.rehearsal.worker.fail(request, "worker_lost", "the engine was lost")
    assert await speaking == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("well\n", "the engine was lost\n")


@pytest.mark.parametrize("verb", [["status"], ["chat", "m", "-m", "hi"]])
def test_without_a_server_the_error_says_what_to_do(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--url", "http://127.0.0.1:1"]) == 1
    assert "no server at http://127.0.0.1:1" in capsys.readouterr().err
    assert main([*verb, "--url", "ftp://x"]) == 1


async def test_status_shows_the_snapshot_as_a_table_or_as_json(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert await chimera("status", "--url", stage.url) == 0
    assert "policy static, requests by fcfs · 1 GPU · 1 model, 1 up" in capsys.readouterr().out
    assert await chimera("status", "--url", stage.url.removeprefix("http://"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "static"


def test_the_table_says_what_every_model_does_and_where() -> None:
    up = ReplicaView(
        replica=ReplicaId("llama"),
        epoch=Epoch(1, 1),
        state=ReplicaState.SERVING,
        gpu_ids=(0, 1),
        running=3,
        queued=1,
        kv_tokens=8192,
        kv_used_tokens=1200,
    )
    coming = ReplicaView(replica=ReplicaId("llama", 1), epoch=None, state=ReplicaState.LOADING, gpu_ids=(2,))
    folder = Path("/models")
    snapshot = Snapshot(
        now_s=1.0,
        policy="static",
        gpus=tuple(Gpu(gpu_id=i, capacity_bytes=2 << 30) for i in range(3)),
        models=(model("llama", folder), model("qwen", folder)),
        replicas=(up, coming),
        waiting={"qwen": 7},
    )
    assert render(snapshot).splitlines() == [
        "policy static, requests by fcfs · 3 GPUs · 2 models, 1 up",
        "",
        "MODEL    STATE    GPU  RUNNING  QUEUED  WAITING  KV TOKENS",
        "llama    serving  0,1  3        1                1,200 of 8,192",
        "llama/1  loading  2    0        0",
        "qwen     down                           7",
        "",
        "GPU  NODE   NAME     MEMORY  MODELS",
        "0    local  virtual  2 GiB   llama",
        "1    local  virtual  2 GiB   llama",
        "2    local  virtual  2 GiB   llama",
    ]

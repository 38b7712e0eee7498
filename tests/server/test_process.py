"""The front-end as a process: its port, its signals, its end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import pytest
from chimera.msg.events import Outcome
from chimera.server.front import listen

from tests.server.rehearsal import Rehearsal, model, model_folder

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.fixture
async def rehearsal() -> AsyncIterator[Rehearsal]:
    with TemporaryDirectory(prefix="chimera-") as folder:
        rehearsal = Rehearsal(Path(folder), [model("m", model_folder(Path(folder) / "m"))])
        rehearsal.hold = True
        yield rehearsal
        await rehearsal.close()


async def front_end(rehearsal: Rehearsal, port: int) -> asyncio.subprocess.Process:
    command = ["-m", "chimera.server", "--run-dir", str(rehearsal.run_dir), "--name", "front-0", "--port", str(port)]
    return await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)


async def test_a_port_in_use_is_one_clear_line_and_status_2(rehearsal: Rehearsal) -> None:
    await rehearsal.start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await front_end(rehearsal, port)
        _, told = await process.communicate()
    assert process.returncode == 2
    assert told.decode() == f"cannot listen on 127.0.0.1:{port}: Address already in use\n"


async def test_it_waits_for_control_drains_its_streams_and_leaves_nothing_behind(rehearsal: Rehearsal) -> None:
    port = free_port()
    process = await front_end(rehearsal, port)
    assert process.stderr is not None
    assert f"listens on http://127.0.0.1:{port}" in (await process.stderr.readline()).decode()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/health")).status == 503  # it came up before control did
        await rehearsal.start()
        await rehearsal.greeted.wait()
        streaming = asyncio.create_task(client.post("/v1/chat/completions", json=ASK))
        request = await rehearsal.next_request()
        await rehearsal.worker.say(request, "one")
        response = await streaming
        process.send_signal(signal.SIGTERM)
        await until_refused(port)
        await rehearsal.worker.say(request, "two", Outcome.STOP)
        assert (await response.text()).endswith("data: [DONE]\n\n")
    assert await process.wait() == 0
    assert not (rehearsal.run_dir / "front-0.sock").exists()


async def test_told_twice_it_ends_its_streams_in_an_error_and_leaves(rehearsal: Rehearsal) -> None:
    await rehearsal.start()
    port = free_port()
    process = await front_end(rehearsal, port)
    await rehearsal.greeted.wait()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        streaming = asyncio.create_task(client.post("/v1/chat/completions", json=ASK))
        request = await rehearsal.next_request()
        await rehearsal.worker.say(request, "one")
        response = await streaming
        process.send_signal(signal.SIGTERM)
        await until_refused(port)
        process.send_signal(signal.SIGINT)
        last = (await response.text()).removesuffix("\n\n").split("\n\n")[-1]
    assert "stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert await process.wait() == 0
    assert await rehearsal.cancelled.get() == request.request_id


async def test_front_ends_share_a_port_and_strangers_do_not_get_it() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with listen("127.0.0.1", port):
            first.listen()
            with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
                stranger.bind(("127.0.0.1", port))


async def until_refused(port: int) -> None:
    """Until the front-end has closed its port."""
    async with asyncio.timeout(5):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # it was closing just then
                continue
            writer.close()
            await writer.wait_closed()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from chimera.core.access import Access
from chimera.server.desk import Patience
from chimera.server.front import FrontEnd, listen

from tests.server.rehearsal import Rehearsal, model, model_folder


class Stage:
    """A front-end before a rehearsed control and worker, and a client."""

    def __init__(self, run_dir: Path, rehearsal: Rehearsal, front: FrontEnd, client: aiohttp.ClientSession) -> None:
        self.run_dir = run_dir
        self.rehearsal = rehearsal
        self.front = front
        self.client = client
        self.url = front.url

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self.client.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """What a streamed answer sends, to its end."""
        async with self.client.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            text = (await response.read()).decode()
        assert text.endswith("\n\n")
        return [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with set_up() as stage:
        yield stage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing() -> AsyncIterator[Stage]:
    """One for all tests of a module that leave it as they found it."""
    async with set_up() as stage:
        yield stage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedding(standing: Stage) -> Stage:
    """The standing one with a second model, which makes embeddings."""
    standing.rehearsal.register(model("e", standing.run_dir / "m", embedding=True))
    await until(lambda: len(standing.front.catalogue.models) == 2)
    return standing


@contextlib.asynccontextmanager
async def set_up(access: Access | None = None, **more: Any) -> AsyncIterator[Stage]:
    """`more`: of the front-end's."""
    with TemporaryDirectory(prefix="chimera-") as folder:  # not tmp_path: its paths are longer than a socket's may be
        run_dir = Path(folder)
        rehearsal = Rehearsal(run_dir, [model("m", model_folder(run_dir / "m"), aliases=("also-m",))])
        await rehearsal.start()
        patience = Patience(control_s=0.2, worker_s=0.05)
        listener = listen("127.0.0.1", 0)
        front = FrontEnd(run_dir=run_dir, name="front-0", listener=listener, patience=patience, access=access, **more)
        await front.start()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
            try:
                await until(lambda: front.ready)
                yield Stage(run_dir, rehearsal, front, client)
            finally:
                await front.close()
                await rehearsal.close()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something has come through a socket."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0)

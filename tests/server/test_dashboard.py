"""The page and its stream: open to all and empty of secrets the one, for keys and shared by all viewers the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import aiohttp
import pytest
from chimera.core.access import Access, ApiKey, hash_of
from chimera.core.record import Entry
from chimera.core.sight import Sight
from chimera.errors import RequestError
from chimera.server import dashboard
from chimera.server.dashboard import Dashboard

from tests.server.conftest import Stage, set_up, until
from tests.server.rehearsal import model, model_folder

PAGE = {path.name: path.read_text() for path in (files("chimera.server") / "page").iterdir()}
KEYS = (
    ApiKey(name="root", hash=hash_of("sk-root"), admin=True),
    ApiKey(name="anna", hash=hash_of("sk-anna")),
    ApiKey(name="bert", hash=hash_of("sk-bert"), models=("m",)),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "_EVERY_S", 0.01)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Viewer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.raw: list[bytes] = []

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            line = await self._response.content.readuntil(b"\n\n")
        self.raw.append(line)
        told: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
        return told

    async def next_of(self, kind: str) -> dict[str, Any]:
        while (event := await self.next())["of"] != kind:
            pass
        return event


@contextlib.asynccontextmanager
async def viewer(stage: Stage, key: str = "") -> AsyncIterator[Viewer]:
    async with stage.client.get(stage.url + "/sight", headers=bearer(key) if key else {}) as response:
        assert response.status == 200
        yield Viewer(response)


async def test_the_page_is_served_with_everything_it_asks_for(stage: Stage) -> None:
    asked = {"/", *re.findall(r'(?:href|src)="(/[^"]+)"', PAGE["index.html"])}
    for script in (text for name, text in PAGE.items() if name.endswith(".js")):
        asked |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', script)}
    assert {path.removeprefix("/page/") for path in asked - {"/"}} == PAGE.keys() - {"index.html"}
    for path in asked:
        async with stage.client.get(stage.url + path) as response:
            assert response.status == 200
            assert (await response.text()) == PAGE[path.removeprefix("/page/") if path != "/" else "index.html"]
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert "unsafe" not in response.headers["Content-Security-Policy"]
            etag = response.headers["ETag"]
        async with stage.client.get(stage.url + path, headers={"If-None-Match": etag}) as response:
            assert response.status == 304
    async with stage.client.get(stage.url + "/page/../dashboard.py") as response:
        assert response.status == 404


def test_nothing_of_the_page_comes_from_elsewhere_or_becomes_markup() -> None:
    for name, text in PAGE.items():
        outside = [url for url in re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", text) if "www.w3.org/2000/svg" not in url]
        assert outside == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
    assert sum(len(text.encode()) for text in PAGE.values()) < 100_000


async def test_with_keys_the_page_is_open_and_what_it_shows_is_not() -> None:
    async with set_up(Access(keys=KEYS)) as stage:
        for path in ("/", "/page/style.css"):
            async with stage.client.get(stage.url + path) as response:
                assert response.status == 200
        for path in ("/sight", "/sight/past"):
            async with stage.client.get(stage.url + path) as response:
                assert response.status == 401
        for key, admin in (("sk-root", True), ("sk-anna", False), ("sk-bert", False)):
            async with viewer(stage, key) as looking:
                assert (await looking.next())["admin"] is admin


async def test_a_sight_is_asked_once_for_all_viewers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async with viewer(stage) as first, viewer(stage) as second:
        await second.next_of("sight")
        while second.raw[-1] not in first.raw:  # the very bytes; who came first may have some more to read before
            await first.next_of("sight")
        monkeypatch.setattr(dashboard, "_EVERY_S", 0.1)
        before = stage.rehearsal.sights
        came_s = []
        for _ in range(5):
            came_s.append((await first.next_of("sight"))["at_s"])
            await second.next_of("sight")
        assert stage.rehearsal.sights - before <= 7
        assert came_s[-1] - came_s[0] > 0.35  # one asks, not one for each viewer
    await until(lambda: not stage.front.dashboard.viewers)
    settled = stage.rehearsal.sights
    async with stage.client.get(stage.url + "/snapshot") as response:  # a round through control: nothing was on its way
        assert response.status == 200
    assert stage.rehearsal.sights <= settled + 1


async def test_the_cast_comes_with_the_past_and_again_when_it_changes(stage: Stage) -> None:
    stage.rehearsal.news.append((7, Entry(at_s=1.0, what="activate", model="m", reason="because")))
    async with viewer(stage) as looking:
        first = await looking.next_of("sight")
        async with stage.client.get(stage.url + "/sight/past") as response:
            past = await response.json()
        assert [part["name"] for part in past["cast"]["models"]] == ["m"]
        assert first["cast"] == past["cast"]["number"]
        assert first["changed"] is None and first["news"] == []  # that would be twice on its way
        assert (await looking.next_of("sight"))["changed"] is None
        wild = "<img src=x onerror=alert(1)>\x1b[2J"
        stage.rehearsal.register(model(wild, model_folder(stage.run_dir / "wild")))
        while (sight := await looking.next_of("sight"))["changed"] is None:
            pass
        assert [part["name"] for part in sight["changed"]["models"]] == ["m", wild]
        assert not any(b"\x1b" in line for line in looking.raw)


async def test_news_come_once(stage: Stage) -> None:
    async with viewer(stage) as looking:
        await looking.next_of("sight")
        stage.rehearsal.news.append((7, Entry(at_s=1.0, what="activate", model="m", reason="because")))
        seen = [one for _ in range(6) for one in (await looking.next_of("sight"))["news"]]
    assert [(number, entry["reason"]) for number, entry in seen] == [(7, "because")]


async def test_who_comes_later_is_told_the_past(stage: Stage) -> None:
    stage.rehearsal.news.append((7, Entry(at_s=1.0, what="activate", model="m", reason="because")))
    async with viewer(stage) as looking:
        await looking.next_of("sight")
    async with stage.client.get(stage.url + "/sight/past") as response:
        assert response.headers["Content-Encoding"] in ("gzip", "deflate", "br")
        past = await response.json()
    assert [part["name"] for part in past["cast"]["models"]] == ["m"]
    assert past["moments"] and past["news"][0][0] == 7


async def test_a_viewer_stays_while_control_is_away(stage: Stage) -> None:
    async with viewer(stage) as looking:
        await looking.next_of("sight")
        await stage.rehearsal.stop()
        assert "control" in (await looking.next_of("away"))["why"]
        await stage.rehearsal.start()
        await looking.next_of("sight")


async def test_who_falls_behind_is_let_go_and_does_not_hold_up_the_others() -> None:
    class Relay:
        async def sight(self, *, cast: int, after: int) -> Sight:
            if cast < 100:
                return Sight(at_s=0.0, policy="static", local="fcfs", cast=cast + 1)
            raise RequestError("service_unavailable", "no more")

    watching = Dashboard(Relay())  # type: ignore[arg-type]
    with contextlib.ExitStack() as leaving:
        slow, quick = watching._come(leaving, KEYS[0]), watching._come(leaving, KEYS[1])
        async with asyncio.timeout(5):
            events = [await quick.get() for _ in range(60)]
        assert None not in events
        assert slow not in watching.viewers and quick in watching.viewers
        assert [slow.get_nowait() for _ in range(slow.qsize())][-1] is None
    assert not watching.viewers and watching._watching is None

"""The dashboard of a whole server: what happens is seen as it happens, and an operator's hand reaches the models."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.browser.conftest import PATIENCE_MS, Opens, Window
from tests.serve.house import House, house, placement, until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

api = pytest.importorskip("playwright.async_api", reason="not shown: the package playwright is not installed")
expect = api.expect
expect.set_options(timeout=PATIENCE_MS)
COSTS = {"load_s": 0.2, "step_s": 0.01}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    make(MODELS["llama"], folder / "llama", seed=0)
    return placement(folder, folder / "llama", {"anna": COSTS, "bert": COSTS}, gpus=2)


@pytest.fixture(scope="module")
def served(file: Path) -> Iterator[House]:
    with house(file) as served:
        yield served


def url(served: House) -> str:
    return "http://{}:{}".format(*served.address)


def button(window: Window, name: str) -> Any:
    return window.page.get_by_role("button", name=name, exact=True)


async def test_it_loads_and_draws_every_gpu(served: House, opens: Opens) -> None:
    window = await opens(url(served))
    await window.state("anna", "serving")
    await expect(window.page.locator("figure")).to_have_count(2)
    drawn = """canvas => {
      const {data} = canvas.getContext("2d").getImageData(canvas.width - 2, 0, 1, canvas.height);
      return new Set(Array.from({length: canvas.height}, (_, y) => data.slice(4 * y, 4 * y + 4).join())).size;
    }"""
    for canvas in await window.page.locator("canvas").all():
        assert await canvas.evaluate(drawn) >= 2  # weights, and a pool
    await expect(window.page.locator("#totals")).to_contain_text("2 of 2")
    assert window.faults == []


async def test_an_unload_and_a_load_are_seen_by_everybody_with_their_reasons(served: House, opens: Opens) -> None:
    operator, other = await opens(url(served)), await opens(url(served))
    await button(operator, "Unload bert").click()
    await other.state("bert", "down")
    await button(operator, "Load bert").click()
    await other.state("bert", "serving")
    feed = other.page.locator("#actions li")
    await expect(feed.first).to_contain_text("ready")
    unloaded = feed.filter(has=other.page.locator(".what[data-is=deactivate]")).first
    await expect(unloaded).to_contain_text(re.compile("bert.*operator", re.DOTALL))
    assert operator.faults == other.faults == []


async def test_a_pin_is_kept(served: House, opens: Opens) -> None:
    window = await opens(url(served))
    pin = button(window, "Keep anna from leaving")
    await pin.click()
    await expect(pin).to_have_attribute("aria-pressed", "true")
    await pin.click()
    await expect(pin).to_have_attribute("aria-pressed", "false")


async def test_another_policy_is_seen_by_everybody(served: House, opens: Opens) -> None:
    operator, other = await opens(url(served)), await opens(url(served))
    await operator.page.locator("#policy").select_option("space-sharing")
    await expect(other.page.locator("#policy")).to_have_value("space-sharing")
    await expect(other.page.locator("#actions .what[data-is=policy]").first).to_be_visible()
    await operator.page.locator("#local").select_option("fcfs")
    await expect(other.page.locator("#local")).to_have_value("fcfs")
    await operator.page.locator("#policy").select_option("static")
    await expect(other.page.locator("#policy")).to_have_value("static")
    assert operator.faults == other.faults == []


async def test_a_chat_streams_and_leads_to_its_story(served: House, opens: Opens) -> None:
    window = await opens(url(served))
    await button(window, "Chat").click()
    await window.page.get_by_label("Message").fill("hello <b>there</b>")
    await window.page.keyboard.press("Enter")
    told = window.page.locator(".told")
    await expect(told).to_contain_text(re.compile(r"\S{5}"))
    await expect(button(window, "Stop")).to_be_visible()  # it is still on its way
    began = len(await told.inner_text())
    await expect(button(window, "Send")).to_be_visible()
    assert len(await told.inner_text()) > began
    await expect(window.page.locator(".asked")).to_have_text("hello <b>there</b>")
    await expect(window.page.locator(".turns small")).to_contain_text("to the first token")
    await _until_recorded(served)
    await button(window, "its story").click()
    await expect(window.page.locator(".timeline li").last).to_contain_text("tokens")
    await expect(window.page.locator(".facts")).to_contain_text("anna")
    assert window.faults == []


async def test_an_answer_on_its_way_can_be_stopped(served: House, opens: Opens) -> None:
    window = await opens(url(served))
    await button(window, "Chat").click()
    await window.page.get_by_label("Message").fill("hello")
    await button(window, "Send").click()
    await expect(window.page.locator(".told")).to_contain_text(re.compile(r"\S{3}"))
    await button(window, "Stop").click()
    await expect(window.page.locator(".turns small")).to_have_text("stopped")
    await expect(button(window, "Send")).to_be_visible()


async def test_requests_that_ended_are_listed_and_each_has_its_story(served: House, opens: Opens) -> None:
    assert served.complete("anna", 5)[0] == 200
    await _until_recorded(served)
    window = await opens(url(served))
    await window.page.get_by_role("tab", name="Requests").click()
    await window.page.locator(".request").first.click()
    drawer = window.page.locator("#drawer")
    await expect(drawer.locator(".timeline li").first).to_be_visible()
    await window.page.keyboard.press("Escape")
    await expect(drawer).to_be_hidden()
    await button(window, "anna").click()  # a model has its account, too
    await expect(drawer.locator(".facts")).to_contain_text("sent")
    assert window.faults == []


async def test_a_restarted_server_is_found_again(file: Path, opens: Opens) -> None:
    with house(file) as first:
        port = first.address[1]
        window = await opens(url(first))
        await window.state("anna", "serving")
        moments = await window.page.locator("canvas").count()
    await window.page.locator("#live[data-is=away]").wait_for()
    with house(file, "--port", str(port)) as second:
        await window.live()
        await window.state("anna", "serving")
        assert await window.page.locator("canvas").count() == moments
        before = second.of("chimera.control")
        os.kill(before, signal.SIGKILL)
        until(lambda: second.processes("chimera.control") not in ([], [before]), "the next control")
        unloaded = {"model": "bert"}
        until(lambda: second.ask("POST", "/models/unload", unloaded)[0] == 200 or None, "an unload by the next control")
        await window.state("bert", "down")  # as the next control tells it, whose numbers begin anew
        await expect(window.page.locator("#actions li").first).to_contain_text("bert")
    # What the browser itself says of a server that is away is no fault of the page's.
    assert [fault for fault in window.faults if "Failed to load resource" not in fault] == []


async def _until_recorded(served: House) -> None:
    until(lambda: served.ask("GET", "/requests?most=1")[1], "a request in the records")

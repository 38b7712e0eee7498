"""A headless Chromium, and pages that remember what went wrong in them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

DEBIANS = Path("/usr/bin/chromium")
PATIENCE_MS = 20_000
Opens = Callable[..., Awaitable["Window"]]


class Window:
    """One page of the dashboard."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.faults: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.faults.append(f"dialog: {dialog.message}"))

    async def open(self, url: str) -> Window:
        await self.page.goto(url)
        await self.live()
        await self.page.locator("#rows tr").first.wait_for(state="attached")
        return self

    async def live(self) -> None:
        await self.page.locator("#live[data-is=live]").wait_for()

    def row(self, model: str) -> Any:
        return self.page.locator("#rows tr", has=self.page.get_by_role("button", name=model, exact=True))

    async def state(self, model: str, word: str) -> None:
        """Until the table says so."""
        await self.row(model).locator(f".state[data-is={word}]").wait_for()

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text}")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Any]:
    api = pytest.importorskip("playwright.async_api", reason="not shown: the package playwright is not installed")
    async with api.async_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = next((path for path in (DEBIANS, own) if path.exists()), None)
        if found is None:
            pytest.skip("not shown: there is no Chromium here (Debian's package chromium, or `playwright install chromium`)")
        sandboxed = [] if os.geteuid() else ["--no-sandbox"]  # root's Chromium will not run in its sandbox
        browser = await playwright.chromium.launch(executable_path=str(found), args=sandboxed)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def opens(chromium: Any) -> AsyncIterator[Opens]:
    """Opens a page of the dashboard, in a browser of its own."""
    contexts = []

    async def open_window(url: str, **how: Any) -> Window:
        context = await chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **how})
        contexts.append(context)
        return await Window(await context.new_page()).open(url)

    yield open_window
    for context in contexts:
        await context.close()

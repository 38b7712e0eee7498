"""Makes the pictures of this folder from a running server: `python pic/make.py` (six minutes; needs Playwright and Chromium).

Starts ten models on four virtual GPUs, sends them a made-up replay in which models are busy by turns, and takes the pictures
when five minutes of it can be seen. The engines are simulated: where memory goes, who moves and why are decided as ever.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmark.processes import descendants, parent_of, private_mib, servers, words_of  # noqa: E402
from benchmark.served import entry, served  # noqa: E402

PIC = Path(__file__).parent
CHROMIUM = Path("/usr/bin/chromium")
COSTS = {"load_s": 0.6, "step_s": 0.02, "per_request_s": 0.003, "prefill_s_per_token": 0.0002, "max_running": 24}
NAMES = {
    "llama-3.1-8b": "llama",
    "qwen3-8b": "qwen3",
    "gemma-2-9b": "gemma2",
    "mistral-7b": "mistral",
    "qwen3-14b": "qwen3",
    "phi-4": "llama",
    "deepseek-v2-lite": "moe",
    "llama-3.2-3b": "llama",
    "qwen3-coder-30b": "qwen3",
    "granite-8b": "mistral",
}
WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=320.0, help="how long to replay before the pictures")
    seconds = parser.parse_args().seconds
    models = [
        entry(name, kind, {"gpu_ids": [place % 4], "on": place < 8}, slo={"ttft_ms": 1500, "tpot_ms": 120}, engine_args=COSTS)
        for place, (name, kind) in enumerate(NAMES.items())
    ]
    house = served({"gpus": "4x96MiB", "models": models}, "--engine", "simulated", "--policy", "flexible")
    with house as url, replay(url, seconds + 60):
        time.sleep(seconds)
        (PIC / "processes.svg").write_text(drawing(processes()))
        photograph(url)


@contextmanager
def replay(url: str, seconds: float) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "chimera", "bench", "serve", "--url", url, "--out", folder, "--name", "pic"]
        words += ["--rate", "6", "--seconds", str(seconds), "--shape", "on-off", "--arrivals", "gamma", "--cv", "2"]
        words += ["--prompt-tokens", "100-700", "--output-tokens", "60-200"]
        asking = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            asking.terminate()
            asking.wait()


def photograph(url: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = str(CHROMIUM) if CHROMIUM.exists() else None
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, viewport, scheme, scale in (
            ("dashboard-light", WIDE, "light", 1),
            ("dashboard-dark", WIDE, "dark", 1),
            ("phone-light", PHONE, "light", 2),
            ("phone-dark", PHONE, "dark", 2),
        ):
            with opened(browser, url, viewport=viewport, color_scheme=scheme, device_scale_factor=scale) as page:
                page.screenshot(path=PIC / f"{name}.png")
        with opened(browser, url, viewport=WIDE, color_scheme="light", device_scale_factor=2) as page:
            page.locator("#memory").screenshot(path=PIC / "pools.png")
        with opened(browser, url, viewport=WIDE, color_scheme="light") as page:
            page.get_by_role("tab", name="Requests").click()
            page.locator(".request").first.click()
            page.locator(".timeline li").first.wait_for()
            page.screenshot(path=PIC / "request.png")
        browser.close()


@contextmanager
def opened(browser: Any, url: str, **how: Any) -> Iterator[Any]:
    context = browser.new_context(**how)
    page = context.new_page()
    page.goto(url)
    page.locator("#live[data-is=live]").wait_for()
    page.locator("#rows .state[data-is=serving]").first.wait_for()
    yield page
    context.close()


# The processes.


def processes() -> dict[str, list[int]]:
    """By what they are: the memory of each that is its own, in MiB."""
    found: dict[str, list[int]] = {}
    supervisor, *others = descendants(servers()[0])
    for pid in (supervisor, *others):
        module = next((word for word in words_of(pid) if word.startswith("chimera.")), "chimera serve")
        if module == "chimera.worker.parent" and parent_of(pid) != supervisor:
            module = "chimera.worker"  # a fork looks like its parent
        found.setdefault(module, []).append(private_mib(pid))
    return found


BOXES = {
    "chimera serve": (300, 20, "supervisor", "starts the others, restarts what dies"),
    "chimera.server": (20, 150, "front-end", "HTTP, tokenising, SSE, the dashboard"),
    "chimera.control": (300, 150, "control", "dispatcher and placement, records"),
    "chimera.agent": (580, 150, "agent", "one GpuScheduler per GPU, leases"),
    "chimera.worker.parent": (580, 280, "preloaded parent", "SGLang imported once; forks workers"),
    "chimera.worker": (300, 280, "workers", "one model each, or EMPTY"),
}
ARROWS = (
    ((250, 190), (300, 190), ""),
    ((530, 190), (580, 190), ""),
    ((695, 230), (695, 280), ""),
    ((600, 230), (500, 280), ""),
    ((300, 310), (135, 230), "tokens, straight"),
    ((415, 100), (415, 150), ""),
    ((300, 85), (175, 150), ""),
    ((530, 85), (655, 150), ""),
)
STYLE = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1e1d1a } .soft { fill: #5f5c55; font-size: 11px }
.name { font-weight: 600; font-size: 14px } rect { fill: #fffefb; stroke: #c9c5ba } path { stroke: #1f6b64; fill: none }
marker path { fill: #1f6b64; stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #e8e6e0 } .soft { fill: #a19e95 } rect { fill: #1b1b19; stroke: #45423d }
path { stroke: #7dbfb5 } marker path { fill: #7dbfb5 } }
"""


def drawing(found: dict[str, list[int]]) -> str:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 830 380" role="img" aria-label="The processes of a server">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for (x0, y0), (x1, y1), word in ARROWS:
        parts.append(f'<path d="M{x0} {y0}L{x1} {y1}" marker-end="url(#to)"/>')
        if word:
            parts.append(f'<text class="soft" x="{(x0 + x1) / 2 + 6}" y="{(y0 + y1) / 2 - 6}">{word}</text>')
    for module, (x, y, name, what) in BOXES.items():
        mib = found.get(module, [])
        many = f"{len(mib)} × " if len(mib) > 1 else ""
        own = f"{sum(mib) // max(1, len(mib))} MiB of its own" if len(mib) == 1 else f"{sum(mib)} MiB of their own"
        parts.append(f'<rect x="{x}" y="{y}" width="230" height="80" rx="5"/>')
        parts.append(f'<text class="name" x="{x + 14}" y="{y + 26}">{escape(many + name)}</text>')
        parts.append(f'<text class="soft" x="{x + 14}" y="{y + 46}">{escape(what)}</text>')
        parts.append(f'<text class="soft" x="{x + 14}" y="{y + 65}">{escape(own)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()

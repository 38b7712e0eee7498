"""The page of figures is what its results say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark import published

RESULT = {
    "title": "a thing",
    "command": "python benchmark/thing.py --seed 1",
    "machine": "M",
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
    "figures": [
        {"name": "fast", "value": 1.25, "unit": "ms", "goal": "≤ 2", "ok": True, "spread": [1, 1.5]},
        {"name": "small", "value": 30, "unit": "MiB", "goal": "≤ 20", "ok": False, "spread": None},
        {"name": "colour", "value": 7, "unit": "", "goal": None, "ok": None, "spread": None},
    ],
}


def test_a_goal_that_was_missed_is_told_like_one_that_was_met(tmp_path: Path) -> None:
    (tmp_path / "thing.json").write_text(json.dumps(RESULT))
    told = published.page(tmp_path)
    assert "`python benchmark/thing.py --seed 1` · [thing.json](results/thing.json) · M · 2026-01-02 · commit abc" in told
    assert "| fast | 1.25 ms | 1–1.5 | ≤ 2 | yes |" in told
    assert "| small | 30 MiB |  | ≤ 20 | **no** |" in told
    assert "colour" not in told


def test_the_page_is_the_one_that_the_results_make() -> None:
    assert (published.HERE / "README.md").read_text() == published.page(), "run: python benchmark/published.py"

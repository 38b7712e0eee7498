"""The page of figures is what its results say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


RESULTS = sorted((published.HERE / "results").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_figure_names_its_script_which_is_here_and_takes_these_options(path: Path) -> None:
    words = shlex.split(json.loads(path.read_text())["command"])
    script, options = (words[1:3], words[3:]) if words[1] == "-m" else (words[1:2], words[2:])
    root = published.HERE.parent
    told = subprocess.run([sys.executable, *script, "--help"], cwd=root, capture_output=True, text=True, timeout=120.0)
    assert told.returncode == 0, told.stderr
    for option in options:
        assert not option.startswith("--") or re.search(rf"{option}\b", told.stdout), f"{script} has no {option}"

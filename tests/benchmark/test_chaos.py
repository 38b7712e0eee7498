"""Half a minute of chaos on simulated engines: every process of a server is killed, and its clients hardly notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmark" / "chaos.py"


@pytest.mark.slow
def test_nothing_is_lost_wrong_or_left_while_every_process_is_killed(tmp_path: Path) -> None:
    rows = [f"{number / 5},model_{number % 9:02},{4 + number % 60},{1 + number % 39}" for number in range(150)]
    (tmp_path / "trace.csv").write_text("\n".join(["timestamp,model,prompt_tokens,output_tokens", *rows]) + "\n")
    words = [sys.executable, str(SCRIPT), "--engine", "simulated", "--models", "9", "--minutes", "0.5", "--rate", "1"]
    words += ["--trace", str(tmp_path / "trace.csv"), "--json", str(tmp_path / "told.json"), "--logs", str(tmp_path / "logs")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = {figure["name"]: figure["value"] for figure in json.loads((tmp_path / "told.json").read_text())["figures"]}
    assert told["requests"] == 150
    assert told["workers killed"] >= 4
    assert told["agents killed"] == told["controls killed"] == told["front-ends killed"] == 1
    assert told["whole and right"] > 0.9

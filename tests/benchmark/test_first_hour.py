"""The first hour's clone is what is committed, and its last figure is an answer's."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from benchmark import first_hour
from tests.serve.house import house

MODELS = "model_configs/cpu_1_gpu_3_model.json"


def test_a_clone_is_what_is_committed_and_its_first_command_is_there(tmp_path: Path) -> None:
    clone = first_hour.cloned(tmp_path)
    assert not (clone / ".venv").exists()
    planned = ["make", "--dry-run", "serve", "ARGS=--port 0"]
    told = subprocess.run(planned, cwd=clone, env=first_hour.surroundings(), capture_output=True, text=True, check=True)
    assert f"chimera serve {MODELS} --port 0" in told.stdout
    assert "dev.txt" not in told.stdout, "what only checks the package is not a newcomer's to wait for"


@pytest.mark.slow
def test_the_answer_is_timed_by_its_first_piece() -> None:
    with house(first_hour.ROOT / MODELS) as served:
        began_s = time.monotonic()
        assert began_s < first_hour.answered_s(*served.address) <= time.monotonic()

"""The cases of `warm_cases.py`, in a process of their own: SGLang must be first to import what it shares with others."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_models_come_from_shared_images_right_or_not_at_all() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:cacheprovider", "tests/engine/warm_cases.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert " passed" in ended.stdout and " skipped" not in ended.stdout

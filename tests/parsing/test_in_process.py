"""Cases with SGLang's parsers, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_cases_with_sglangs_parsers() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:cacheprovider", "tests/parsing/sglang_cases.py"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert " passed" in ended.stdout or "[100%]" in ended.stdout

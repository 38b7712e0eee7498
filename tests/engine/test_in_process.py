"""Cases that plant faults inside SGLang, each file in a process of its own.

Imported once, SGLang leaves no process as it was, and it must be first to import what it shares with others: what another
test has imported would decide whether these pass.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["allocator_cases.py", "warm_cases.py"])
def test_cases_inside_sglang(cases: str) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:cacheprovider", f"tests/engine/{cases}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert " passed" in ended.stdout and " skipped" not in ended.stdout

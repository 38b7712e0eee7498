"""What a reader of a figure must know of where and when it was measured."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import chimera
from chimera.config.machine import read_machine


def circumstances() -> dict[str, Any]:
    machine = read_machine()
    return {
        "chimera": chimera.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.system} {machine.kernel}",
        "gpus_of_machine": [gpu.name for gpu in machine.nvml.gpus],
        "packages": machine.packages,
    }


def _commit() -> str | None:
    """Of the checkout that this runs from; an installed package has none."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        told = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip() or None

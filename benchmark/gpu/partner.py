"""A second process that a question talks to: one line of JSON each way, over pipes.

What it prints besides goes to a log, which its owner may read. It ends with its owner: a closed pipe is its last order.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO


class PartnerLost(Exception):
    """It ended, or did not answer in time."""


class Partner:
    """The owner's side."""

    def __init__(self, module: str, *arguments: str, log: Path) -> None:
        self.log = log
        with log.open("w") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
            )

    def told(self, within_s: float) -> dict[str, Any]:
        """The next line that it says."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], within_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            end = f"ended with {self._process.wait(10)}" if ready else f"said nothing within {within_s:.0f} s"
            raise PartnerLost("; ".join([end, *self.last_lines(3)]))
        told: dict[str, Any] = json.loads(line)
        return told

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def ask(self, within_s: float = 60, **order: Any) -> dict[str, Any]:
        self.tell(**order)
        return self.told(within_s)

    def last_lines(self, count: int) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-count:]

    def close(self) -> None:
        """Lets it end by itself, for a moment; then ends it and what it started."""
        assert self._process.stdin is not None
        family = [self._process.pid, *_descendants(self._process.pid)]
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def orders() -> Iterator[tuple[dict[str, Any], TextIO]]:
    """The partner's side: each order, and where its answer goes. First comes an empty one, to be answered when ready."""
    # Whatever else prints, in this process or one that it starts, must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    yield {}, answers
    for line in sys.stdin:
        yield json.loads(line), answers


def reply(answers: TextIO, **told: Any) -> None:
    answers.write(json.dumps(told) + "\n")

"""One process that the supervisor starts, through all its lives; and the kernel's words for who belongs to whom."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Child:
    """One of the processes, through all its lives."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0
        self.short_lives = 0
        self.gone = asyncio.Event()

    def launch(self, log_dir: Path | None) -> None:
        """Start it, tied to this process; what it says goes to its log, where logs are kept."""
        starter = os.getpid()

        def tie() -> None:
            """In the child: go when the supervisor goes, however it goes; and at once if it is gone already."""
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != starter:
                os._exit(1)

        self.started_s = time.monotonic()
        self.gone.clear()
        with _log_of(self.name, log_dir) as log:
            # A group of its own: a terminal's Ctrl-C is for the supervisor to translate.
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stderr=log, process_group=0, preexec_fn=tie)

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and not self.gone.is_set():
            self.process.send_signal(number)


def become_subreaper() -> None:
    """Orphans of our children become ours."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def child_pids() -> list[int]:
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


@contextlib.contextmanager
def _log_of(name: str, log_dir: Path | None) -> Iterator[IO[bytes] | None]:
    if log_dir is None:
        yield None
        return
    with (log_dir / f"{name}.log").open("ab") as log:
        yield log

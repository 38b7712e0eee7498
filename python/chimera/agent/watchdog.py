"""Sees a worker that hangs without dying: one that has a model and has said nothing is asked, and one that does not answer is
lost.

A worker answers between two of its steps, also while it is idle or held back, so silence is a step that does not end. It
counts looks and not seconds: an agent that itself stood still has looked once, and finds the answers that came meanwhile.
Who is half-way to a model is not asked, for loading has no steps. Of a gang only the first is, which waits for the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from chimera.agent.gang import Worker
from chimera.msg.stream import Ping

LOOKS = 4
"""So many in the time that a worker may be silent: it is asked after the first in which nothing was heard of it."""
SILENT_S = 300.0


class Watchdog:
    """`kill(worker, reason)` ends one, and its exit is a loss like any other."""

    def __init__(self, workers: Iterable[Worker], kill: Callable[[Worker, str], None], silent_s: float) -> None:
        self._workers = workers
        self._kill = kill
        self._silent_s = silent_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._silent_s / LOOKS, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self.start()
        for worker in list(self._workers):
            if worker.gang is None or not worker.gang.is_up or worker is not worker.gang.first:
                continue
            worker.silent_looks += 1
            if worker.silent_looks == 1:
                worker.send(Ping())
            elif worker.silent_looks > LOOKS:
                self._kill(worker, f"it made no step for {self._silent_s:g} s")

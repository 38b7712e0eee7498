"""The one writer of the store: a thread that takes what has come every quarter of a second, so nobody waits for a disk.

When the disk is full, or the file cannot be written, rows wait in memory up to a bound and then the oldest are lost; serving
goes on. It is said once, in the log and by `fault`, and once more when it is over.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from chimera.records import store
from chimera.records.scribe import Row
from chimera.units import MIB

_EVERY_S = 0.25
"""A killed process loses what came since, and what one commit takes."""
_HOUSEKEEPING_S = 10.0
_MOST_QUEUED = 100_000
_AT_ONCE = 5_000
"""Rows in one commit: a reader of the interpreter's lock waits for no more."""

log = logging.getLogger(__name__)


class Keeper:
    """Raises ConfigError for a store that cannot be this one's."""

    def __init__(
        self,
        path: Path,
        *,
        limit_bytes: int = 256 * MIB,
        keep_s: float = 7 * 86_400.0,
        wall: Callable[[], float] = time.time,
        every_s: float = _EVERY_S,
    ) -> None:
        self.path = path
        self.fault = ""
        """Why nothing can be written now, in words."""
        self.kept = 0
        self.lost = 0
        self._limit_bytes = max(limit_bytes, store.LEAST_BYTES)
        self._keep_s = keep_s
        self._wall = wall
        self._every_s = every_s
        self._connection = store.open_to_write(path)
        self._queue: deque[Row] = deque()
        self._stop = threading.Event()
        self._tidied_s = 0.0
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def keep(self, row: Row) -> None:
        self._queue.append(row)

    def close(self) -> None:
        """Writes what has come, and lets go of the file."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()
        self._connection.close()

    def flush(self) -> None:
        """All that has come, in as few commits as that takes."""
        while self._queue and self._write([self._queue.popleft() for _ in range(min(len(self._queue), _AT_ONCE))]):
            pass
        for _ in range(len(self._queue) - _MOST_QUEUED):
            self._queue.popleft()
            self.lost += 1
        self._tidy()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.flush()

    def _write(self, rows: list[Row]) -> bool:
        try:
            store.write(self._connection, rows)
        except sqlite3.Error as fault:
            self._queue.extendleft(reversed(rows))
            self._says(str(fault))
            return False
        self.kept += len(rows)
        self._says("")
        return True

    def _tidy(self) -> None:
        now = time.monotonic()
        try:
            if now - self._tidied_s >= _HOUSEKEEPING_S or store.is_large(self._connection, self._limit_bytes):
                store.keep_within(self._connection, self._limit_bytes, self._wall() - self._keep_s)
                self._tidied_s = now
        except sqlite3.Error as fault:
            self._says(str(fault))

    def _says(self, fault: str) -> None:
        if fault and not self.fault:
            log.error("records are not kept: %s: %s; serving goes on", self.path, fault)
        if self.fault and not fault:
            log.warning("records are kept again in %s; %d were lost", self.path, self.lost)
        self.fault = fault

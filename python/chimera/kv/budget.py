"""How many bytes the pools under one lease may hold together. Knows numbers only; safe to share between threads."""

from __future__ import annotations

import threading


class Budget:
    """A lease's level, and what is held against it: every created byte, whether mapped or waiting in a reserve.

    The limit may be set below what is held: nothing more is granted then, and `excess_bytes` says what is to be given back.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held_bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def excess_bytes(self) -> int:
        return max(0, self._held_bytes - self.limit_bytes)

    def take(self, unit_bytes: int, count: int) -> int:
        """How many of `count` units fit; they are held from now on."""
        with self._lock:
            granted = max(0, min(count, (self.limit_bytes - self._held_bytes) // unit_bytes))
            self._held_bytes += granted * unit_bytes
            return granted

    def give(self, nbytes: int) -> None:
        with self._lock:
            self._held_bytes -= nbytes

"""Watches over a process of this machine until it is gone, through its pidfd: the kernel tells, nobody polls.

A pidfd names one process for good, so a signal can never reach a stranger that was given the same number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable


class Vigil:
    """Calls `on_exit` once, from the loop, when the process has exited. Raises ProcessLookupError if it is gone already."""

    def __init__(self, pid: int, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self._on_exit = on_exit
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._exited)

    @property
    def over(self) -> bool:
        return self._pidfd < 0

    def signal(self, number: signal.Signals) -> None:
        """No error when the process is gone: that is what `on_exit` says."""
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Look away; `on_exit` will not be called."""
        if not self.over:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _exited(self) -> None:
        self.close()
        self._on_exit()

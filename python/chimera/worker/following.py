"""A worker's post while it serves under another: the first of its gang has the requests, and speaks for all of them.

It has no orders to give and hears no tokens; it only hears when to leave.
"""

from __future__ import annotations

from collections.abc import Sequence

from chimera.core.replica import Epoch
from chimera.engine.api import Leave, Order
from chimera.msg import actions, stream
from chimera.msg.stream import TokenDelta
from chimera.worker.ties import Ties


class Following:
    """A `Post`."""

    def __init__(self, epoch: Epoch, ties: Ties) -> None:
        self.stop_reason = "its gang leaves"
        self.told_to_stop = False
        """The whole process is to end with this life."""
        self._epoch = epoch
        self._ties = ties

    def collect(self, wait_s: float | None) -> Sequence[Order]:
        for message in self._ties.receive(wait_s):
            match message:
                case actions.Deactivate(epoch=self._epoch):
                    raise Leave
                case stream.Stop():
                    self.told_to_stop = True
                    raise Leave
        return ()

    def deliver(self, deltas: list[TokenDelta]) -> None:
        raise AssertionError("a gang's answers are its first worker's to give")

    def fail(self, request_id: str, code: str, message: str) -> None:
        raise AssertionError("a gang's requests are its first worker's")

    def flushed(self) -> None:
        raise AssertionError("a gang is told by its first worker")

    def give_back(self, request_id: str, reason: str) -> None:
        raise AssertionError("a gang's requests are its first worker's")

"""A wanted replica, and how far it has come. Owns the arithmetic of one place; decides nothing about other places.

ABSENT       no agent with its GPUs is here; waits for one up to `due_s`, and holds nobody's request after that
LOADING      an agent was told to bring it up
SERVING      it takes requests
LEAVING      it is no longer wanted and drains
QUARANTINED  it failed too often in a row; tried again at `due_s`
FAILED       trying again cannot help
"""

from __future__ import annotations

import enum

import msgspec

from chimera.core.placement import Seat
from chimera.core.record import Alternative
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.core.snapshot import ReplicaView

QUARANTINE_AFTER = 3
"""Failed lives in a row before a replica is left alone for a while."""
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
PROVEN_AFTER_S = 10.0
"""A life that served this long, or finished one request, was no failure."""


class PlaceState(enum.StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    SERVING = "serving"
    LEAVING = "leaving"
    QUARANTINED = "quarantined"
    FAILED = "failed"


_SHOWN_AS = {
    PlaceState.LOADING: ReplicaState.LOADING,
    PlaceState.SERVING: ReplicaState.SERVING,
    PlaceState.LEAVING: ReplicaState.DRAINING,
    PlaceState.ABSENT: ReplicaState.STOPPED,
    PlaceState.QUARANTINED: ReplicaState.STOPPED,
    PlaceState.FAILED: ReplicaState.STOPPED,
}
_UNWELL = (PlaceState.FAILED, PlaceState.ABSENT)
_COMING = (PlaceState.SERVING, PlaceState.LOADING, PlaceState.LEAVING)


class Routed(msgspec.Struct, frozen=True, kw_only=True):
    """A request handed to an agent. It may outlive the life of the replica that it was routed to."""

    request: Request
    epoch: Epoch


class Place(msgspec.Struct, kw_only=True):
    seat: Seat
    state: PlaceState = PlaceState.ABSENT
    since_s: float
    """When it came into this state."""
    agent: str | None = None
    epoch: Epoch | None = None
    """The life it is in, once its agent has named it."""
    ended: Epoch | None = None
    """The newest life known to be over; nothing up to it is believed any more."""
    credits: int = 0
    kv_tokens: int = 0
    most_kv_bytes: int | None = None
    """What it was brought up for, and cannot exceed in this life; `None`: all that is free."""
    load_s: float | None = None
    failures: int = 0
    """Lives in a row that failed."""
    proven: bool = False
    due_s: float | None = None
    """When something has to be done about it, whatever happens."""
    why: str = ""
    """What went wrong last, in words."""
    purpose: str = ""
    """Why it is wanted, in the words of the policy."""
    weighed: tuple[Alternative, ...] = ()
    """What else the policy could have done."""
    routed: dict[str, Routed] = {}

    @property
    def replica(self) -> ReplicaId:
        return self.seat.replica

    @property
    def promising(self) -> bool:
        """Whether a request held for it will be served, or told otherwise at a known time."""
        return self.state in _COMING or (self.state is PlaceState.ABSENT and self.due_s is not None)

    def retry_after_s(self, now: float) -> float:
        """When a quarantined replica may serve again: the rest of its quarantine, and a load."""
        rest_s = 0.0 if self.due_s is None else max(0.0, self.due_s - now)
        return rest_s + (self.load_s or FIRST_BACKOFF_S)

    def view(self, now: float) -> ReplicaView:
        """For readers of the snapshot."""
        seat, state, sent = self.seat, self.state, len(self.routed)
        running = min(sent, self.credits)
        return ReplicaView(
            replica=seat.replica,
            epoch=self.epoch,
            state=_SHOWN_AS[state],
            gpu_ids=seat.gpu_ids,
            running=running,
            queued=sent - running,
            kv_tokens=self.kv_tokens,
            kv_limit_bytes=seat.kv_limit_bytes,
            since_s=self.since_s,
            failures=self.failures,
            quarantine_s=max(0.0, (self.due_s or now) - now) if state is PlaceState.QUARANTINED else None,
            why=self.why if self.failures or state in _UNWELL else "",
        )

    def enter(self, state: PlaceState, now: float, *, due_s: float | None = None) -> None:
        self.state, self.since_s, self.due_s = state, now, due_s
        if state is not PlaceState.LEAVING:
            self.epoch, self.credits, self.proven = None, 0, False

    def believes(self, epoch: Epoch) -> bool:
        """Whether news of this life still matters."""
        if self.ended is not None and epoch <= self.ended:
            return False
        return self.epoch is None or epoch >= self.epoch

    def serve(self, epoch: Epoch, *, credits: int, kv_tokens: int, load_s: float, now: float) -> None:
        self.enter(PlaceState.SERVING, now)
        self.epoch, self.credits, self.kv_tokens, self.load_s = epoch, credits, kv_tokens, load_s

    def prove(self) -> None:
        """This life has served somebody: earlier failures no longer count."""
        self.proven, self.failures = True, 0

    def end_life(self, epoch: Epoch, why: str, now: float) -> None:
        """Counts a failure, unless the life was a good one."""
        good = self.proven or (self.state is PlaceState.SERVING and now - self.since_s >= PROVEN_AFTER_S)
        self.ended, self.why = epoch, why
        self.failures = 0 if good else self.failures + 1

    @property
    def backoff_s(self) -> float:
        doublings = min(max(0, self.failures - QUARANTINE_AFTER), 16)
        return min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0**doublings)

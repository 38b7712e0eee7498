"""What a scheduler wants done. Every action says why, in words for people."""

from __future__ import annotations

import enum

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.record import Alternative
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request


class Action(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The root of all actions."""

    reason: str


class RejectCode(enum.StrEnum):
    """Why a request was turned away, in one word for programs; `reason` says it to people."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    SLO_UNATTAINABLE = "slo_unattainable"
    """It cannot be in time any more, and its class would rather hear so at once."""
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_NOT_LOADED = "model_not_loaded"
    """Registered, and the placement gives it no GPU."""
    MODEL_UNAVAILABLE = "model_unavailable"
    """Wanted, and it cannot be brought up."""
    WORKER_LOST = "worker_lost"
    AGENT_LOST = "agent_lost"


class FirstLease(msgspec.Struct, frozen=True, kw_only=True):
    """What an elastic replica begins with on one GPU; `Grant` and `Recall` speak of it from then on."""

    page_bytes: int
    revision: int
    level: int
    ceiling: int
    """The most pages it can ever be granted: the addresses it sets aside."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the workers that serve one replica together this one is. The first has the agent's orders and the requests."""

    rank: int
    meeting: str
    """How paths begin of files in which the ranks find each other; nobody else has been there."""


class Activate(Action, frozen=True, kw_only=True):
    """Bring the replica up. `epoch` is empty on the way from control and minted by the agent that obeys."""

    model: ModelSpec
    seat: Seat
    epoch: Epoch | None = None
    leases: tuple[FirstLease, ...] = ()
    """By rank. Set by the agent that obeys, where KV memory is elastic."""
    place: Place | None = None
    """Set by the agent that obeys, for each worker of a replica over several GPUs."""
    alternatives: tuple[Alternative, ...] = ()
    """What else was weighed when this was decided; told to control's readers, not to agents."""
    trace: str = ""
    """The W3C context of the activation's span, where spans are told."""


class Deactivate(Action, frozen=True, kw_only=True):
    """Take the replica down: drain for up to `drain_s`, then send what is left back to its front-ends."""

    replica: ReplicaId
    epoch: Epoch
    drain_s: float = 0.0
    alternatives: tuple[Alternative, ...] = ()


class Resize(Action, frozen=True, kw_only=True):
    """The replica's KV memory has an upper bound, which may be another than the one it came up with, never more."""

    replica: ReplicaId
    epoch: Epoch
    kv_limit_bytes: int | None
    """Per GPU; `None`: what is free."""


class Pause(Action, frozen=True, kw_only=True):
    """Take no step; memory stays."""

    replica: ReplicaId
    epoch: Epoch
    for_s: float | None = None
    """The replica goes on by itself after so long, whether `Resume` comes or not; `None`: not before."""


class Resume(Action, frozen=True, kw_only=True):
    replica: ReplicaId
    epoch: Epoch


class Grant(Action, frozen=True, kw_only=True):
    """The replica may hold up to `level` pages."""

    replica: ReplicaId
    epoch: Epoch
    gpu_id: int
    revision: int
    level: int


class Recall(Action, frozen=True, kw_only=True):
    """The replica must come down to `level` pages by `deadline_s`, and say so with `PagesReturned`."""

    replica: ReplicaId
    epoch: Epoch
    gpu_id: int
    revision: int
    level: int
    deadline_s: float


class Route(Action, frozen=True, kw_only=True):
    """Hand the request to the agent that owns `replica`."""

    request: Request
    replica: ReplicaId
    agent: str


class Admit(Action, frozen=True, kw_only=True):
    """Give the request to the replica's engine now."""

    request_id: str
    replica: ReplicaId
    epoch: Epoch


class Abort(Action, frozen=True, kw_only=True):
    """Stop the request wherever it is; its client has left."""

    request_id: str
    replica: ReplicaId
    epoch: Epoch | None = None


class Preempt(Action, frozen=True, kw_only=True):
    """The engine gives the request back to its front-end, so that another can be in time; it keeps its tokens."""

    request_id: str
    replica: ReplicaId
    epoch: Epoch


class QueueBy(Action, frozen=True, kw_only=True):
    """From control to an agent: in which order requests go from now on. Those that wait, wait on."""

    agent: str
    local: str


class Requeue(Action, frozen=True, kw_only=True):
    """Ask the request's front-end to bring it again with the tokens it has."""

    request_id: str
    front: str
    fault: bool = False
    """Something broke; so many times are borne. What was planned, a move or a drain, does not count."""
    lost: bool = False
    """It was in an engine that was lost, and may be what ended it."""


class Reject(Action, frozen=True, kw_only=True):
    """The request ends here in one clear error. `retry_after_s` is empty when trying again is no use."""

    request_id: str
    front: str
    code: str
    retry_after_s: float | None = None
    queue_position: int | None = None
    """Where it would have stood, had there been room."""


class WakeAt(Action, frozen=True, kw_only=True):
    """Send `Woke` at `at_s`; a later `WakeAt` replaces an earlier one."""

    at_s: float

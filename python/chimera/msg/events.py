"""What happened, told to a scheduler. Every event about a replica carries the epoch it speaks of."""

from __future__ import annotations

import enum

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.lease import LeaseClass
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request


class Outcome(enum.StrEnum):
    """How a request ended. Every request ends exactly once, in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REQUEUED = "requeued"
    """Left this worker unfinished; its front-end brings it back with the tokens emitted so far."""


ANSWERED = (Outcome.STOP, Outcome.LENGTH)


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The root of all events."""


class ModelRegistered(Event, frozen=True, kw_only=True):
    model: ModelSpec


class ModelRemoved(Event, frozen=True, kw_only=True):
    model: str


class PlacementChanged(Event, frozen=True, kw_only=True):
    """The operator wants something else than before: the difference, and nothing of what stays."""

    models: tuple[ModelSpec, ...] = ()
    """New ones, and those whose entries say something else."""
    removed: tuple[str, ...] = ()
    seats: tuple[Seat, ...] = ()
    """Wanted from now on; each instead of the earlier seat of its replica, if it had one."""
    unseated: tuple[ReplicaId, ...] = ()
    reason: str


class RequestArrived(Event, frozen=True, kw_only=True):
    request: Request


class RequestCancelled(Event, frozen=True, kw_only=True):
    """The client left."""

    request_id: str


class RequestFinished(Event, frozen=True, kw_only=True):
    request_id: str
    replica: ReplicaId
    epoch: Epoch
    outcome: Outcome
    output_tokens: int
    cached_tokens: int = 0
    admitted_s: float | None = None
    """When its engine was given it, as the agent says that passes this on."""


class AgentJoined(Event, frozen=True, kw_only=True):
    agent: str
    agent_start: int
    gpus: tuple[Gpu, ...]
    earlier: tuple[int, ...] = ()
    """Starts of its earlier lives, whose workers it goes on with."""
    requests: tuple[str, ...] = ()
    """What it has, waiting or running; whatever else it was given is lost."""
    standing: tuple[Seat, ...] = ()
    """Where its replicas are that serve."""
    elastic: bool = True
    """A limit on KV memory can change while a replica serves."""


class AgentLost(Event, frozen=True, kw_only=True):
    agent: str
    reason: str


class ReplicaReady(Event, frozen=True, kw_only=True):
    """The replica serves: it holds `kv_tokens` slots and takes up to `credits` requests at a time."""

    replica: ReplicaId
    epoch: Epoch
    credits: int
    kv_tokens: int
    context_length: int
    load_s: float


class ReplicaFound(Event, frozen=True, kw_only=True):
    """A worker has outlived its agent, and tells the next one what it is."""

    model: ModelSpec
    seat: Seat
    ready: ReplicaReady
    """As it was said to the agent before; its epoch is the life that goes on."""
    running: tuple[Request, ...] = ()
    leaving: bool = False

    @property
    def replica(self) -> ReplicaId:
        return self.seat.replica


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker keeps on one GPU of models that have left, so that they are there at once when they return."""

    models: tuple[str, ...] = ()
    pages: int = 0
    """Those that would be back at once if they were not kept."""


class ReplicaStopped(Event, frozen=True, kw_only=True):
    """The replica has left its worker, and its pages are back, but for what the worker keeps."""

    replica: ReplicaId
    epoch: Epoch
    reason: str
    kept: Kept | None = None
    """Empty: as before."""


class ActivationFailed(Event, frozen=True, kw_only=True):
    replica: ReplicaId
    epoch: Epoch
    reason: str
    permanent: bool = False
    """Trying again cannot help: the model itself cannot be served."""


class WorkerLost(Event, frozen=True, kw_only=True):
    """A worker's process has exited; `replica` is what it was serving or loading."""

    worker: str
    reason: str
    replica: ReplicaId | None = None
    epoch: Epoch | None = None


class PagesWanted(Event, frozen=True, kw_only=True):
    """The replica would use `level` pages if it had them."""

    replica: ReplicaId
    epoch: Epoch
    gpu_id: int
    revision: int
    level: int


class PagesReturned(Event, frozen=True, kw_only=True):
    """The replica holds no more than `level` pages, as `revision` asked. Only this, or a confirmed exit, frees pages.

    Every order is answered, a `Grant` too; a `Recall` may be answered several times on its way down.
    """

    replica: ReplicaId
    epoch: Epoch
    gpu_id: int
    revision: int
    level: int


class PagesHeld(Event, frozen=True, kw_only=True):
    """All that a worker has on one GPU, told first on every connection: a restarted ledger learns the truth from these.

    A worker that connects anew has closed the old connection before, with whatever orders were still unread on it.
    """

    worker: str
    gpu_id: int
    kept: dict[LeaseClass, int] = {}
    """Pages that stay with the worker, whichever replica it is: context, parked graphs."""
    replica: ReplicaId | None = None
    """Empty, with all below it, while the worker is EMPTY."""
    epoch: Epoch | None = None
    reserved: dict[LeaseClass, int] = {}
    """What the replica has beside its lease: weights, workspace."""
    revision: int = 0
    """The newest order that the replica has read."""
    level: int = 0
    """What that order allows."""
    held: int = 0
    """What the replica has; above the level while it is still on its way down."""


class PagesKept(Event, frozen=True, kw_only=True):
    """What a worker keeps has changed without a replica's end, or is told to an agent that is new."""

    worker: str
    gpu_id: int
    kept: Kept


class PolicyChosen(Event, frozen=True, kw_only=True):
    """Who decides from now on what runs where, and in which order requests go; the running system goes on meanwhile."""

    policy: str | None = None
    """`None`: as before."""
    local: str | None = None
    """An order by name; `by-policy`: the one that the policy is known with; `None`: as before."""


class LoadWanted(Event, frozen=True, kw_only=True):
    """An operator wants the replica up. What cannot be is answered with a `Reject` of the order."""

    order: str
    front: str
    """Whom to answer."""
    replica: ReplicaId
    gpu_ids: tuple[int, ...] = ()
    """Empty: where it stood last, or on the emptiest."""
    kv_limit_bytes: int | None = None


class ResizeWanted(Event, frozen=True, kw_only=True):
    """An operator gives the model's KV memory another upper bound."""

    order: str
    front: str
    model: str
    index: int | None = None
    """`None`: every replica."""
    kv_limit_bytes: int


class UnloadWanted(Event, frozen=True, kw_only=True):
    """An operator wants the model, or one of its replicas, down."""

    order: str
    front: str
    model: str
    index: int | None = None
    """`None`: every replica."""
    drain_s: float | None = None
    """How long its requests may go on before they come back; `None`: as the model's entry says."""


class StepsTimed(Event, frozen=True, kw_only=True):
    """What a replica's engine has done of late, and how long that took: what the cost table is refined from."""

    replica: ReplicaId
    epoch: Epoch
    decode_steps: int = 0
    """Steps without a prompt in them."""
    decode_s: float = 0.0
    decode_tokens: int = 0
    """Made in those steps."""
    context_tokens: int = 0
    """Read in those steps: the sum over steps and requests."""
    prompts: int = 0
    prompt_tokens: int = 0
    """Cached ones too: a cache that serves makes prompts cheaper."""
    prompt_s: float = 0.0
    """From one step's end to the end of the step that made their first tokens."""


class GpuLost(Event, frozen=True, kw_only=True):
    """The device answers no more, and with it whatever runs there. Only a new agent process brings it back."""

    gpu_id: int
    reason: str


class RoomChanged(Event, frozen=True, kw_only=True):
    """What the caches of all replicas on a GPU may hold together, where they share it."""

    gpu_id: int
    kv_bytes: int


class GpuSampled(Event, frozen=True, kw_only=True):
    """Memory held on the device by processes that are not ours."""

    gpu_id: int
    strangers_bytes: int


class Woke(Event, frozen=True, kw_only=True):
    """The time asked for by `WakeAt` has come."""

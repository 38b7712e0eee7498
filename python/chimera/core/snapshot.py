"""The state of the whole system at one moment, as its readers see it: CLI, dashboard, metrics, policies."""

from __future__ import annotations

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.ledger_view import GpuLedgerView
from chimera.core.model import ModelSpec
from chimera.core.replica import Epoch, ReplicaId, ReplicaState

POLICY_NAMES = ("flexible", "static", "time-sharing", "space-sharing", "simple-global", "kvpr", "kvpr-after")
"""Who may decide what runs where, as operators say it."""
LOCAL_NAMES = ("fcfs", "slack", "moore-hodgson", "goodput", "by-policy")
"""In which order requests go; the last stands for the one that the policy is known with."""


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    replica: ReplicaId
    epoch: Epoch | None
    state: ReplicaState
    gpu_ids: tuple[int, ...]
    running: int = 0
    queued: int = 0
    kv_tokens: int = 0
    """KV slots the replica may use now."""
    kv_used_tokens: int = 0
    kv_limit_bytes: int | None = None
    """The most that its KV memory may be on each GPU; `None`: what is free."""
    since_s: float = 0.0
    failures: int = 0
    """Lives in a row that failed."""
    quarantine_s: float | None = None
    """How long it is still left alone, having failed too often; `None` when it is not."""
    why: str = ""
    """What went wrong last, while it is not well."""


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What one model is asked for, as the dispatcher has seen it."""

    requests_per_s: float = 0.0
    """Over the last ten seconds, the newest counting most."""
    requests_per_s_minute: float = 0.0
    """Over the last minute."""
    prompt_tokens: float = 0.0
    """Mean of late, per request."""
    output_tokens: float = 0.0
    idle_s: float = 0.0
    """Since the last request came or ended."""
    waiting: int = 0
    """Held by the dispatcher: no replica serves them yet."""
    waited_s: float = 0.0
    """Since the oldest of those came in."""
    open: int = 0
    """With a replica, waiting there or running."""
    total: int = 0
    """Requests ever seen."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    now_s: float
    policy: str
    local: str = "fcfs"
    """In which order requests go."""
    gpus: tuple[Gpu, ...] = ()
    models: tuple[ModelSpec, ...] = ()
    replicas: tuple[ReplicaView, ...] = ()
    ledgers: tuple[GpuLedgerView, ...] = ()
    """Who holds how much of each GPU, as the agents last told it."""
    waiting: dict[str, int] = {}
    """Requests held by the dispatcher, by model, because no replica serves them yet."""
    demands: dict[str, Demand] = {}
    """By model; a model that was never asked for may be missing."""

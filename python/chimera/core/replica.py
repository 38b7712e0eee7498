"""One model at work: which copy of it, on which GPUs, in which life."""

from __future__ import annotations

import enum

import msgspec


class Epoch(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One life of one replica: minted by the agent that starts it, stale as soon as a later one exists."""

    agent_start: int
    """When the agent came up, in nanoseconds; a restarted agent's epochs are always later."""
    counter: int

    def __str__(self) -> str:
        return f"{self.agent_start % 10**9:x}.{self.counter}"


class ReplicaId(msgspec.Struct, frozen=True, array_like=True, order=True):
    """The name of a copy of a model. It outlives restarts; its epoch does not."""

    model: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.model}/{self.index}"


class ReplicaState(enum.StrEnum):
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class WorkerState(enum.StrEnum):
    """A worker has no model identity of its own: EMPTY → LOADING → SERVING → DRAINING → EMPTY."""

    EMPTY = "empty"
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"

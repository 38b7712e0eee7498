"""What an operator may order over HTTP, and what is told of it: the types of those bodies. Knows nobody who obeys."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from chimera.core.replica import ReplicaState

Index = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Gigabytes = Annotated[float, msgspec.Meta(gt=0, le=1_000_000)]


class LoadOrder(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    index: Index = 0
    """Which copy of it."""
    gpu_ids: tuple[Index, ...] = ()
    max_memory_pool_size: Gigabytes | None = None


class UnloadOrder(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    index: Index | None = None
    """Every copy, if it is left out."""
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] | None = None


class PinOrder(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    pin: bool = True


class EntryOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A model's entry, with the keys that it may have in a placement file. Its path lies where models may come from."""

    model_name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    model_path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class PolicyOrder(msgspec.Struct, frozen=True, kw_only=True):
    policy: str | None = None
    """Who decides what runs where; if it is left out, whoever does."""
    local: str | None = None
    """In which order requests go."""


class Activation(msgspec.Struct, frozen=True, kw_only=True):
    """Prism's words for a load."""

    model_name: str
    gpu_id: Index | list[Index] | None = None
    instance_idx: Index = 0
    memory_pool_size: Gigabytes | None = None


class Deactivation(msgspec.Struct, frozen=True, kw_only=True):
    """Prism's words for an unload. No request is dropped: those that wait or are preempted are served elsewhere or later."""

    model_name: str
    instance_idx: Index | None = None
    evict_waiting_requests: bool = False
    preempt: bool = False
    preempt_mode: Any = None
    gpu_id: Any = None


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    changes: tuple[str, ...]


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    changes: tuple[str, ...]
    """A line for each thing that was different; empty when nothing was."""


class Resizing(msgspec.Struct, frozen=True, kw_only=True):
    """Prism's words for another upper bound of a model's KV memory."""

    model_name: str
    memory_pool_size: Gigabytes
    """Per GPU."""
    instance_idx: Index | None = None
    """Every copy, if it is left out."""


class Resized(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    memory_pool_size: float
    replicas: list[int]
    """The copies that have this bound now. One that came up with a lower bound is loaded anew for it."""


class CachesFlushed(msgspec.Struct, frozen=True, kw_only=True):
    flushed: list[str]
    """The replicas, in whose caches nothing is left but what requests under way use."""


class PoolSize(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's KV memory, as `/get_memory_pool_size` tells it."""

    model_name: str
    instance_idx: int
    gpu_ids: tuple[int, ...]
    memory_pool_size: float
    """What it may use now, in gigabytes per GPU."""
    memory_in_use: float
    max_memory_pool_size: float | None
    """What it may ever use; nothing if that is all that is free."""


class ReplicaTold(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a replica is, and why; the rest only where it is news."""

    model: str
    index: int
    state: ReplicaState
    reason: str
    gpu_ids: tuple[int, ...] | None = None
    at_s: float | None = None
    load_s: float | None = None
    failed: bool | None = None


class Unloaded(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    state: ReplicaState
    stopped: list[int]
    """The copies that were up."""


class Pinned(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    pin: bool


class PolicyTold(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    policy: str
    local: str
    """In which order requests go."""
    policies: tuple[str, ...] = ()
    """All there are."""
    locals: tuple[str, ...] = ()


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    deleted: bool


class ModelNames(msgspec.Struct, frozen=True, kw_only=True):
    model_names: list[str]

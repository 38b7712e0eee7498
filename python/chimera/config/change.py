"""From one deployment to the next: the difference that a running server has to carry out, and its words for people."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from chimera.config.deployment import Deployment
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import ReplicaId


class Change(msgspec.Struct, frozen=True, kw_only=True):
    models: tuple[ModelSpec, ...] = ()
    """New ones, and those whose entries say something else."""
    removed: tuple[str, ...] = ()
    seats: tuple[Seat, ...] = ()
    """Wanted from now on; each instead of the earlier seat of its replica, if it had one."""
    unseated: tuple[ReplicaId, ...] = ()
    policy: str | None = None
    local: str | None = None
    words: tuple[str, ...] = ()
    """A line for each thing that is different."""

    def __bool__(self) -> bool:
        return bool(self.words)


def change(old: Deployment, new: Deployment) -> Change:
    before, after = ({model.name: model for model in one.models} for one in (old, new))
    moved = new.placement.diff(old.placement)
    put = (*moved.start, *moved.resize)
    replaced = {seat.replica for seat in put}
    return Change(
        models=tuple(model for name, model in after.items() if before.get(name) != model),
        removed=tuple(name for name in before if name not in after),
        seats=put,
        unseated=tuple(seat.replica for seat in moved.stop if seat.replica not in replaced),
        policy=new.policy if new.policy != old.policy else None,
        local=new.local if new.local != old.local else None,
        words=tuple(_words(old, new)),
    )


def _words(old: Deployment, new: Deployment) -> Iterator[str]:
    before, after = ({model.name: model for model in one.models} for one in (old, new))
    for name in before:
        if name not in after:
            yield f"{name} is removed, once its requests are done"
    for name, model in after.items():
        if name not in before:
            yield f"{name} is registered"
        elif model != before[name]:
            yield _what_changed(before[name], model)
    yield from _moves(old, new, set(after))
    for what in ("policy", "local"):
        if (wish := getattr(new, what)) is not None and wish != getattr(old, what):
            yield f"{what} is {wish}"
    for what in ("filed_gpus", "warm"):
        if getattr(new, what) != getattr(old, what):
            yield f"{what.removeprefix('filed_')} has changed, which takes a new start of the server"


def _what_changed(old: ModelSpec, new: ModelSpec) -> str:
    fields = [field for field in ModelSpec.__struct_fields__ if getattr(old, field) != getattr(new, field)]
    how = "" if new.runs_as(old) else ", so it is loaded anew"
    return f"{new.name}: {', '.join(fields)} changed{how}"


def _moves(old: Deployment, new: Deployment, known: set[str]) -> Iterator[str]:
    stood = {seat.replica: seat for seat in old.placement.seats}
    moved = new.placement.diff(old.placement)
    for seat in moved.start:
        earlier = stood.get(seat.replica)
        yield f"{seat.replica} is wanted on {_gpus(seat)}" + (f", no longer on {_gpus(earlier)}" if earlier else "")
    for seat in moved.stop:
        if seat.replica.model in known and seat.replica not in {start.replica for start in moved.start}:
            yield f"{seat.replica} is no longer wanted on {_gpus(seat)}"
    for seat in moved.resize:
        size = "what is free" if seat.kv_limit_bytes is None else f"{seat.kv_limit_bytes / 10**9:g} GB"
        yield f"{seat.replica} may hold {size} of KV memory"


def _gpus(seat: Seat) -> str:
    return ("GPU " if len(seat.gpu_ids) == 1 else "GPUs ") + ", ".join(map(str, seat.gpu_ids))

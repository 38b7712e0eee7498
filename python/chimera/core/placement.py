"""Which replica stands on which GPUs with how much KV memory: the wanted map, and its difference from today's."""

from __future__ import annotations

import msgspec

from chimera.core.replica import ReplicaId


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's place."""

    replica: ReplicaId
    gpu_ids: tuple[int, ...]
    """One GPU per tensor-parallel rank, in rank order."""
    kv_limit_bytes: int | None = None
    """KV memory per GPU: reserved when static, a ceiling when elastic. `None` takes what is free."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What has to happen for `current` to become `wanted`; starts of moved replicas come before their stops."""

    start: tuple[Seat, ...] = ()
    stop: tuple[Seat, ...] = ()
    resize: tuple[Seat, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.start or self.stop or self.resize)


class Placement(msgspec.Struct, frozen=True):
    seats: tuple[Seat, ...] = ()

    def diff(self, current: Placement) -> Difference:
        """From `current` to this placement. A replica on other GPUs is a start there and a stop here."""
        if self.seats == current.seats:
            return Difference()
        wanted = {seat.replica: seat for seat in self.seats}
        present = {seat.replica: seat for seat in current.seats}
        moved = {r for r in wanted.keys() & present.keys() if wanted[r].gpu_ids != present[r].gpu_ids}
        return Difference(
            start=tuple(s for r, s in wanted.items() if r not in present or r in moved),
            stop=tuple(s for r, s in present.items() if r not in wanted or r in moved),
            resize=tuple(
                s
                for r, s in wanted.items()
                if r in present and r not in moved and s.kv_limit_bytes != present[r].kv_limit_bytes
            ),
        )

    def on_gpu(self, gpu_id: int) -> tuple[Seat, ...]:
        return tuple(seat for seat in self.seats if gpu_id in seat.gpu_ids)

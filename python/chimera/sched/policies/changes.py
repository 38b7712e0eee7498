"""What could be done about a placement, and what each change would be worth: one more replica, and who makes room for it.

Only changes that can be begun now, since who makes room is idle. A move is one of them, and a withdrawal later. Knows the
outlook; does not know what a change must be worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.sched.policies.outlook import Outlook


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One more replica of a model."""

    model: ModelSpec
    gang: tuple[int, ...]
    evicted: tuple[Seat, ...]
    """Idle replicas that leave for it."""
    gain: float
    """Requests a second that keep their SLO, more than now."""


class Changes:
    def __init__(self, outlook: Outlook, settle_s: float) -> None:
        self._outlook = outlook
        self._board = outlook.board
        self._settle_s = settle_s

    def arrivals(self, model: ModelSpec, idle_s: float) -> list[Change]:
        """Where a model without a replica could stand."""
        return list(self._anywhere(model, self._board.gangs(model), idle_s))

    def reliefs(self, gpu_ids: Iterable[int], price: Callable[[ModelSpec, tuple[int, ...]], float]) -> Iterator[Change]:
        """What could help those who stand on these GPUs: another replica of one of them elsewhere.

        What costs more than it can gain at the most is not looked at, nor what cannot be better than the best that is worth
        its price.
        """
        best = 0.0
        for most, cost, model, gang in sorted(self._helpful(gpu_ids, price), key=lambda one: -one[0]):
            if most <= best:
                return
            for change in self._anywhere(model, (gang,), self._settle_s, unasked=True):
                if change.gain >= cost:
                    best = max(best, change.gain)
                yield change

    def _helpful(
        self, gpu_ids: Iterable[int], price: Callable[[ModelSpec, tuple[int, ...]], float]
    ) -> Iterator[tuple[float, float, ModelSpec, tuple[int, ...]]]:
        """The most that could be gained and what it costs to bring a model to a place."""
        board, outlook = self._board, self._outlook
        names = {seat.replica.model: None for gpu_id in gpu_ids for seat in board.on_gpu(gpu_id)}
        calm = {gpu_id for gpu_id in board.gpus if self._is_calm(gpu_id)}
        for name in names:
            if outlook.rates[name] and self._is_settled(name):
                model = board.models[name]
                here = {gpu_id for seat in board.seats_of(name) for gpu_id in seat.gpu_ids}
                relief = outlook.relief(name, here)
                for gang in board.gangs(model):
                    if calm.issuperset(gang) and here.isdisjoint(gang):
                        most = relief if board.fits(model, gang) else relief + outlook.lost_on(gang)
                        cost = price(model, gang)
                        if most >= cost:
                            yield most, cost, model, gang

    def _anywhere(
        self, model: ModelSpec, gangs: Iterable[tuple[int, ...]], idle_s: float, *, unasked: bool = False
    ) -> Iterator[Change]:
        for gang in gangs:
            evicted = self._room_for(model, gang, idle_s, unasked=unasked)
            if evicted is not None:
                gain = self._outlook.gain(((model, gang),), evicted)
                yield Change(model=model, gang=gang, evicted=evicted, gain=gain)

    def _is_settled(self, model: str) -> bool:
        """Nothing of it is on its way, and it has stood as it is for a while."""
        board = self._board
        return all(board.serves(seat) and board.since_s(seat.replica) >= self._settle_s for seat in board.seats_of(model))

    def _is_calm(self, gpu_id: int) -> bool:
        """Nothing is on its way there, and who is asked for there has been for a while: what the last change did is seen."""
        board = self._board
        for seat in board.on_gpu(gpu_id):
            if not board.serves(seat):
                return False
            if self._outlook.rates[seat.replica.model] and board.since_s(seat.replica) < self._settle_s:
                return False
        return True

    def _room_for(self, model: ModelSpec, gang: tuple[int, ...], idle_s: float, *, unasked: bool) -> tuple[Seat, ...] | None:
        """Who would have to leave for it: idle replicas, those first that are missed least for what they hold.

        `unasked`: only those that nobody asks for, or that are not the only one of their model.
        """
        board = self._board
        short = {gpu_id: board.needs_bytes(model) - board.free_bytes(gpu_id) for gpu_id in gang}
        if all(nbytes <= 0 for nbytes in short.values()):
            return ()
        present = {seat.replica: seat for gpu_id in gang for seat in board.on_gpu(gpu_id)}
        may = [seat for seat in present.values() if seat.replica.model != model.name and self._may_go(seat, idle_s, unasked)]
        leaving: list[Seat] = []
        for seat in sorted(may, key=self._missed):
            if any(short.get(gpu_id, 0) > 0 for gpu_id in seat.gpu_ids):
                leaving.append(seat)
                for gpu_id in short.keys() & set(seat.gpu_ids):
                    short[gpu_id] -= board.resident_bytes[seat.replica.model]
        return tuple(leaving) if all(nbytes <= 0 for nbytes in short.values()) else None

    def _may_go(self, seat: Seat, idle_s: float, unasked: bool) -> bool:
        board, model = self._board, seat.replica.model
        if not board.serves(seat) or not board.may_leave(seat) or board.since_s(seat.replica) < idle_s:
            return False
        if len(board.seats_of(model)) > 1:
            return True
        return board.demand(model).idle_s >= idle_s and not (unasked and self._outlook.rates[model])

    def _missed(self, seat: Seat) -> tuple[float, ...]:
        board = self._board
        model = board.models[seat.replica.model]
        alone = len(board.seats_of(model.name)) == 1
        missed = self._outlook.kept_of(seat) / max(1, model.weight_bytes) if alone else 0.0
        return (model.priority, missed, *board.leaving_order(seat))

"""Evens the cells out, slowly: which model should be at home in another cell, and where it would stand there.

Looks now and then, and finds one model at a time. One that is waited for and finds no room at home goes to the cell with the
most; else one of the busiest cell goes to the calmest, if that brings them nearer to each other. Only finds; the plan moves,
and the model is served where it was until it serves where it will be.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from chimera.core.model import ModelSpec
from chimera.sched.cells import Cells
from chimera.sched.dispatch import Dispatcher
from chimera.sched.fleet import Fleet
from chimera.sched.places import PlaceState
from chimera.sched.policies.board import Board

EVERY_S = 5.0
PATIENCE_S = 1.0
"""So long a model without a seat is its own cell's to place."""
GAP = 0.1
"""Cells whose GPUs' shares of time at work differ by less are even."""
BATCH = 4.0
"""Of a request's price, when it shares its steps with a few others."""
SPARE = 0.1
"""The part of a GPU that is left to caches where a model moves in that has a place already."""
TRIED = 4
"""So many cells with room, and so many models of the busiest, are looked at."""

BoardOf = Callable[[int], Board]


class Move(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    to: int
    gpu_ids: tuple[int, ...]
    reason: str


class Balance:
    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, cells: Cells) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._cells = cells
        self.looked_s: float | None = None

    def look(self, now: float, board_of: BoardOf) -> Move | None:
        """The one move that helps most, if it is time to look."""
        if self.looked_s is None:
            self.looked_s = now  # agents are still coming
        if now < self.looked_s + EVERY_S:
            return None
        self.looked_s = now
        for name in self._fleet.models:
            if not self._fleet.wanted_of(name):
                self._cells.of_model(name)  # it finds a home, if it has none
        return self._for_room(now, board_of) or self._for_time(now, board_of)

    def _for_room(self, now: float, board_of: BoardOf) -> Move | None:
        fleet, cells = self._fleet, self._cells
        for name, since_s in self._dispatcher.waiting_since().items():
            model = fleet.models.get(name)
            if model is None or fleet.wanted_of(name) or now < since_s + PATIENCE_S:
                continue
            home = cells.of_model(name)
            others = sorted((n for n in range(cells.count) if n != home), key=lambda n: (cells.held_share(n), n))
            for number in others[:TRIED]:
                gang = board_of(number).roomiest(model)
                if gang is not None:
                    reason = f"requests wait for it, and only in cell {number} is room: GPUs {list(gang)}"
                    return Move(model=name, to=number, gpu_ids=gang, reason=reason)
        return None

    def _for_time(self, now: float, board_of: BoardOf) -> Move | None:
        cells = self._cells
        works = [self._works(number, now) for number in range(cells.count)]
        gpus = [cells.gpu_count(number) for number in range(cells.count)]
        loads = {n: sum(works[n].values()) / gpus[n] for n in range(cells.count) if gpus[n]}
        if len(loads) < 2:
            return None
        busiest = max(loads, key=lambda n: (loads[n], -n))
        calmest = min(loads, key=lambda n: (loads[n], n))
        gap = loads[busiest] - loads[calmest]
        if gap < GAP:
            return None
        # What moves takes its load from the one and gives it to the other; more than the whole gap would only turn it round.
        most = gap * min(gpus[busiest], gpus[calmest])
        movable = [name for name, work in works[busiest].items() if 0 < work < most and self._may_move(name)]
        movable.sort(key=lambda name: (abs(works[busiest][name] - most / 2), name))
        board = board_of(calmest)
        spare_bytes = SPARE * min((gpu.capacity_bytes for gpu in board.gpus.values()), default=0)
        for name in movable[:TRIED]:
            gang = board.roomiest(self._fleet.models[name], spare_bytes=spare_bytes)
            if gang is not None:
                reason = f"cell {busiest} is at work {loads[busiest]:.0%} of the time, and cell {calmest} {loads[calmest]:.0%}"
                return Move(model=name, to=calmest, gpu_ids=gang, reason=reason)
        return None

    def _works(self, number: int, now: float) -> dict[str, float]:
        """GPU seconds a second of each model, at the rate of the last minute."""
        return {name: self._work(self._fleet.models[name], now) for name in self._cells.models_of(number)}

    def _work(self, model: ModelSpec, now: float) -> float:
        demand, cost = self._dispatcher.demand(model.name, now), self._fleet.price_of(model.name)
        if demand is None or cost is None:
            return 0.0
        seconds = cost.request_s(demand.prompt_tokens, demand.output_tokens, BATCH)
        return demand.requests_per_s_minute * seconds * model.tp_size

    def _may_move(self, name: str) -> bool:
        """It stands in one place only, and serves there."""
        places = self._fleet.places_of(name)
        return len(places) == 1 and places[0].state is PlaceState.SERVING and not self._fleet.models[name].pin

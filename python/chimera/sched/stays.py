"""How long a model stays whose last request has said so: that word goes before the model's own, until the next request's.

Knows when nobody uses a model, and is told the time. What becomes of one whose stay is over is the plan's to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.request import Request
from chimera.sched.fleet import Fleet


class Stay(msgspec.Struct, kw_only=True):
    for_s: float
    """After its last request has ended; below zero for ever."""
    idle_since_s: float | None = None
    """Empty while somebody uses it."""
    over: bool = False


class Stays:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.asked: dict[str, Stay] = {}

    def heard(self, request: Request) -> None:
        """Each request speaks for itself: one that says nothing leaves it to the model's entry."""
        if request.keep_alive_s is None:
            self.asked.pop(request.model, None)
        elif request.model in self._fleet.models:
            self.asked[request.model] = Stay(for_s=request.keep_alive_s)

    def forget(self, model: str) -> None:
        self.asked.pop(model, None)

    def note(self, now: float, waiting_for: Callable[[str], int]) -> None:
        """After whatever has happened: who is used by nobody since now."""
        for model, stay in self.asked.items():
            if waiting_for(model) or any(place.routed for place in self._fleet.places_of(model)):
                stay.idle_since_s = None
            elif stay.idle_since_s is None:
                stay.idle_since_s = now

    def ending(self, now: float) -> list[str]:
        """Models whose stay is over by now, each told once."""
        ended = [model for model, due_s in self._dues() if due_s <= now]
        for model in ended:
            self.asked[model].over = True
        return ended

    def due_s(self) -> float | None:
        """When the next of them is over."""
        return min((due_s for _, due_s in self._dues()), default=None) if self.asked else None

    def as_asked(self, model: ModelSpec) -> ModelSpec:
        """The model as policies are to see it."""
        stay = self.asked.get(model.name)
        if stay is None:
            return model
        if stay.for_s < 0:
            return msgspec.structs.replace(model, pin=True)
        return msgspec.structs.replace(model, keep_alive_s=stay.for_s)

    def _dues(self) -> Iterator[tuple[str, float]]:
        for model, stay in self.asked.items():
            if stay.for_s >= 0 and not stay.over and stay.idle_since_s is not None:
                yield model, stay.idle_since_s + stay.for_s

"""One GPU on paper: who holds how much of its memory, who is at work on it, and when its link is free.

Weights are held whole, caches in stripes; a replica that is to come up holds its weights from the decision on, so caches
give way to it and never the other way. Knows bytes and seconds; decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chimera.core.gpu import Gpu
from chimera.sched.cost import CostTable

if TYPE_CHECKING:
    from chimera.sim.engine import SimEngine


class SimGpu:
    __slots__ = ("_began_s", "busy_s", "costs", "engines", "gpu", "held_bytes", "kv_bytes", "link_free_s", "starved", "working")

    def __init__(self, gpu: Gpu, costs: CostTable) -> None:
        self.gpu = gpu
        self.costs = costs
        self.held_bytes = 0
        """Weights and engines."""
        self.kv_bytes = 0
        self.link_free_s = 0.0
        self.engines: list[SimEngine] = []
        self.working: list[SimEngine] = []
        self.starved: dict[SimEngine, None] = {}
        """Engines that wait for memory here, the longest-waiting first."""
        self.busy_s = 0.0
        self._began_s = 0.0

    @property
    def free_bytes(self) -> int:
        return self.gpu.capacity_bytes - self.held_bytes - self.kv_bytes

    def set_working(self, engine: SimEngine, working: bool, now: float) -> None:
        """An engine begins or ends to run steps; its neighbours go on at another pace."""
        if working:
            if not self.working:
                self._began_s = now
            self.working.append(engine)
        else:
            self.working.remove(engine)
            if not self.working:
                self.busy_s += now - self._began_s
        for neighbour in self.working:
            if neighbour is not engine:
                neighbour.change_pace()

    def slowdown(self) -> float:
        return self.costs.slowdown(len(self.working))

    def busy_until(self, now: float) -> float:
        return self.busy_s + (now - self._began_s if self.working else 0.0)

    def feed(self) -> None:
        """Memory has come free: those who wait for it look again, in the order of their waiting."""
        for engine in list(self.starved):
            if self.free_bytes < 0:
                return
            del self.starved[engine]
            engine.look_again()

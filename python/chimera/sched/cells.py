"""Which GPUs and which models are decided together, once there are too many for one decision.

Up to `TOGETHER` GPUs everything is one cell, and nothing here has a say. Beyond, agents are put into cells as whole, so that a
gang's neighbours stay together, and every model is at home in one cell: where it stands, else where the least is at home. A
cell is decided as if there were no other: its GPUs are as large as what models of other cells leave of them. So a decision
costs what a cell's costs, however large the whole is. Knows names and bytes; moves nothing (`balance.py` does).
"""

from __future__ import annotations

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.sched.fleet import Fleet

TOGETHER = 32
"""So many GPUs are decided as one."""
CELL_GPUS = 16
"""Of each cell, if there are more."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one decision is about."""

    number: int
    gpus: tuple[Gpu, ...]
    models: tuple[ModelSpec, ...]
    wanted: Placement


class CellsState(msgspec.Struct, frozen=True, kw_only=True):
    """All that `Cells` remembers. Empty while everything is one."""

    agents: dict[str, int] = {}
    models: dict[str, int] = {}


class Cells:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._of_agent: dict[str, int] = {}
        self._agents: list[list[str]] = []
        self._of_gpu: dict[int, int] = {}
        self._of_model: dict[str, int] = {}
        self._models: list[dict[str, None]] = []

    # Readings.

    @property
    def count(self) -> int:
        return max(1, len(self._agents))

    @property
    def divided(self) -> bool:
        return bool(self._agents)

    def of_model(self, model: str) -> int:
        """Where it is at home; it finds a home if it has none."""
        if not self._agents:
            return 0
        known = self._of_model.get(model)
        return self._find_home(model) if known is None else known

    def of_agent(self, agent: str) -> int:
        return self._of_agent.get(agent, 0)

    def of_seat(self, seat: Seat) -> int | None:
        """`None` where no agent has its GPUs."""
        return self._of_gpu.get(seat.gpu_ids[0])

    def astray(self, number: int) -> dict[str, list[Seat]]:
        """The models at home there that are wanted elsewhere too, with where."""
        of_gpu = self._of_gpu
        found: dict[str, list[Seat]] = {}
        for seat in self._fleet.wanted_of_all(self._models[number]):
            if of_gpu.get(seat.gpu_ids[0], number) != number:
                found.setdefault(seat.replica.model, []).append(seat)
        return found

    def models_of(self, number: int) -> list[str]:
        return list(self._models[number])

    def cell(self, number: int) -> Cell:
        fleet = self._fleet
        names = self._models[number]
        return Cell(
            number=number,
            gpus=tuple([self._left_of(gpu, number) for gpu in self._gpus(number)]),
            models=tuple([fleet.models[name] for name in names]),
            wanted=Placement(tuple(fleet.wanted_of_all(names))),
        )

    def _gpus(self, number: int) -> list[Gpu]:
        agents = (self._fleet.agents[name] for name in self._agents[number])
        return [gpu for agent in agents if agent.present for gpu in agent.gpus]

    def _left_of(self, gpu: Gpu, number: int) -> Gpu:
        """As large as what models of other cells leave of it."""
        fleet = self._fleet
        of_model, here = self._of_model, fleet.on_gpu(gpu.gpu_id)
        foreign = [name for place in here if of_model.get(name := place.seat.replica.model, number) != number]
        if not foreign or fleet.costs is None:
            return gpu
        held = sum(fleet.costs.resident_bytes(fleet.models[name]) for name in foreign if name in fleet.models)
        return msgspec.structs.replace(gpu, capacity_bytes=max(0, gpu.capacity_bytes - held))

    def whole(self, number: int, placement: Placement) -> Placement:
        """What is wanted of all, when this is wanted of one cell."""
        others = (seat for seat in self._fleet.wanted.seats if self._of_model.get(seat.replica.model) != number)
        return Placement((*others, *placement.seats))

    def held_share(self, number: int) -> float:
        """How much of its GPUs' memory the models at home there hold with one replica each."""
        fleet = self._fleet
        capacity = sum(gpu.capacity_bytes for gpu in self._gpus(number))
        models = (fleet.models[name] for name in self._models[number])
        return sum(_bytes(model) for model in models) / capacity if capacity else float("inf")

    def gpu_count(self, number: int) -> int:
        return len(self._gpus(number))

    def has_gang(self, number: int, model: ModelSpec) -> bool:
        """Whether one of its agents has GPUs for a replica."""
        agents = (self._fleet.agents[name] for name in self._agents[number])
        needed = model.weight_bytes
        return any(a.present and sum(g.capacity_bytes > needed for g in a.gpus) >= model.tp_size for a in agents)

    # Who is where.

    def joined(self, agent: str) -> None:
        """Another agent may be one too many for a single cell."""
        agents = self._fleet.agents
        if not self._agents and sum(len(known.gpus) for known in agents.values()) <= TOGETHER:
            return
        if not self._agents:
            for name in agents:
                self._join(name)
        elif agent not in self._of_agent:
            self._join(agent)
        self._of_gpu |= {gpu.gpu_id: number for name, number in self._of_agent.items() for gpu in agents[name].gpus}
        for seat in self._fleet.wanted.seats:
            if seat.replica.model not in self._of_model and self.of_seat(seat) is not None:
                self.of_model(seat.replica.model)

    def _join(self, name: str) -> None:
        """The first cell with room for all of its GPUs, else a new one."""
        agents = self._fleet.agents
        own = len(agents[name].gpus)
        sizes = [sum(len(agents[other].gpus) for other in cell) for cell in self._agents]
        number = next((n for n, size in enumerate(sizes) if size + own <= CELL_GPUS), len(sizes))
        if number == len(sizes):
            self._agents.append([])
            self._models.append({})
        self._agents[number].append(name)
        self._of_agent[name] = number

    def _find_home(self, model: str) -> int:
        fleet = self._fleet
        places = (*fleet.wanted_of(model), *(place.seat for place in fleet.places_of(model)))
        stands = next((number for seat in places if (number := self.of_seat(seat)) is not None), None)
        spec = fleet.models.get(model)
        if spec is None:
            return 0  # it has just been removed
        if stands is None:
            fitting = [n for n in range(self.count) if self.has_gang(n, spec)] or list(range(self.count))
            stands = min(fitting, key=lambda number: (self.held_share(number), number))
        self.house(model, stands)
        return stands

    def house(self, model: str, number: int) -> None:
        self.forget(model)
        self._of_model[model] = number
        self._models[number][model] = None

    def follow(self, seat: Seat) -> None:
        """The operator has chosen its place, and so its model's home."""
        number = self.of_seat(seat)
        if number is not None:
            self.house(seat.replica.model, number)

    def forget(self, model: str) -> None:
        known = self._of_model.pop(model, None)
        if known is not None:
            del self._models[known][model]

    # Memory.

    def state(self) -> CellsState:
        return CellsState(agents=dict(self._of_agent), models=dict(self._of_model))

    def revive(self, state: CellsState) -> None:
        count = max(state.agents.values(), default=-1) + 1
        self._agents, self._models = [[] for _ in range(count)], [{} for _ in range(count)]
        self._of_agent = dict(state.agents)
        for name, number in state.agents.items():
            self._agents[number].append(name)
            self._of_gpu |= {gpu.gpu_id: number for gpu in self._fleet.agents[name].gpus}
        for model, number in state.models.items():
            self.house(model, number)


def _bytes(model: ModelSpec) -> int:
    return model.weight_bytes * model.tp_size

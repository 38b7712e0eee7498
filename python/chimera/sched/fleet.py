"""What is here: models, agents, places, and what is wanted of them. Shared by the dispatcher and the plan, which change it.

Owns the indices (places by model, by GPU, by due time), so that no event has to look at everything, and the readings that
both sides need. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable, EngineCost
from chimera.sched.places import Place, PlaceState
from chimera.sched.policies.policy import Policy
from chimera.sched.queues import BY_POLICY, LOCAL_POLICIES, local_of


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much waiting the dispatcher allows."""

    queue_per_model: int = 1024
    """Requests of one model that may wait, here and before its replicas."""
    hold_s: float = 600.0
    """The longest that a request waits here for a replica, whatever the hope."""
    agent_absence_s: float = 30.0
    """How long a lost agent is expected back, and a missing one at the start."""
    agent_return_s: float = 3.0
    """How long its requests wait for it: its workers may go on with them, and it comes back to tell which."""


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that was running when its agent's connection ended; if the agent lives, it is still running there."""

    request_id: str
    replica: ReplicaId
    epoch: Epoch


class Agent(msgspec.Struct, kw_only=True):
    name: str
    start: int
    gpus: tuple[Gpu, ...]
    present: bool = True
    orphans: list[Orphan] = []
    earlier: tuple[int, ...] = ()
    """Starts of its earlier lives, whose workers it goes on with."""
    elastic: bool = True
    requests_due_s: float | None = None
    """Set while it is away and its requests still wait for it."""

    @property
    def lives(self) -> tuple[int, ...]:
        return (self.start, *self.earlier)


class Fleet:
    def __init__(self, wanted: Placement, limits: Limits, policy: Policy, local: str | None, costs: CostTable | None) -> None:
        self._wanted = wanted
        self._wanted_of: dict[str, list[Seat]] | None = None
        self.limits = limits
        self.policy = policy
        self.local_asked = _local_named(local)
        """A name, `by-policy`, or `None` for ours where there is a cost table."""
        self.costs = costs
        self.models: dict[str, ModelSpec] = {}
        self.agents: dict[str, Agent] = {}
        self.places: dict[ReplicaId, Place] = {}
        self.strangers: dict[int, int] = {}
        """Bytes of each GPU that processes of others hold."""
        self.stirred_models: set[str] = set()
        """Something has happened to them that the policy should hear of soon."""
        self.stirred_agents: set[str] = set()
        self.crowded_models: set[str] = set()
        """Many requests are with a replica of theirs: news too, but nobody waits for a place."""
        self._having: dict[int, list[str]] = {}
        """The agents that have each GPU: one, but while a GPU changes hands."""
        self.awaited: dict[str, Agent] = {}
        """Those that are away and whose requests still wait for them."""
        self._by_model: dict[str, list[Place]] = {}
        self._on_gpu: dict[int, list[Place]] = {}
        self._prices: dict[str, EngineCost] = {}
        self._prices_of: CostTable | None = None
        self._timed: dict[ReplicaId, float] = {}
        """The `due_s` of the places that have one; few."""
        self.due_s: float | None = None
        """The soonest of them."""

    # What is wanted.

    @property
    def wanted(self) -> Placement:
        return self._wanted

    @wanted.setter
    def wanted(self, placement: Placement) -> None:
        self._wanted, self._wanted_of = placement, None

    def wanted_of(self, model: str) -> Sequence[Seat]:
        return self._wanted_by_model().get(model, ())

    def wanted_of_all(self, models: Iterable[str]) -> list[Seat]:
        """One model's after the other's."""
        wanted = self._wanted_by_model()
        return [seat for model in models for seat in wanted.get(model, ())]

    def _wanted_by_model(self) -> dict[str, list[Seat]]:
        if self._wanted_of is None:
            self._wanted_of = {}
            for seat in self._wanted.seats:
                self._wanted_of.setdefault(seat.replica.model, []).append(seat)
        return self._wanted_of

    # Readings.

    @property
    def local(self) -> str:
        """In which order requests go at the agents."""
        if self.local_asked == BY_POLICY:
            return local_of(self.policy.name)
        return self.local_asked or ("fcfs" if self.costs is None else "goodput")

    def order_locally(self, local: str) -> None:
        self.local_asked = _local_named(local)

    def price_of(self, model: str) -> EngineCost | None:
        """What work costs for a registered model; known by name until the table changes."""
        if self.costs is None:
            return None
        if self._prices_of is not self.costs:
            self._prices, self._prices_of = {}, self.costs
        known = self._prices.get(model)
        if known is None:
            known = self._prices[model] = self.costs.of(self.models[model])
        return known

    def places_of(self, model: str) -> list[Place]:
        return self._by_model.get(model, [])

    def serving(self, model: str) -> list[Place]:
        serving = PlaceState.SERVING
        return [place for place in self._by_model.get(model, ()) if place.state is serving]

    def on_gpu(self, gpu_id: int) -> list[Place]:
        return self._on_gpu.get(gpu_id, [])

    def at_work_beside(self, place: Place) -> int:
        """How many other replicas have requests on its GPUs."""
        gpu_ids, on_gpu = place.seat.gpu_ids, self._on_gpu
        near = [p.seat.replica for gpu_id in gpu_ids for p in on_gpu[gpu_id] if p.routed and p is not place]
        return len(near) if len(gpu_ids) == 1 else len(set(near))

    def gpus(self) -> Iterator[Gpu]:
        """Those that are here."""
        return (gpu for agent in self.agents.values() if agent.present for gpu in agent.gpus)

    def owner(self, seat: Seat) -> str | None:
        """The agent that is here and has every GPU of the seat."""
        first, *others = seat.gpu_ids
        owners = (name for name in self._having.get(first, ()) if self.agents[name].present)
        return next((name for name in owners if all(name in self._having.get(g, ()) for g in others)), None)

    def agent_in_life(self, epoch: Epoch) -> str | None:
        """The agent that is here and minted the epoch in its present life."""
        return next((a.name for a in self.agents.values() if a.present and epoch.agent_start in a.lives), None)

    def has_room(self, place: Place) -> bool:
        """Whether it may start beside those that are leaving; what does not fit even without them is the agent's to refuse."""
        if self.costs is None:
            return True
        for gpu_id in place.seat.gpu_ids:
            there = [p for p in self._on_gpu[gpu_id] if p is not place and p.state is not PlaceState.ABSENT]
            if not any(p.state is PlaceState.LEAVING for p in there):
                continue
            models = [self.models[p.replica.model] for p in (*there, place) if p.replica.model in self.models]
            if sum(self.costs.resident_bytes(model) for model in models) > self._capacity_bytes(gpu_id):
                return False
        return True

    def _capacity_bytes(self, gpu_id: int) -> int:
        gpus = (gpu for name in self._having.get(gpu_id, ()) for gpu in self.agents[name].gpus)
        return next((gpu.capacity_bytes - self.strangers.get(gpu_id, 0) for gpu in gpus if gpu.gpu_id == gpu_id), 0)

    def could_fit(self, model: ModelSpec) -> bool:
        """Whether the GPUs that are here could hold it if they were empty. Without any, that is not known yet."""
        gpus = list(self.gpus())
        if self.costs is None or not gpus:
            return True
        return sum(gpu.capacity_bytes >= self.costs.resident_bytes(model) for gpu in gpus) >= model.tp_size

    # The lists of models, agents and places.

    def register(self, model: ModelSpec) -> None:
        self.models[model.name] = model
        self._prices.pop(model.name, None)

    def unregister(self, model: str) -> None:
        del self.models[model]
        self._prices.pop(model, None)

    def enlist(self, agent: Agent) -> None:
        """It is here, or here anew."""
        known = self.agents.get(agent.name)
        for gpu in () if known is None else known.gpus:
            self._having[gpu.gpu_id].remove(agent.name)
        self.agents[agent.name] = agent
        for gpu in agent.gpus:
            self._having.setdefault(gpu.gpu_id, []).append(agent.name)
        self.expect(agent, agent.requests_due_s)

    def expect(self, agent: Agent, requests_due_s: float | None) -> None:
        """Its requests wait until then for it to come back, or no longer."""
        agent.requests_due_s = requests_due_s
        if requests_due_s is None:
            self.awaited.pop(agent.name, None)
        else:
            self.awaited[agent.name] = agent

    def holder(self, gpu_id: int) -> Agent | None:
        """The agent that has the GPU, here or away."""
        return next((self.agents[name] for name in self._having.get(gpu_id, ())), None)

    def lose(self, agent: Agent, gpu_id: int) -> None:
        agent.gpus = tuple(gpu for gpu in agent.gpus if gpu.gpu_id != gpu_id)
        self._having[gpu_id].remove(agent.name)

    def add(self, place: Place) -> None:
        self.places[place.replica] = place
        for gpu_id in place.seat.gpu_ids:
            self._on_gpu.setdefault(gpu_id, []).append(place)
        self._by_model.setdefault(place.replica.model, []).append(place)
        self.note_due(place)

    def remove(self, place: Place) -> None:
        del self.places[place.replica]
        for gpu_id in place.seat.gpu_ids:
            self._on_gpu[gpu_id].remove(place)
        self._by_model[place.replica.model].remove(place)
        self._time(place.replica, None)

    def enter(self, place: Place, state: PlaceState, now: float, *, due_s: float | None = None) -> None:
        place.enter(state, now, due_s=due_s)
        self.note_due(place)

    def note_due(self, place: Place) -> None:
        self._time(place.replica, place.due_s)

    def _time(self, replica: ReplicaId, due_s: float | None) -> None:
        if due_s is not None:
            self._timed[replica] = due_s
        elif self._timed.pop(replica, None) is None:
            return
        self.due_s = min(self._timed.values(), default=None)

    @property
    def timed(self) -> int:
        """How many places have something that has to be done about them at a known time."""
        return len(self._timed)

    def due_by(self, now: float) -> list[Place]:
        return [self.places[replica] for replica in sorted(replica for replica, due_s in self._timed.items() if due_s <= now)]

    def check(self) -> None:
        """Raises if an invariant of this module does not hold."""
        dues = [place.due_s for place in self.places.values() if place.due_s is not None]
        assert self.due_s == min(dues, default=None), "somebody is due sooner than is known"
        for place in self.places.values():
            assert place.due_s == self._timed.get(place.replica), f"{place.replica} is due at another time than is known"
            if place.state is PlaceState.SERVING:
                assert place.epoch is not None and place.agent == self.agent_in_life(place.epoch), f"{place.replica} is stale"
            assert place.ended is None or place.epoch is None or place.epoch > place.ended, f"{place.replica} lives twice"


def _local_named(local: str | None) -> str | None:
    if local is not None and local not in (*LOCAL_POLICIES, BY_POLICY):
        raise ConfigError.single("local", f"there is no order {local!r}; there are {', '.join(LOCAL_POLICIES)} and {BY_POLICY}")
    return local

"""What control's loop talks to: the one door to dispatcher, replicas' lives and plan, and all that they remember.

Knows agents by name and life, replicas by epoch (which it never invents), requests by their measure. Does not know queues of
GPUs, pages, or which tokens a client has seen.

What control's loop owes beyond the package's contract: `AgentLost` for an old connection before `AgentJoined` from a new one;
an agent's `Reject` and `Requeue` go through `on`, and what comes back goes to the front-ends; when a front-end is gone, a
`RequestCancelled` for each of `requests_of(front)`.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.request import Request
from chimera.core.snapshot import Snapshot
from chimera.msg.actions import Abort, Action, Activate, Deactivate, QueueBy, Reject, Requeue, Resize, Route, WakeAt
from chimera.msg.events import (
    ActivationFailed,
    AgentJoined,
    AgentLost,
    Event,
    GpuLost,
    GpuSampled,
    LoadWanted,
    ModelRegistered,
    ModelRemoved,
    PlacementChanged,
    PolicyChosen,
    ReplicaReady,
    ReplicaStopped,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    ResizeWanted,
    StepsTimed,
    UnloadWanted,
    Woke,
    WorkerLost,
)
from chimera.sched.cells import Cell, CellsState
from chimera.sched.cost import CostTable
from chimera.sched.demand import Counter
from chimera.sched.dispatch import Dispatcher, Held, Pace
from chimera.sched.fleet import Agent, Fleet, Limits
from chimera.sched.lives import Lives
from chimera.sched.places import Place
from chimera.sched.plan import Plan
from chimera.sched.policies import policy_named
from chimera.sched.policies.policy import WarmRules
from chimera.sched.stays import Stay

ControlInput = Event | Reject | Requeue
"""What happened, and what agents have decided about requests that were routed to them."""


class ControlState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a `ControlScheduler` remembers."""

    wanted: Placement
    limits: Limits
    models: tuple[ModelSpec, ...]
    agents: tuple[Agent, ...]
    places: tuple[Place, ...]
    held: tuple[Held, ...]
    paces: dict[str, Pace]
    wake_s: float | None
    filed: Placement = Placement()
    policy: str = "static"
    costs: CostTable | None = None
    warm: WarmRules = WarmRules()
    demands: dict[str, Counter] = {}
    reviews: dict[int, float] = {}
    reviewed_s: float | None = None
    local: str | None = None
    learns: bool = False
    strangers: dict[int, int] = {}
    stays: dict[str, Stay] = {}
    resting: dict[str, tuple[Seat, ...]] = {}
    cells: CellsState = CellsState()
    balanced_s: float | None = None


class ControlScheduler:
    """One for the whole system. `filed` is what the operator wrote: where every policy begins, and where `static` stays.

    Policies other than `static` need a cost table. `local` is the order in which requests go at the agents: a name, or
    `by-policy`; `None` is ours where there is a cost table. One that `learns` corrects the table by what it sees.
    """

    def __init__(
        self,
        filed: Placement,
        limits: Limits | None = None,
        *,
        policy: str = "static",
        local: str | None = None,
        costs: CostTable | None = None,
        warm: WarmRules | None = None,
        learns: bool = False,
    ) -> None:
        self.fleet = Fleet(filed, limits or Limits(), policy_named(policy), local, costs)
        self._dispatcher = Dispatcher(self.fleet)
        self._lives = Lives(self.fleet, self._dispatcher, learns=learns)
        self._plan = Plan(self.fleet, self._dispatcher, self._lives, filed, warm or WarmRules())
        self._wake_s: float | None = None

    def on(self, event: ControlInput, now: float) -> list[Action]:
        actions = list(self._decide(event, now))
        plan = self._plan
        plan.stays.note(now, self._dispatcher.waiting_for)
        plan.note_stir(now)
        if plan.is_due(now):
            actions += plan.review(self.snapshot, now)
            plan.note_stir(now)
        wake = self._next_wake()
        return actions if wake is None else [*actions, wake]

    def _decide(self, event: ControlInput, now: float) -> Iterable[Action]:
        match event:
            case RequestArrived():
                return self._arrived(event.request, now)
            case RequestFinished():
                return self._dispatcher.finished(event, now)
            case RequestCancelled():
                return self._dispatcher.cancelled(event.request_id)
            case Reject() | Requeue():
                return self._dispatcher.verdict(event)
            case ReplicaReady():
                return self._lives.ready(event, now)
            case ReplicaStopped():
                return self._lives.ended(event.replica, event.epoch, event.reason, now)
            case ActivationFailed():
                return self._lives.ended(event.replica, event.epoch, event.reason, now, permanent=event.permanent)
            case WorkerLost():
                if event.replica is None or event.epoch is None:
                    return []
                return self._lives.ended(event.replica, event.epoch, event.reason, now)
            case AgentJoined():
                return self._plan.agent_joined(event, now)
            case AgentLost():
                return self._lives.agent_lost(event, now)
            case ModelRegistered():
                return self._lives.registered(event.model, now)
            case ModelRemoved():
                return self._plan.removed(event.model, now)
            case PlacementChanged():
                return self._plan.placement_changed(event, now)
            case PolicyChosen():
                return self._plan.policy_chosen(event, now)
            case GpuLost():
                return self._lives.gpu_lost(event, now)
            case GpuSampled():
                self.fleet.strangers[event.gpu_id] = event.strangers_bytes
                self._plan.sampled(event.gpu_id)
                return self._lives.room_changed(event.gpu_id, now)
            case StepsTimed():
                self._lives.steps_timed(event)
                return []
            case LoadWanted():
                return self._plan.load_wanted(event, now)
            case ResizeWanted():
                return self._plan.resize_wanted(event, now)
            case UnloadWanted():
                return self._plan.unload_wanted(event, now)
            case Woke():
                return self._woke(now)
            case _:
                return []

    def _arrived(self, request: Request, now: float) -> Iterable[Action]:
        return [*self._plan.asked_for(request, now), *self._dispatcher.arrived(request, now)]

    def _woke(self, now: float) -> Iterable[Action]:
        self._wake_s = None
        yield from self._plan.end_stays(now)
        yield from self._lives.due(now)
        yield from self._dispatcher.end_waiting(now)

    def _next_wake(self) -> WakeAt | None:
        soonest = self._plan.review_s
        for due_s in (self._lives.due_s(), self._dispatcher.due_s(), self._plan.stays.due_s()):
            if due_s is not None and (soonest is None or due_s < soonest):
                soonest = due_s
        if soonest is None or (self._wake_s is not None and self._wake_s <= soonest):
            return None  # To be woken too early costs nothing.
        self._wake_s = soonest
        reason = f"{self.fleet.timed} replicas and {self._dispatcher.holding} held requests have a term"
        return WakeAt(at_s=soonest, reason=reason)

    # What the loop asks.

    @property
    def filed(self) -> Placement:
        """What the operator wants, policies aside."""
        return self._plan.filed

    @property
    def policy(self) -> str:
        return self.fleet.policy.name

    @property
    def local(self) -> str:
        """In which order requests go at the agents."""
        return self.fleet.local

    def agent_of(self, action: Action) -> str | None:
        """The agent that an action is for; `None` for those that go to a front-end, or when that agent is gone."""
        match action:
            case Route() | QueueBy():
                return action.agent
            case Activate():
                return self.fleet.owner(action.seat)
            case Deactivate() | Abort() | Resize():
                return None if action.epoch is None else self.fleet.agent_in_life(action.epoch)
            case _:
                return None

    def holds(self, request_id: str) -> bool:
        """Whether the request waits here, its payload with the loop."""
        return self._dispatcher.holds(request_id)

    def standing(self, request_id: str, now: float) -> tuple[int, float, str] | None:
        """Of a request that waits here: its place in the queue, the seconds until its turn, and what it waits for."""
        return self._dispatcher.standing(request_id, now)

    def requests_of(self, front: str) -> list[str]:
        """The open requests of a front-end."""
        return self._dispatcher.requests_of(front)

    def snapshot(self, now: float, cell: Cell | None = None) -> Snapshot:
        """Of everything, or of one cell."""
        fleet, dispatcher = self.fleet, self._dispatcher
        places: Iterable[Place] = fleet.places.values()
        if cell is not None:
            places = [place for model in cell.models for place in fleet.places_of(model.name)]
            names = [model.name for model in cell.models]
            waiting = {name: count for name in names if (count := dispatcher.waiting_for(name))}
        return Snapshot(
            now_s=now,
            policy=self.policy,
            local=self.local,
            gpus=tuple(fleet.gpus()) if cell is None else cell.gpus,
            models=tuple(fleet.models.values()) if cell is None else cell.models,
            replicas=tuple([place.view(now) for place in places]),
            waiting=dispatcher.waiting() if cell is None else waiting,
            demands=dispatcher.demand_views(now, None if cell is None else names),
        )

    # Memory.

    def state(self) -> ControlState:
        fleet = self.fleet
        state = ControlState(
            wanted=fleet.wanted,
            limits=fleet.limits,
            models=tuple(fleet.models.values()),
            agents=tuple(fleet.agents.values()),
            places=tuple(fleet.places.values()),
            held=self._dispatcher.held(),
            paces=self._dispatcher.paces,
            wake_s=self._wake_s,
            filed=self._plan.filed,
            policy=self.policy,
            costs=fleet.costs,
            warm=self._plan.warm,
            demands=self._dispatcher.demands,
            reviews=self._plan.reviews,
            reviewed_s=self._plan.reviewed_s,
            local=fleet.local_asked,
            learns=self._lives.learns,
            strangers=fleet.strangers,
            stays=self._plan.stays.asked,
            resting=self._plan.resting,
            cells=self._plan.cells.state(),
            balanced_s=self._plan.balance.looked_s,
        )
        return _copy(state)

    @classmethod
    def from_state(cls, state: ControlState) -> ControlScheduler:
        state = _copy(state)
        scheduler = cls(
            state.filed,
            state.limits,
            policy=state.policy,
            local=state.local,
            costs=state.costs,
            warm=state.warm,
            learns=state.learns,
        )
        fleet = scheduler.fleet
        fleet.strangers = state.strangers
        fleet.wanted = state.wanted
        for model in state.models:
            fleet.register(model)
        for agent in state.agents:
            fleet.enlist(agent)
        for place in state.places:
            fleet.add(place)
        scheduler._dispatcher.revive(state.held, state.demands, state.paces)
        scheduler._plan.stays.asked = state.stays
        scheduler._plan.resting = state.resting
        scheduler._plan.revive(state.reviews, state.reviewed_s)
        scheduler._plan.cells.revive(state.cells)
        scheduler._plan.balance.looked_s = state.balanced_s
        scheduler._wake_s = state.wake_s
        return scheduler

    def check(self) -> None:
        """Raises if an invariant of this module does not hold."""
        self.fleet.check()
        self._dispatcher.check()


def _copy(state: ControlState) -> ControlState:
    """Through its own written form, so what is remembered is exactly what a log can hold."""
    return msgspec.json.decode(msgspec.json.encode(state), type=ControlState)

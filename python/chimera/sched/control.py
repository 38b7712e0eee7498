"""The dispatcher and the placement: holds each request until a replica of its model serves, and keeps the wanted replicas up.

Owns what is wanted, what every agent was last told, and every request between its arrival and its end. Knows agents by
name and life, replicas by epoch (which it never invents), requests by their measure. Does not know queues of GPUs, pages,
or which tokens a client has seen: whatever may have been served partly goes back to its front-end to be brought again.

Invariants: a request is held, or with one place, or gone; one that is held waits for something with a known end; news of a
life that is over changes nothing. What a policy decides is carried out between two events, and loses no request: a replica that
is no longer wanted drains, and what waited for it is brought again.

What control's loop owes beyond the package's contract: `AgentLost` for an old connection before `AgentJoined` from a new one;
an agent's `Reject` and `Requeue` go through `on`, and what comes back goes to the front-ends; when a front-end is gone, a
`RequestCancelled` for each of `requests_of(front)`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import replace

from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.record import Alternative
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.errors import ConfigError
from chimera.msg.actions import Abort, Action, Activate, Deactivate, QueueBy, Reject, RejectCode, Requeue, Route, WakeAt
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
    Outcome,
    PolicyChosen,
    ReplicaReady,
    ReplicaStopped,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    StepsTimed,
    UnloadWanted,
    Woke,
    WorkerLost,
)
from chimera.sched import refine
from chimera.sched.cost import CostTable
from chimera.sched.demand import Counter
from chimera.sched.places import QUARANTINE_AFTER, Place, PlaceState, Routed
from chimera.sched.policies import policy_named
from chimera.sched.policies.policy import Decision, Question, WarmRules
from chimera.sched.queues import BY_POLICY, LOCAL_POLICIES, Fcfs, Queue, deadline_s, is_strict, local_of

ControlInput = Event | Reject | Requeue
"""What happened, and what agents have decided about requests that were routed to them."""

FIRST_PACE_S = 1.0
"""Seconds from one end to the next on one replica, until the first has been seen."""
PACE_MEMORY = 0.9
CROWD = 8
"""So many requests at one replica, and each doubling of it, are news for the policy."""
SOON_S = 0.02
"""Reviews that events ask for are at least so far apart."""


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
    requests_due_s: float | None = None
    """Set while it is away and its requests still wait for it."""


class Pace(msgspec.Struct, kw_only=True):
    """How fast one model's requests end while there is work: what `Retry-After` is computed from."""

    mean_s: float = FIRST_PACE_S
    """Per replica, between one end and the next."""
    mark_s: float | None = None
    """The last end, or when work began after idleness."""

    def begin(self, now: float) -> None:
        self.mark_s = now

    def end(self, now: float, replicas: int) -> None:
        if self.mark_s is not None:
            self.mean_s = PACE_MEMORY * self.mean_s + (1 - PACE_MEMORY) * (now - self.mark_s) * max(1, replicas)
        self.mark_s = now


class Held(msgspec.Struct, frozen=True, kw_only=True):
    request: Request
    since_s: float


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
    review_s: float | None = None
    reviewed_s: float | None = None
    local: str | None = None
    learns: bool = False
    strangers: dict[int, int] = {}


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
        self._filed = filed
        self._wanted = filed
        self._policy = policy_named(policy)
        self._local = _local_named(local)
        self._costs = costs
        self._learns = learns
        self._strangers: dict[int, int] = {}
        """Bytes of each GPU that processes of others hold."""
        self._warm = warm or WarmRules()
        self._demands: dict[str, Counter] = {}
        self._review_s: float | None = None
        """When the policy is asked next; `None` until something happens."""
        self._reviewed_s: float | None = None
        self._limits = limits or Limits()
        self._models: dict[str, ModelSpec] = {}
        self._agents: dict[str, Agent] = {}
        self._places: dict[ReplicaId, Place] = {}
        self._by_model: dict[str, list[Place]] = {}
        self._on_gpu: dict[int, list[Place]] = {}
        self._held: dict[str, Queue] = {}
        self._held_since: OrderedDict[str, Held] = OrderedDict()
        """All that is held, the longest-held first."""
        self._strict: dict[str, float] = {}
        """Of the held, those that would rather be turned away than be late, and when they are."""
        self._where: dict[str, ReplicaId] = {}
        """The place that a routed request is with."""
        self._paces: dict[str, Pace] = {}
        self._timed: set[ReplicaId] = set()
        """The places with a `due_s`; few, so that no event has to look at all of them."""
        self._wake_s: float | None = None

    def on(self, event: ControlInput, now: float) -> list[Action]:
        actions = list(self._decide(event, now))
        if self._review_s is not None and self._review_s <= now:
            actions += self._review(now)
        wake = self._next_wake()
        return actions if wake is None else [*actions, wake]

    def _decide(self, event: ControlInput, now: float) -> Iterable[Action]:
        match event:
            case RequestArrived():
                return self._arrived(event.request, now)
            case RequestFinished():
                return self._finished(event, now)
            case RequestCancelled():
                return self._cancelled(event.request_id)
            case Reject() | Requeue():
                return self._verdict(event)
            case ReplicaReady():
                return self._ready(event, now)
            case ReplicaStopped():
                return self._life_ended(event.replica, event.epoch, event.reason, now)
            case ActivationFailed():
                return self._life_ended(event.replica, event.epoch, event.reason, now, permanent=event.permanent)
            case WorkerLost():
                if event.replica is None or event.epoch is None:
                    return []
                return self._life_ended(event.replica, event.epoch, event.reason, now)
            case AgentJoined():
                return self._agent_joined(event, now)
            case AgentLost():
                return self._agent_lost(event, now)
            case ModelRegistered():
                return self._registered(event.model, now)
            case ModelRemoved():
                return self._removed(event.model, now)
            case PolicyChosen():
                return self._policy_chosen(event, now)
            case GpuLost():
                return self._gpu_lost(event, now)
            case GpuSampled():
                self._strangers[event.gpu_id] = event.strangers_bytes
                self._review_soon(now)
                return []
            case StepsTimed():
                self._learn_steps(event)
                return []
            case LoadWanted():
                return self._load_wanted(event, now)
            case UnloadWanted():
                return self._unload_wanted(event, now)
            case Woke():
                return self._woke(now)
            case _:
                return []

    # What the loop asks.

    @property
    def policy(self) -> str:
        return self._policy.name

    @property
    def local(self) -> str:
        """In which order requests go at the agents."""
        if self._local == BY_POLICY:
            return local_of(self._policy.name)
        return self._local or ("fcfs" if self._costs is None else "goodput")

    def agent_of(self, action: Action) -> str | None:
        """The agent that an action is for; `None` for those that go to a front-end, or when that agent is gone."""
        match action:
            case Route() | QueueBy():
                return action.agent
            case Activate():
                return self._owner(action.seat)
            case Deactivate() | Abort():
                return None if action.epoch is None else self._agent_in_life(action.epoch)
            case _:
                return None

    def holds(self, request_id: str) -> bool:
        """Whether the request waits here, its payload with the loop."""
        return request_id in self._held_since

    def requests_of(self, front: str) -> list[str]:
        """The open requests of a front-end."""
        held = [h.request.request_id for h in self._held_since.values() if h.request.front == front]
        routed = [i for place in self._places.values() for i, r in place.routed.items() if r.request.front == front]
        return [*held, *routed]

    def snapshot(self, now: float) -> Snapshot:
        return Snapshot(
            now_s=now,
            policy=self._policy.name,
            local=self.local,
            gpus=tuple(gpu for agent in self._agents.values() if agent.present for gpu in agent.gpus),
            models=tuple(self._models.values()),
            replicas=tuple(
                ReplicaView(
                    replica=place.replica,
                    epoch=place.epoch,
                    state=place.replica_state,
                    gpu_ids=place.seat.gpu_ids,
                    running=min(len(place.routed), place.credits),
                    queued=place.overflow,
                    kv_tokens=place.kv_tokens,
                    since_s=place.since_s,
                    failures=place.failures,
                    quarantine_s=max(0.0, (place.due_s or now) - now) if place.state is PlaceState.QUARANTINED else None,
                    why=place.why if place.failures or place.state in (PlaceState.FAILED, PlaceState.ABSENT) else "",
                )
                for place in self._places.values()
            ),
            waiting={model: len(queue) for model, queue in self._held.items() if len(queue)},
            demands={
                model: counter.view(
                    now,
                    waiting=len(self._held.get(model, ())),
                    open=sum(len(place.routed) for place in self._places_of(model)),
                )
                for model, counter in self._demands.items()
            },
        )

    # Requests.

    def _arrived(self, request: Request, now: float) -> list[Action]:
        if request.request_id in self._where or request.request_id in self._held_since:
            return []
        if request.model in self._models:
            self._demand(request.model).came(request, now)
        refusal = self._refusal(request, now)
        if refusal is not None:
            return [refusal]
        place = self._choice(request.model)
        if place is None:
            late = self._unattainable(request, now)
            if late is not None:
                return [late]
            self._hold(request, now)
            if not self._places_of(request.model):
                self._review_soon(now)
            return []
        route = self._route(request, place, now)
        crowd = len(place.routed)
        if crowd >= CROWD and crowd & (crowd - 1) == 0:  # twice as many as when it was last asked for this
            self._review_soon(now)
        return [route]

    def _refusal(self, request: Request, now: float) -> Reject | None:
        """Why the request cannot even wait, if so."""
        model = request.model
        if model not in self._models:
            return _reject(request, RejectCode.MODEL_NOT_FOUND, f"no model is registered as {model}")
        places = self._places_of(model)
        if not places and not self._policy.on_demand:
            reason = f"{model} is registered, and the placement gives it no GPU"
            return _reject(request, RejectCode.MODEL_NOT_LOADED, reason)
        if not places and not self._could_fit(self._models[model]):
            return _reject(request, RejectCode.MODEL_UNAVAILABLE, f"{model} fits on none of the GPUs that are here")
        if places and not any(place.promising for place in places):
            return self._hopeless(request, places, now)
        ahead = self._ahead(model)
        if request.tries == 0 and ahead >= self._limits.queue_per_model:
            serving = sum(place.state is PlaceState.SERVING for place in places)
            wait_s = self._wait_s(model)
            reason = f"{ahead} requests for {model} wait already ({serving} replicas, about {wait_s:.1f} s)"
            return _reject(request, RejectCode.QUEUE_FULL, reason, retry_after_s=wait_s, queue_position=ahead + 1)
        return None

    def _unattainable(self, request: Request, now: float) -> Reject | None:
        """A request that nobody serves yet, whose model cannot be up in time for it, and that would rather hear so."""
        start_s = self._start_s(request.model, now)
        if not is_strict(request) or now + start_s <= deadline_s(request):
            return None
        reason = f"{request.model} is not up, and will not be within {request.slo.ttft_s or 0.0:g} s"
        return _reject(request, RejectCode.SLO_UNATTAINABLE, reason, retry_after_s=start_s)

    def _start_s(self, model: str, now: float) -> float:
        """How long it takes until a replica of the model serves, as far as can be told."""
        load_s = 0.0 if self._costs is None or model not in self._models else self._costs.of(self._models[model]).activation_s
        coming = [
            max(0.0, place.since_s + (place.load_s or load_s) - now)
            for place in self._places_of(model)
            if place.state is PlaceState.LOADING
        ]
        return min(coming, default=load_s)

    def _hopeless(self, request: Request, places: list[Place], now: float) -> Reject:
        """Nothing that is wanted for this model will serve soon; the likeliest of its places says why."""
        best = min(places, key=lambda place: (place.state is PlaceState.FAILED, place.due_s or now, place.replica))
        if best.state is PlaceState.ABSENT and best.why:
            return _reject(request, RejectCode.MODEL_UNAVAILABLE, f"{best.replica} has no place: {best.why}")
        if best.state is PlaceState.ABSENT:
            away_s = self._limits.agent_absence_s
            reason = f"no agent with GPUs {list(best.seat.gpu_ids)} has been here for {away_s:g} s"
            return _reject(request, RejectCode.AGENT_LOST, reason, retry_after_s=away_s)
        if best.state is PlaceState.FAILED:
            return _reject(request, RejectCode.MODEL_UNAVAILABLE, f"{best.replica} cannot be brought up: {best.why}")
        wait_s = best.retry_after_s(now)
        reason = f"{best.replica} failed {best.failures} times in a row, the last time because {best.why}"
        return _reject(request, RejectCode.MODEL_UNAVAILABLE, reason, retry_after_s=wait_s)

    def _ahead(self, model: str) -> int:
        held = self._held.get(model)
        return (len(held) if held else 0) + sum(place.overflow for place in self._places_of(model))

    def _wait_s(self, model: str) -> float:
        """How long one more request of the model would wait: the queue ahead times the pace, over the replicas."""
        serving = sum(place.state is PlaceState.SERVING for place in self._places_of(model))
        return (self._ahead(model) + 1) * self._pace(model).mean_s / max(1, serving)

    def _choice(self, model: str) -> Place | None:
        serving = [place for place in self._places_of(model) if place.state is PlaceState.SERVING]
        if len(serving) < 2:
            return serving[0] if serving else None
        if self._costs is None:
            return min(serving, key=lambda place: (len(place.routed), place.replica))
        return min(serving, key=lambda place: (self._step_s(place), place.replica))

    def _step_s(self, place: Place) -> float:
        """How long a step would take there with one request more, and how much longer those of its neighbours."""
        assert self._costs is not None
        cost = self._costs.of(self._models[place.replica.model])
        demand = self._demand(place.replica.model)
        batch = len(place.routed) + 1
        context = round(batch * (demand.prompt_tokens + demand.output_tokens / 2))
        near = {p.replica for g in place.seat.gpu_ids for p in self._on_gpu[g] if p is not place and p.routed}
        engines = len(near) + 1
        harm = 0.0 if place.routed else len(near) * cost.step_s
        behind = place.overflow + 1 if batch > place.credits else 1
        return self._costs.slowdown(engines) * cost.decode_s(batch, context) * behind + harm

    def _hold(self, request: Request, now: float) -> None:
        self._held.setdefault(request.model, Fcfs()).push(request)
        self._held_since[request.request_id] = Held(request=request, since_s=now)
        if is_strict(request):
            self._strict[request.request_id] = deadline_s(request)

    def _unhold(self, request_id: str) -> Request | None:
        held = self._held_since.pop(request_id, None)
        self._strict.pop(request_id, None)
        return None if held is None else self._held[held.request.model].remove(request_id)

    def _route(self, request: Request, place: Place, now: float) -> Route:
        assert place.agent is not None and place.epoch is not None
        if not any(p.routed for p in self._places_of(request.model)):
            self._pace(request.model).begin(now)
        reason = f"{len(place.routed)} requests before it on {place.replica}, which takes {place.credits} at a time"
        place.routed[request.request_id] = Routed(request=request, epoch=place.epoch)
        self._where[request.request_id] = place.replica
        return Route(request=request, replica=place.replica, agent=place.agent, reason=reason)

    def _route_held(self, model: str, now: float) -> Iterator[Route]:
        held = self._held.get(model)
        while held and (place := self._choice(model)) is not None:
            request = held.pop(now)
            del self._held_since[request.request_id]
            self._strict.pop(request.request_id, None)
            yield self._route(request, place, now)

    def _forget(self, request_id: str) -> Routed | None:
        replica = self._where.pop(request_id, None)
        return None if replica is None else self._places[replica].routed.pop(request_id)

    def _cancelled(self, request_id: str) -> list[Action]:
        if self._unhold(request_id) is not None:
            return []
        replica = self._where.get(request_id)
        routed = self._forget(request_id)
        if replica is None or routed is None:
            return []
        return [self._abort(request_id, replica, routed.epoch, "its client left")]

    def _abort(self, request_id: str, replica: ReplicaId, epoch: Epoch, reason: str) -> Abort:
        return Abort(request_id=request_id, replica=replica, epoch=epoch, reason=reason)

    def _finished(self, event: RequestFinished, now: float) -> list[Action]:
        replica = self._where.get(event.request_id)
        if replica is None:
            return []
        place = self._places[replica]
        self._forget(event.request_id)
        if event.outcome in (Outcome.STOP, Outcome.LENGTH):
            if replica.model in self._demands:
                self._demands[replica.model].ended(event.output_tokens, now)
            serving = sum(p.state is PlaceState.SERVING for p in self._places_of(replica.model))
            self._pace(replica.model).end(now, serving)
            if event.replica == replica and event.epoch == place.epoch:
                place.prove()
        return []

    def _verdict(self, verdict: Reject | Requeue) -> list[Action]:
        """An agent has given a request up. It is passed on even if unknown: an earlier control may have routed it."""
        self._unhold(verdict.request_id)
        self._forget(verdict.request_id)
        return [verdict]

    # Replicas.

    def _ready(self, event: ReplicaReady, now: float) -> Iterator[Action]:
        agent = self._agent_in_life(event.epoch)
        place = self._places.get(event.replica)
        if agent is None or (place is not None and not place.believes(event.epoch)):
            return
        if place is None or place.state is PlaceState.LEAVING or self._owner(place.seat) != agent:
            if place is not None and place.state is PlaceState.LEAVING:
                place.epoch = event.epoch
            yield self._deactivate(event.replica, event.epoch, f"it serves on {agent}, and is not wanted there")
            return
        if place.state is PlaceState.SERVING and place.epoch == event.epoch:
            return
        if self._learns and self._costs is not None and place.state is PlaceState.LOADING:
            self._costs = refine.after_activation(self._costs, self._models[place.replica.model], event.load_s)
        place.serve(event.epoch, credits=event.credits, kv_tokens=event.kv_tokens, load_s=event.load_s, now=now)
        place.agent = agent
        self._note_due(place)
        self._review_soon(now)
        yield from self._route_held(event.replica.model, now)

    def _life_ended(
        self, replica: ReplicaId, epoch: Epoch, why: str, now: float, *, permanent: bool = False
    ) -> Iterator[Action]:
        place = self._places.get(replica)
        if place is None or place.agent is None or place.agent != self._agent_in_life(epoch) or not place.believes(epoch):
            return
        if place.state is PlaceState.LEAVING:
            yield from self._drop(place, why)
            yield from self._settle(replica.model, now)
            yield from self._start_absent(list(self._places.values()), now)
            yield from self._refuse_held(replica.model, now)
            self._review_soon(now)
            return
        place.end_life(epoch, why, now)
        if permanent:
            place.enter(PlaceState.FAILED, now)
        elif place.failures >= QUARANTINE_AFTER:
            place.enter(PlaceState.QUARANTINED, now, due_s=now + place.backoff_s)
        else:
            after = f"after failure {place.failures} in a row" if place.failures else "after its last life ended"
            yield self._activate(place, f"it is wanted, {after}: {why}", now)
        self._note_due(place)
        if not place.promising:
            yield from self._abandon(place, now)

    def _activate(self, place: Place, reason: str, now: float) -> Activate:
        place.enter(PlaceState.LOADING, now)
        self._note_due(place)
        model = self._models[place.replica.model]
        return Activate(model=model, seat=place.seat, reason=reason, alternatives=place.weighed)

    def _deactivate(self, replica: ReplicaId, epoch: Epoch, reason: str, weighed: tuple[Alternative, ...] = ()) -> Deactivate:
        model = self._models.get(replica.model)
        drain_s = model.drain_s if model else 0.0
        return Deactivate(replica=replica, epoch=epoch, drain_s=drain_s, reason=reason, alternatives=weighed)

    def _abandon(self, place: Place, now: float) -> Iterator[Action]:
        """Nobody waits for a replica that will not come: elsewhere if there is an elsewhere, else a clear end."""
        model = place.replica.model
        for request_id, routed in list(place.routed.items()):
            self._forget(request_id)
            yield self._abort(request_id, place.replica, routed.epoch, f"{place.replica} is given up: {place.why}")
            yield self._refusal(routed.request, now) or _requeue(
                routed.request, f"{place.replica} is given up: {place.why}", fault=True
            )
        yield from self._refuse_held(model, now)

    def _refuse_held(self, model: str, now: float) -> Iterator[Action]:
        places = self._places_of(model)
        if any(place.promising for place in places):
            return
        if self._policy.on_demand and not places and model in self._models:
            self._review_soon(now)
            return
        for request in list(self._held.get(model, ())):
            self._unhold(request.request_id)
            refusal = self._refusal(request, now)
            assert refusal is not None
            yield refusal

    # Models and what is wanted of them.

    def _registered(self, model: ModelSpec, now: float) -> Iterator[Action]:
        known = self._models.get(model.name)
        self._models[model.name] = model
        if known is not None and known != model:
            for place in self._places_of(model.name):
                if place.state in (PlaceState.FAILED, PlaceState.QUARANTINED):
                    place.failures = 0
                    self._await_agent(place, now)
        yield from self._settle(model.name, now)
        self._review_soon(now)

    def _removed(self, model: str, now: float) -> Iterator[Action]:
        if model not in self._models:
            return
        for place in self._places_of(model):
            if place.state is PlaceState.SERVING and place.epoch is not None:
                yield self._deactivate(place.replica, place.epoch, f"{model} was removed")
            if place.state in (PlaceState.SERVING, PlaceState.LOADING):
                place.enter(PlaceState.LEAVING, now)
                self._note_due(place)
        del self._models[model]
        for place in list(self._places_of(model)):
            if place.state is not PlaceState.LEAVING:
                yield from self._drop(place, f"{model} was removed")
        for request in list(self._held.get(model, ())):
            self._unhold(request.request_id)
            yield _reject(request, RejectCode.MODEL_NOT_FOUND, f"{model} was removed while the request waited")
        self._paces.pop(model, None)
        self._demands.pop(model, None)
        self._review_soon(now)

    def _settle(self, model: str, now: float, decision: Decision | None = None) -> Iterator[Action]:
        """Makes the places that are wanted for a registered model, and starts those whose agent is here."""
        if model not in self._models:
            return
        for seat in self._wanted.seats:
            if seat.replica.model == model and seat.replica not in self._places:
                place = Place(seat=seat, since_s=now)
                if decision is not None:
                    place.purpose = decision.reasons.get(seat.replica, "")
                    place.weighed = decision.alternatives.get(seat.replica, ())
                self._list(place)
                self._await_agent(place, now)
        yield from self._start_absent(self._places_of(model), now)

    def _list(self, place: Place) -> None:
        self._places[place.replica] = place
        for gpu_id in place.seat.gpu_ids:
            self._on_gpu.setdefault(gpu_id, []).append(place)
        self._by_model.setdefault(place.replica.model, []).append(place)

    def _await_agent(self, place: Place, now: float) -> None:
        place.agent = None
        place.enter(PlaceState.ABSENT, now, due_s=now + self._limits.agent_absence_s)
        self._note_due(place)

    def _start_absent(self, places: Iterable[Place], now: float) -> Iterator[Action]:
        for place in places:
            agent = self._owner(place.seat)
            if place.state is PlaceState.ABSENT and agent is not None and self._has_room(place):
                place.agent = agent
                reason = place.purpose or f"the placement wants it on GPUs {list(place.seat.gpu_ids)} of {agent}"
                yield self._activate(place, reason, now)

    def _has_room(self, place: Place) -> bool:
        """Whether it may start beside those that are leaving; what does not fit even without them is the agent's to refuse."""
        if self._costs is None:
            return True
        for gpu_id in place.seat.gpu_ids:
            there = [p for p in self._on_gpu[gpu_id] if p is not place and p.state is not PlaceState.ABSENT]
            if not any(p.state is PlaceState.LEAVING for p in there):
                continue
            models = [self._models[p.replica.model] for p in (*there, place) if p.replica.model in self._models]
            if sum(self._costs.resident_bytes(model) for model in models) > self._capacity_bytes(gpu_id):
                return False
        return True

    def _capacity_bytes(self, gpu_id: int) -> int:
        gpus = (gpu for agent in self._agents.values() for gpu in agent.gpus)
        return next((gpu.capacity_bytes - self._strangers.get(gpu_id, 0) for gpu in gpus if gpu.gpu_id == gpu_id), 0)

    def _could_fit(self, model: ModelSpec) -> bool:
        """Whether the GPUs that are here could hold it if they were empty. Without any, that is not known yet."""
        gpus = [gpu for agent in self._agents.values() if agent.present for gpu in agent.gpus]
        if self._costs is None or not gpus:
            return True
        return sum(gpu.capacity_bytes >= self._costs.resident_bytes(model) for gpu in gpus) >= model.tp_size

    def _drop(self, place: Place, why: str) -> Iterator[Action]:
        """The place is no more; whoever was still with it is sent back, or told that the model is gone."""
        for request_id, routed in list(place.routed.items()):
            self._forget(request_id)
            yield self._abort(request_id, place.replica, routed.epoch, why)
            if place.replica.model in self._models:
                yield _requeue(routed.request, why)
            else:
                yield _reject(routed.request, RejectCode.MODEL_NOT_FOUND, f"{place.replica.model} was removed")
        del self._places[place.replica]
        for gpu_id in place.seat.gpu_ids:
            self._on_gpu[gpu_id].remove(place)
        self._by_model[place.replica.model].remove(place)
        self._timed.discard(place.replica)

    # Agents.

    def _agent_joined(self, event: AgentJoined, now: float) -> Iterator[Action]:
        known = self._agents.get(event.agent)
        if known is not None:
            if event.agent_start < known.start or (event.agent_start == known.start and known.present):
                return
            if known.present:
                yield from self._agent_lost(AgentLost(agent=known.name, reason="it came back as a new process"), now)
            yield from self._give_up_routed(known, set(event.requests), "it was lost with its agent")
        self._agents[event.agent] = Agent(name=event.agent, start=event.agent_start, gpus=event.gpus, earlier=event.earlier)
        yield self._queue_by(event.agent)
        for orphan in known.orphans if known is not None else ():
            if orphan.request_id in event.requests:
                reason = "its agent was away, and it was sent to its front-end meanwhile"
                yield self._abort(orphan.request_id, orphan.replica, orphan.epoch, reason)
        yield from self._start_absent(list(self._places.values()), now)
        self._review_soon(now)

    def _agent_lost(self, event: AgentLost, now: float) -> Iterator[Action]:
        agent = self._agents.get(event.agent)
        if agent is None or not agent.present:
            return
        agent.present, agent.requests_due_s = False, now + self._limits.agent_return_s
        for place in [place for place in self._places.values() if place.agent == event.agent]:
            if place.state is PlaceState.LEAVING:
                yield from self._drop(place, event.reason)
                yield from self._settle(place.replica.model, now)
                yield from self._refuse_held(place.replica.model, now)
            elif place.state is not PlaceState.FAILED:
                self._await_agent(place, now)

    def _give_up_routed(self, agent: Agent, kept: set[str], reason: str) -> Iterator[Action]:
        """An agent's requests wait for it no longer, but for those that it still has; the others are brought again."""
        agent.requests_due_s = None
        lives = (agent.start, *agent.earlier)
        for place in self._places.values():
            for request_id, routed in list(place.routed.items()):
                if routed.epoch.agent_start in lives and request_id not in kept:
                    self._forget(request_id)
                    agent.orphans.append(Orphan(request_id=request_id, replica=place.replica, epoch=routed.epoch))
                    yield _requeue(routed.request, f"{place.replica}: {reason}", fault=True)

    def _gpu_lost(self, event: GpuLost, now: float) -> Iterator[Action]:
        """What has a rank there is lost; it waits for nobody, and goes elsewhere if its policy finds a place."""
        agent = next((a for a in self._agents.values() if any(gpu.gpu_id == event.gpu_id for gpu in a.gpus)), None)
        if agent is None:
            return
        agent.gpus = tuple(gpu for gpu in agent.gpus if gpu.gpu_id != event.gpu_id)
        why = f"GPU {event.gpu_id} is lost: {event.reason}"
        for place in list(self._on_gpu.get(event.gpu_id, [])):
            if place.state is PlaceState.LEAVING:
                yield from self._drop(place, why)
                yield from self._settle(place.replica.model, now)
            elif self._policy.on_demand:
                self._wanted = Placement(tuple(seat for seat in self._wanted.seats if seat.replica != place.replica))
                yield from self._drop(place, why)
            else:
                if place.epoch is not None:
                    place.ended = place.epoch
                place.agent, place.why = None, why
                place.enter(PlaceState.ABSENT, now)
                self._note_due(place)
                yield from self._abandon(place, now)
            yield from self._refuse_held(place.replica.model, now)
        self._review_soon(now)

    def _owner(self, seat: Seat) -> str | None:
        """The agent that is here and has every GPU of the seat."""
        wanted = set(seat.gpu_ids)
        owners = (a.name for a in self._agents.values() if a.present and wanted <= {gpu.gpu_id for gpu in a.gpus})
        return next(owners, None)

    def _agent_in_life(self, epoch: Epoch) -> str | None:
        """The agent that is here and minted the epoch in its present life."""
        lives = (a for a in self._agents.values() if a.present)
        return next((a.name for a in lives if epoch.agent_start in (a.start, *a.earlier)), None)

    # Policies.

    def _policy_chosen(self, event: PolicyChosen, now: float) -> Iterator[Action]:
        """Another policy goes on from what stands. Only `static` knows where the file put things, and goes back to it."""
        before = self.local
        if event.local is not None:
            self._local = _local_named(event.local)
        if event.policy is not None:
            self._policy = policy_named(event.policy)
            self._review_s = now
        if self.local != before:
            for agent in self._agents.values():
                if agent.present:
                    yield self._queue_by(agent.name)

    def _queue_by(self, agent: str) -> QueueBy:
        return QueueBy(agent=agent, local=self.local, reason=f"requests go by {self.local} under {self._policy.name}")

    def _learn_steps(self, event: StepsTimed) -> None:
        place, model = self._places.get(event.replica), self._models.get(event.replica.model)
        if not self._learns or self._costs is None or place is None or model is None or place.epoch != event.epoch:
            return
        near = {p.replica for g in place.seat.gpu_ids for p in self._on_gpu[g] if p is not place and p.routed}
        self._costs = refine.after_steps(self._costs, model, event, self._costs.slowdown(1 + len(near)))

    def _review_soon(self, now: float) -> None:
        if not self._policy.on_demand or not any(agent.present for agent in self._agents.values()):
            return
        soon = now if self._reviewed_s is None else max(now, self._reviewed_s + SOON_S)
        self._review_s = soon if self._review_s is None else min(self._review_s, soon)

    def _review(self, now: float) -> list[Action]:
        """Asks the policy, and makes what it wants what is wanted."""
        self._reviewed_s, self._review_s = now, None
        if self._costs is None:
            if self._policy.on_demand:
                raise ConfigError.single("policy", f"{self._policy.name} needs a cost table")
            decision = Decision(placement=self._filed, again_s=math.inf)
        else:
            question = Question(
                snapshot=self._free_of_strangers(self.snapshot(now)),
                filed=self._filed,
                wanted=self._wanted,
                costs=self._costs,
                warm=self._warm,
            )
            decision = self._policy.decide(question)
        if math.isfinite(decision.again_s):
            self._review_s = now + max(SOON_S, decision.again_s)
        return list(self._want(decision, now))

    def _free_of_strangers(self, snapshot: Snapshot) -> Snapshot:
        """GPUs as large as what others leave of them."""
        if not any(self._strangers.values()):
            return snapshot
        gpus = (
            replace(gpu, capacity_bytes=max(0, gpu.capacity_bytes - self._strangers.get(gpu.gpu_id, 0)))
            for gpu in snapshot.gpus
        )
        return replace(snapshot, gpus=tuple(gpus))

    def _want(self, decision: Decision, now: float) -> Iterator[Action]:
        change = decision.placement.diff(self._wanted)
        self._wanted = decision.placement
        for seat in change.stop:
            reason = decision.reasons.get(seat.replica, f"the {self._policy.name} policy wants it elsewhere")
            yield from self._unwant(seat.replica, reason, now, decision.alternatives.get(seat.replica, ()))
        for seat in change.resize:
            if seat.replica in self._places:
                self._places[seat.replica].seat = seat
        for model in dict.fromkeys(seat.replica.model for seat in change.start):
            yield from self._settle(model, now, decision)
        for model in [model for model, queue in self._held.items() if len(queue)]:
            yield from self._refuse_held(model, now)  # `static` gives some of them no place

    def _unwant(self, replica: ReplicaId, reason: str, now: float, weighed: tuple[Alternative, ...] = ()) -> Iterator[Action]:
        place = self._places.get(replica)
        if place is None or place.state is PlaceState.LEAVING:
            return
        if place.state is PlaceState.SERVING and place.epoch is not None:
            yield self._deactivate(replica, place.epoch, reason, weighed)
            place.enter(PlaceState.LEAVING, now)
            self._note_due(place)
        elif place.state is PlaceState.LOADING:
            place.enter(PlaceState.LEAVING, now)  # it is taken down once it has come up and so named its life
            self._note_due(place)
        else:
            yield from self._drop(place, reason)

    # The operator's word. It holds until the policy decides anew, which goes on from what then stands.

    def _load_wanted(self, event: LoadWanted, now: float) -> Iterator[Action]:
        model = self._models.get(event.replica.model)
        if model is None:
            reason = f"no model is registered as {event.replica.model}"
            yield _refuse_order(event, RejectCode.MODEL_NOT_FOUND, reason)
            return
        seat = self._seat_for(event, model)
        if seat is None:
            where = f"GPUs {list(event.gpu_ids)}" if event.gpu_ids else f"{model.tp_size} GPUs"
            yield _refuse_order(event, RejectCode.MODEL_UNAVAILABLE, f"no agent is here with {where} for {event.replica}")
            return
        place = self._places.get(event.replica)
        if place is not None and place.state in (PlaceState.FAILED, PlaceState.QUARANTINED):
            place.failures = 0
            self._await_agent(place, now)
        others = [other for other in self._wanted.seats if other.replica != event.replica]
        decision = Decision(placement=Placement((*others, seat)), reasons={event.replica: "the operator wants it loaded"})
        yield from self._want(decision, now)
        yield from self._settle(event.replica.model, now, decision)

    def _unload_wanted(self, event: UnloadWanted, now: float) -> Iterator[Action]:
        if event.model not in self._models:
            yield _refuse_order(event, RejectCode.MODEL_NOT_FOUND, f"no model is registered as {event.model}")
            return
        leaving = [
            seat.replica
            for seat in self._wanted.seats
            if seat.replica.model == event.model and event.index in (None, seat.replica.index)
        ]
        placement = Placement(tuple(seat for seat in self._wanted.seats if seat.replica not in leaving))
        reasons = dict.fromkeys(leaving, "the operator wants it unloaded")
        for action in self._want(Decision(placement=placement, reasons=reasons), now):
            if isinstance(action, Deactivate) and event.drain_s is not None:
                yield replace(action, drain_s=event.drain_s)
            else:
                yield action

    def _seat_for(self, event: LoadWanted, model: ModelSpec) -> Seat | None:
        """Where the operator says; else where it is wanted or was filed; else on the emptiest GPUs of one agent."""
        known = [seat for seat in (*self._wanted.seats, *self._filed.seats) if seat.replica == event.replica]
        kv_limit = event.kv_limit_bytes if event.kv_limit_bytes or not known else known[0].kv_limit_bytes
        gpu_ids = event.gpu_ids or (known[0].gpu_ids if known else self._emptiest(model.tp_size))
        seat = Seat(replica=event.replica, gpu_ids=gpu_ids, kv_limit_bytes=kv_limit)
        return seat if len(gpu_ids) == model.tp_size and self._owner(seat) is not None else None

    def _emptiest(self, count: int) -> tuple[int, ...]:
        free = {gpu.gpu_id: gpu.capacity_bytes for agent in self._agents.values() if agent.present for gpu in agent.gpus}
        for seat in self._wanted.seats:
            for gpu_id in seat.gpu_ids:
                if gpu_id in free and seat.replica.model in self._models:
                    free[gpu_id] -= self._models[seat.replica.model].weight_bytes
        groups = [
            sorted(agent.gpus, key=lambda gpu: (-free[gpu.gpu_id], gpu.gpu_id))[:count]
            for agent in self._agents.values()
            if agent.present and len(agent.gpus) >= count
        ]
        best = max(groups, key=lambda group: sum(free[gpu.gpu_id] for gpu in group), default=[])
        return tuple(gpu.gpu_id for gpu in best)

    # Time.

    def _woke(self, now: float) -> Iterator[Action]:
        self._wake_s = None
        for replica in sorted(self._timed):
            place = self._places[replica]
            if place.due_s is not None and place.due_s <= now:
                yield from self._due(place, now)
        for agent in self._agents.values():
            if agent.requests_due_s is not None and agent.requests_due_s <= now:
                yield from self._give_up_routed(agent, set(), "its agent was lost and has not come back")
        for request_id in [i for i, due_s in self._strict.items() if due_s <= now]:
            request = self._unhold(request_id)
            assert request is not None
            reason = f"no replica of {request.model} was ready within {request.slo.ttft_s or 0.0:g} s"
            start_s = self._start_s(request.model, now)
            yield _reject(request, RejectCode.SLO_UNATTAINABLE, reason, retry_after_s=start_s)
        while self._held_since:
            held = next(iter(self._held_since.values()))
            if held.since_s + self._limits.hold_s > now:
                break
            self._unhold(held.request.request_id)
            reason = f"no replica of {held.request.model} was ready within {self._limits.hold_s:g} s"
            yield _reject(held.request, RejectCode.QUEUE_TIMEOUT, reason, retry_after_s=self._wait_s(held.request.model))

    def _due(self, place: Place, now: float) -> Iterator[Action]:
        if place.state is PlaceState.QUARANTINED:
            yield self._activate(place, f"tried again after {place.failures} failures in a row, the last: {place.why}", now)
            return
        place.due_s = None
        self._note_due(place)
        if self._policy.on_demand:  # it may have a place elsewhere
            seats = (seat for seat in self._wanted.seats if seat.replica != place.replica)
            self._wanted = Placement(tuple(seats))
            yield from self._drop(place, f"no agent with its GPUs has been here for {self._limits.agent_absence_s:g} s")
            self._review_soon(now)
        yield from self._refuse_held(place.replica.model, now)

    def _note_due(self, place: Place) -> None:
        if place.due_s is None:
            self._timed.discard(place.replica)
        else:
            self._timed.add(place.replica)

    def _next_wake(self) -> WakeAt | None:
        dues = [due for replica in self._timed if (due := self._places[replica].due_s) is not None]
        if self._held_since:
            dues.append(next(iter(self._held_since.values())).since_s + self._limits.hold_s)
        if self._review_s is not None:
            dues.append(self._review_s)
        dues += [agent.requests_due_s for agent in self._agents.values() if agent.requests_due_s is not None]
        if self._strict:
            dues.append(min(self._strict.values()))
        soonest = min(dues, default=None)
        if soonest is None or (self._wake_s is not None and self._wake_s <= soonest):
            return None  # To be woken too early costs nothing.
        self._wake_s = soonest
        return WakeAt(at_s=soonest, reason=f"{len(self._timed)} replicas and {len(self._held_since)} held requests have a term")

    # Small readings.

    def _places_of(self, model: str) -> list[Place]:
        return self._by_model.get(model, [])

    def _pace(self, model: str) -> Pace:
        return self._paces.setdefault(model, Pace())

    def _demand(self, model: str) -> Counter:
        return self._demands.setdefault(model, Counter())

    # Memory.

    def state(self) -> ControlState:
        state = ControlState(
            wanted=self._wanted,
            limits=self._limits,
            models=tuple(self._models.values()),
            agents=tuple(self._agents.values()),
            places=tuple(self._places.values()),
            held=tuple(self._held_since.values()),
            paces=self._paces,
            wake_s=self._wake_s,
            filed=self._filed,
            policy=self._policy.name,
            costs=self._costs,
            warm=self._warm,
            demands=self._demands,
            review_s=self._review_s,
            reviewed_s=self._reviewed_s,
            local=self._local,
            learns=self._learns,
            strangers=self._strangers,
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
        scheduler._strangers = state.strangers
        scheduler._wanted = state.wanted
        scheduler._demands = state.demands
        scheduler._review_s = state.review_s
        scheduler._reviewed_s = state.reviewed_s
        scheduler._models = {model.name: model for model in state.models}
        scheduler._agents = {agent.name: agent for agent in state.agents}
        scheduler._paces = state.paces
        scheduler._wake_s = state.wake_s
        for held in state.held:
            scheduler._hold(held.request, held.since_s)
        for place in state.places:
            scheduler._list(place)
            scheduler._note_due(place)
            scheduler._where.update(dict.fromkeys(place.routed, place.replica))
        return scheduler

    def check(self) -> None:
        """Raises if an invariant of this module does not hold."""
        routed = [request_id for place in self._places.values() for request_id in place.routed]
        assert len(routed) == len(set(routed)) == len(self._where), "a request is with two places, or with none"
        assert not self._where.keys() & self._held_since.keys(), "a request is held and routed"
        assert all(i in self._places[replica].routed for i, replica in self._where.items()), "a request is not where it is said"
        held = [request.request_id for queue in self._held.values() for request in queue]
        assert sorted(held) == sorted(self._held_since), "the held requests are listed in two ways"
        for model, queue in self._held.items():
            places = self._places_of(model)
            on_demand = self._policy.on_demand and not places and model in self._models
            assert not len(queue) or on_demand or any(p.promising for p in places), (
                f"a request waits for {model}, which will not come"
            )
            assert not len(queue) or all(p.state is not PlaceState.SERVING for p in places), (
                f"{model} serves, and is waited for"
            )
        for place in self._places.values():
            assert (place.due_s is not None) == (place.replica in self._timed), f"{place.replica} is due without a time"
            if place.state is PlaceState.SERVING:
                assert place.epoch is not None and place.agent == self._agent_in_life(place.epoch), f"{place.replica} is stale"
            assert place.ended is None or place.epoch is None or place.epoch > place.ended, f"{place.replica} lives twice"


def _copy(state: ControlState) -> ControlState:
    """Through its own written form, so what is remembered is exactly what a log can hold."""
    return msgspec.json.decode(msgspec.json.encode(state), type=ControlState)


def _reject(
    request: Request,
    code: RejectCode,
    reason: str,
    *,
    retry_after_s: float | None = None,
    queue_position: int | None = None,
) -> Reject:
    return Reject(
        request_id=request.request_id,
        front=request.front,
        code=code,
        retry_after_s=retry_after_s,
        queue_position=queue_position,
        reason=reason,
    )


def _refuse_order(order: LoadWanted | UnloadWanted, code: RejectCode, reason: str) -> Reject:
    return Reject(request_id=order.order, front=order.front, code=code, reason=reason)


def _requeue(request: Request, reason: str, *, fault: bool = False) -> Requeue:
    return Requeue(request_id=request.request_id, front=request.front, reason=reason, fault=fault)


def _local_named(local: str | None) -> str | None:
    if local is not None and local not in (*LOCAL_POLICIES, BY_POLICY):
        raise ConfigError.single("local", f"there is no order {local!r}; there are {', '.join(LOCAL_POLICIES)} and {BY_POLICY}")
    return local

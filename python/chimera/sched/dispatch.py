"""The dispatcher: holds each request until a replica of its model serves, and says which replica it goes to.

Owns every request between its arrival and its end: it is held, or with one place, or gone; one that is held waits for
something with a known end. Knows requests by their measure, and which of them may have been served partly: those go back to
their front-end to be brought again. Does not know why a replica is wanted, queues of GPUs, pages, or tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import msgspec

from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.core.snapshot import Demand
from chimera.msg.actions import Abort, Action, Reject, RejectCode, Requeue, Route
from chimera.msg.events import ANSWERED, RequestFinished
from chimera.sched.cost import CostTable, EngineCost
from chimera.sched.demand import Counter
from chimera.sched.fleet import Fleet, Orphan
from chimera.sched.places import Place, PlaceState, Routed
from chimera.sched.queues import Fcfs, Queue, deadline_s, is_strict

FIRST_PACE_S = 1.0
"""Seconds from one end to the next on one replica, until the first has been seen."""
PACE_MEMORY = 0.9
CROWD = 8
"""So many requests at one replica, and each doubling of it, are news for the policy."""


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


class Dispatcher:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.demands: dict[str, Counter] = {}
        self.paces: dict[str, Pace] = {}
        self._queues: dict[str, Queue] = {}
        """The held requests of each model that somebody waits for; none is empty."""
        self._held: OrderedDict[str, Held] = OrderedDict()
        """All that is held, the longest-held first."""
        self._strict: dict[str, float] = {}
        """Of the held, those that would rather be turned away than be late, and when they are."""
        self._where: dict[str, ReplicaId] = {}
        """The place that a routed request is with."""

    # What others ask.

    def holds(self, request_id: str) -> bool:
        return request_id in self._held

    def held(self) -> tuple[Held, ...]:
        return tuple(self._held.values())

    def waiting(self) -> dict[str, int]:
        """How many are held, of each model that somebody waits for."""
        return {model: len(queue) for model, queue in self._queues.items()}

    def waiting_for(self, model: str) -> int:
        return len(self._queues.get(model, ()))

    def waiting_since(self) -> dict[str, float]:
        """Since when the first of them waits, of each model that somebody waits for."""
        return {model: self._held[next(iter(queue)).request_id].since_s for model, queue in self._queues.items()}

    @property
    def holding(self) -> int:
        """How many are held in all."""
        return len(self._held)

    def standing(self, request_id: str, now: float) -> tuple[int, float, str] | None:
        """Of one that is held: its place in the queue, how long until its turn as far as can be told, and what it waits for."""
        held = self._held.get(request_id)
        if held is None:
            return None
        model = held.request.model
        ahead = sum(other.arrived_s < held.request.arrived_s for other in self._queues[model])
        wait_s = self._start_s(model, now) + ahead * self._pace(model).mean_s
        return ahead + 1, wait_s, self._why_it_waits(model, now)

    def _why_it_waits(self, model: str, now: float) -> str:
        states = {place.state: place for place in self._fleet.places_of(model)}
        if (place := states.get(PlaceState.LOADING)) is not None:
            return f"{model} has been loading for {now - place.since_s:.1f} s"
        if PlaceState.LEAVING in states:
            return f"{model} leaves where it was, to come back"
        return f"{model} waits for a place"

    def demand(self, model: str, now: float) -> Demand | None:
        counter = self.demands.get(model)
        if counter is None:
            return None
        placed = sum([len(place.routed) for place in self._fleet.places_of(model)])
        queue = self._queues.get(model)
        waiting, waited_s = (0, 0.0) if queue is None else (len(queue), now - queue.turn(now)[1])
        return counter.view(now, waiting=waiting, waited_s=waited_s, open=placed)

    def demand_views(self, now: float, models: Iterable[str] | None = None) -> dict[str, Demand]:
        """Of those models, or of all; who was never asked for is left out."""
        known = self.demands if models is None else models
        return {model: demand for model in known if (demand := self.demand(model, now)) is not None}

    def requests_of(self, front: str) -> list[str]:
        held = [h.request.request_id for h in self._held.values() if h.request.front == front]
        places = self._fleet.places.values()
        return [*held, *(i for place in places for i, r in place.routed.items() if r.request.front == front)]

    # A request comes and goes.

    def arrived(self, request: Request, now: float) -> list[Action]:
        if request.request_id in self._where or request.request_id in self._held:
            return []
        if request.model in self._fleet.models:
            self._demand(request.model).came(request, now)
        refusal = self._refusal(request, now)
        if refusal is not None:
            return [refusal]
        place = self._choice(request.model)
        if place is None:
            late = self._unattainable(request, now)
            if late is not None:
                return [late]
            self.hold(request, now)
            if not self._fleet.places_of(request.model):
                self._fleet.stirred_models.add(request.model)
            return []
        route = self._route(request, place, now)
        crowd = len(place.routed)
        if crowd >= CROWD and crowd & (crowd - 1) == 0:  # twice as many as when it was last asked for this
            self._fleet.crowded_models.add(request.model)
        return [route]

    def cancelled(self, request_id: str) -> list[Action]:
        if self._unhold(request_id) is not None:
            return []
        replica = self._where.get(request_id)
        routed = self._forget(request_id)
        if replica is None or routed is None:
            return []
        return [_abort(request_id, replica, routed.epoch, "its client left")]

    def finished(self, event: RequestFinished, now: float) -> list[Action]:
        replica = self._where.pop(event.request_id, None)
        if replica is None:
            return []
        place = self._fleet.places[replica]
        del place.routed[event.request_id]
        if event.outcome in ANSWERED:
            demand = self.demands.get(replica.model)
            if demand is not None:
                demand.ended(event.output_tokens, now)
            self._pace(replica.model).end(now, len(self._fleet.serving(replica.model)))
            if event.replica == replica and event.epoch == place.epoch:
                place.prove()
        return []

    def verdict(self, verdict: Reject | Requeue) -> list[Action]:
        """An agent has given a request up. It is passed on even if unknown: an earlier control may have routed it."""
        self._unhold(verdict.request_id)
        self._forget(verdict.request_id)
        return [verdict]

    # Why it cannot even wait.

    def _refusal(self, request: Request, now: float) -> Reject | None:
        fleet, model = self._fleet, request.model
        if model not in fleet.models:
            return _reject(request, RejectCode.MODEL_NOT_FOUND, f"no model is registered as {model}")
        places = fleet.places_of(model)
        if not places and not fleet.policy.on_demand:
            reason = f"{model} is registered, and the placement gives it no GPU: load it, or choose another policy than static"
            return _reject(request, RejectCode.MODEL_NOT_LOADED, reason)
        if not places and not fleet.could_fit(fleet.models[model]):
            return _reject(request, RejectCode.MODEL_UNAVAILABLE, f"{model} fits on none of the GPUs that are here")
        if places and not any(place.promising for place in places):
            return self._hopeless(request, places, now)
        if request.tries == 0 and (ahead := self._ahead(model)) >= fleet.limits.queue_per_model:
            wait_s = self._wait_s(model)
            reason = f"{ahead} requests for {model} wait already ({len(fleet.serving(model))} replicas, about {wait_s:.1f} s)"
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
        costs, models = self._fleet.costs, self._fleet.models
        load_s = 0.0 if costs is None or model not in models else costs.of(models[model]).activation_s
        coming = [
            max(0.0, place.since_s + (place.load_s or load_s) - now)
            for place in self._fleet.places_of(model)
            if place.state is PlaceState.LOADING
        ]
        return min(coming, default=load_s)

    def _hopeless(self, request: Request, places: list[Place], now: float) -> Reject:
        """Nothing that is wanted for this model will serve soon; the likeliest of its places says why."""
        best = min(places, key=lambda place: (place.state is PlaceState.FAILED, place.due_s or now, place.replica))
        if best.state is PlaceState.ABSENT and best.why:
            return _reject(request, RejectCode.MODEL_UNAVAILABLE, f"{best.replica} has no place: {best.why}")
        if best.state is PlaceState.ABSENT:
            away_s = self._fleet.limits.agent_absence_s
            reason = f"no agent with GPUs {list(best.seat.gpu_ids)} has been here for {away_s:g} s"
            return _reject(request, RejectCode.AGENT_LOST, reason, retry_after_s=away_s)
        if best.state is PlaceState.FAILED:
            return _reject(request, RejectCode.MODEL_UNAVAILABLE, f"{best.replica} cannot be brought up: {best.why}")
        wait_s = best.retry_after_s(now)
        reason = f"{best.replica} failed {best.failures} times in a row, the last time because {best.why}"
        return _reject(request, RejectCode.MODEL_UNAVAILABLE, reason, retry_after_s=wait_s)

    def _ahead(self, model: str) -> int:
        """Those held, and those handed over that their engines cannot have taken yet."""
        handed = [len(place.routed) - place.credits for place in self._fleet.places_of(model)]
        return self.waiting_for(model) + sum([over for over in handed if over > 0])

    def _wait_s(self, model: str) -> float:
        """How long one more request of the model would wait: the queue ahead times the pace, over the replicas."""
        return (self._ahead(model) + 1) * self._pace(model).mean_s / max(1, len(self._fleet.serving(model)))

    # Which replica.

    def _choice(self, model: str) -> Place | None:
        serving = self._fleet.serving(model)
        if len(serving) < 2:
            return serving[0] if serving else None
        costs, cost = self._fleet.costs, self._fleet.price_of(model)
        if costs is None or cost is None:
            return min(serving, key=lambda place: (len(place.routed), place.replica))
        demand = self._demand(model)
        tokens = demand.prompt_tokens + demand.output_tokens / 2
        return min([(self._step_s(place, tokens, costs, cost), place.seat.replica, place) for place in serving])[2]

    def _step_s(self, place: Place, tokens: float, costs: CostTable, cost: EngineCost) -> float:
        """How long a step would take there with one request more, and how much longer those of its neighbours."""
        batch = len(place.routed) + 1
        context = round(batch * tokens)
        near = self._fleet.at_work_beside(place)
        harm = 0.0 if place.routed else near * cost.step_s
        behind = max(1, batch - place.credits)
        return costs.slowdown(near + 1) * cost.decode_s(batch, context) * behind + harm

    def _route(self, request: Request, place: Place, now: float) -> Route:
        assert place.agent is not None and place.epoch is not None
        if not place.routed and not any(p.routed for p in self._fleet.places_of(request.model)):
            self._pace(request.model).begin(now)
        replica, routed = place.seat.replica, place.routed
        reason = f"{len(routed)} requests before it on {replica}, which takes {place.credits} at a time"
        routed[request.request_id] = Routed(request=request, epoch=place.epoch)
        self._where[request.request_id] = replica
        return Route(request=request, replica=replica, agent=place.agent, reason=reason)

    # Those that wait.

    def hold(self, request: Request, now: float) -> None:
        self._queues.setdefault(request.model, Fcfs()).push(request)
        self._held[request.request_id] = Held(request=request, since_s=now)
        if is_strict(request):
            self._strict[request.request_id] = deadline_s(request)

    def _unhold(self, request_id: str) -> Request | None:
        held = self._held.pop(request_id, None)
        if held is None:
            return None
        self._strict.pop(request_id, None)
        self._queues[held.request.model].remove(request_id)
        self._forget_queue(held.request.model)
        return held.request

    def _forget_queue(self, model: str) -> None:
        if not self._queues[model]:
            del self._queues[model]

    def route_held(self, model: str, now: float) -> Iterator[Route]:
        while model in self._queues and (place := self._choice(model)) is not None:
            request = self._queues[model].pop(now)
            self._forget_queue(model)
            del self._held[request.request_id]
            self._strict.pop(request.request_id, None)
            yield self._route(request, place, now)

    def refuse_held(self, model: str, now: float, *, insist: bool = True) -> Iterator[Action]:
        """Nobody waits for a model that will not come. The policy hears of it soon if it may come, and somebody insists."""
        fleet, places = self._fleet, self._fleet.places_of(model)
        if any(place.promising for place in places):
            return
        if fleet.policy.on_demand and not places and model in fleet.models:
            if insist:
                fleet.stirred_models.add(model)
            return
        for request in list(self._queues.get(model, ())):
            self._unhold(request.request_id)
            refusal = self._refusal(request, now)
            assert refusal is not None
            yield refusal

    def due_s(self) -> float | None:
        """When something has to be said to those that wait."""
        if not self._held:
            return None
        longest_s = next(iter(self._held.values())).since_s + self._fleet.limits.hold_s
        return min(longest_s, *self._strict.values()) if self._strict else longest_s

    def end_waiting(self, now: float) -> Iterator[Action]:
        """For those whose time is up."""
        for request_id in [i for i, due_s in self._strict.items() if due_s <= now]:
            request = self._unhold(request_id)
            assert request is not None
            reason = f"no replica of {request.model} was ready within {request.slo.ttft_s or 0.0:g} s"
            start_s = self._start_s(request.model, now)
            yield _reject(request, RejectCode.SLO_UNATTAINABLE, reason, retry_after_s=start_s)
        hold_s = self._fleet.limits.hold_s
        while self._held:
            held = next(iter(self._held.values()))
            if held.since_s + hold_s > now:
                break
            self._unhold(held.request.request_id)
            reason = f"no replica of {held.request.model} was ready within {hold_s:g} s"
            yield _reject(held.request, RejectCode.QUEUE_TIMEOUT, reason, retry_after_s=self._wait_s(held.request.model))

    # What becomes of requests when something else goes.

    def give_back(self, place: Place, why: str) -> Iterator[Action]:
        """The place is no more: whoever was still with it is sent back, or told that the model is gone."""
        for request, epoch in self._taken_from(place):
            yield _abort(request.request_id, place.replica, epoch, why)
            if request.model in self._fleet.models:
                yield _requeue(request, why)
            else:
                yield _reject(request, RejectCode.MODEL_NOT_FOUND, f"{request.model} was removed")

    def abandon(self, place: Place, now: float) -> Iterator[Action]:
        """Nobody waits for a replica that will not come: elsewhere if there is an elsewhere, else a clear end."""
        why = f"{place.replica} is given up: {place.why}"
        for request, epoch in self._taken_from(place):
            yield _abort(request.request_id, place.replica, epoch, why)
            yield self._refusal(request, now) or _requeue(request, why, fault=True)
        yield from self.refuse_held(place.replica.model, now)

    def _taken_from(self, place: Place) -> Iterator[tuple[Request, Epoch]]:
        for request_id, routed in list(place.routed.items()):
            self._forget(request_id)
            yield routed.request, routed.epoch

    def orphan(self, lives: tuple[int, ...], kept: set[str], reason: str) -> Iterator[tuple[Orphan, Requeue]]:
        """What was with those lives of an agent, but for what it still has, is brought again."""
        for place in self._fleet.places.values():
            for request_id, routed in list(place.routed.items()):
                if routed.epoch.agent_start in lives and request_id not in kept:
                    self._forget(request_id)
                    orphan = Orphan(request_id=request_id, replica=place.replica, epoch=routed.epoch)
                    yield orphan, _requeue(routed.request, f"{place.replica}: {reason}", fault=True)

    def end_model(self, model: str) -> Iterator[Action]:
        """The model was removed while requests waited for it."""
        for request in list(self._queues.get(model, ())):
            self._unhold(request.request_id)
            yield _reject(request, RejectCode.MODEL_NOT_FOUND, f"{model} was removed while the request waited")
        self.paces.pop(model, None)
        self.demands.pop(model, None)

    # Small readings.

    def _forget(self, request_id: str) -> Routed | None:
        replica = self._where.pop(request_id, None)
        return None if replica is None else self._fleet.places[replica].routed.pop(request_id)

    def _pace(self, model: str) -> Pace:
        pace = self.paces.get(model)
        if pace is None:
            pace = self.paces[model] = Pace()
        return pace

    def _demand(self, model: str) -> Counter:
        demand = self.demands.get(model)
        if demand is None:
            demand = self.demands[model] = Counter()
        return demand

    # Memory.

    def revive(self, held: tuple[Held, ...], demands: dict[str, Counter], paces: dict[str, Pace]) -> None:
        """Goes on from what an earlier dispatcher remembered; the fleet has its places already."""
        self.demands, self.paces = demands, paces
        for one in held:
            self.hold(one.request, one.since_s)
        for place in self._fleet.places.values():
            self._where.update(dict.fromkeys(place.routed, place.replica))

    def check(self) -> None:
        """Raises if an invariant of this module does not hold."""
        fleet = self._fleet
        routed = [request_id for place in fleet.places.values() for request_id in place.routed]
        assert len(routed) == len(set(routed)) == len(self._where), "a request is with two places, or with none"
        assert not self._where.keys() & self._held.keys(), "a request is held and routed"
        assert all(i in fleet.places[replica].routed for i, replica in self._where.items()), "a request is not where it is said"
        held = [request.request_id for queue in self._queues.values() for request in queue]
        assert sorted(held) == sorted(self._held), "the held requests are listed in two ways"
        for model in self.waiting():
            places = fleet.places_of(model)
            on_demand = fleet.policy.on_demand and not places and model in fleet.models
            assert on_demand or any(p.promising for p in places), f"a request waits for {model}, which will not come"
            assert all(p.state is not PlaceState.SERVING for p in places), f"{model} serves, and is waited for"


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


def _requeue(request: Request, reason: str, *, fault: bool = False) -> Requeue:
    return Requeue(request_id=request.request_id, front=request.front, reason=reason, fault=fault)


def _abort(request_id: str, replica: ReplicaId, epoch: Epoch, reason: str) -> Abort:
    return Abort(request_id=request_id, replica=replica, epoch=epoch, reason=reason)

"""The lives of wanted replicas: brings up what is wanted where its agent is, and follows how far each has come.

Knows agents by name and life, and replicas by epoch, which it never invents; news of a life that is over changes nothing.
Requests of a place that is no more are the dispatcher's to give back. Does not know why a replica is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.record import Alternative
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Abort, Action, Activate, Deactivate, QueueBy, Resize
from chimera.msg.events import AgentJoined, AgentLost, GpuLost, ReplicaReady, StepsTimed
from chimera.sched import refine
from chimera.sched.dispatch import Dispatcher
from chimera.sched.fleet import Agent, Fleet
from chimera.sched.places import QUARANTINE_AFTER, Place, PlaceState
from chimera.sched.policies.policy import Decision


class Lives:
    """One that `learns` corrects the cost table by what it sees."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, *, learns: bool) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self.learns = learns

    # What replicas tell.

    def ready(self, event: ReplicaReady, now: float) -> Iterator[Action]:
        fleet = self._fleet
        agent = fleet.agent_in_life(event.epoch)
        place = fleet.places.get(event.replica)
        if agent is None or (place is not None and not place.believes(event.epoch)):
            return
        if place is None or place.state is PlaceState.LEAVING or fleet.owner(place.seat) != agent:
            if place is not None and place.state is PlaceState.LEAVING:
                place.epoch = event.epoch
            yield self._deactivate(event.replica, event.epoch, f"it serves on {agent}, and is not wanted there")
            return
        if place.state is PlaceState.SERVING and place.epoch == event.epoch:
            return
        if self.learns and fleet.costs is not None and place.state is PlaceState.LOADING:
            fleet.costs = refine.after_activation(fleet.costs, fleet.models[place.replica.model], event.load_s)
        place.serve(event.epoch, credits=event.credits, kv_tokens=event.kv_tokens, load_s=event.load_s, now=now)
        place.agent = agent
        fleet.note_due(place)
        fleet.stirred_models.add(event.replica.model)
        limit, goes_on = place.seat.kv_limit_bytes, event.epoch.agent_start != fleet.agents[agent].start
        if limit != place.most_kv_bytes or (goes_on and limit is not None):  # an agent knows what it came up with, no more
            yield from self._limit(place, "so much KV memory is wanted for it")
        yield from self._dispatcher.route_held(event.replica.model, now)

    def ended(self, replica: ReplicaId, epoch: Epoch, why: str, now: float, *, permanent: bool = False) -> Iterator[Action]:
        fleet = self._fleet
        place = fleet.places.get(replica)
        if place is None or place.agent is None or place.agent != fleet.agent_in_life(epoch) or not place.believes(epoch):
            return
        if place.state is PlaceState.LEAVING:
            yield from self._drop(place, why)
            yield from self.settle(replica.model, now)
            yield from self._start_absent(self._beside(place), now)
            yield from self._dispatcher.refuse_held(replica.model, now)
            fleet.stirred_models.add(replica.model)
            return
        place.end_life(epoch, why, now)
        if permanent:
            place.enter(PlaceState.FAILED, now)
        elif place.failures >= QUARANTINE_AFTER:
            place.enter(PlaceState.QUARANTINED, now, due_s=now + place.backoff_s)
        else:
            after = f"after failure {place.failures} in a row" if place.failures else "after its last life ended"
            yield self._activate(place, f"it is wanted, {after}: {why}", now)
        fleet.note_due(place)
        if not place.promising:
            yield from self._dispatcher.abandon(place, now)

    def steps_timed(self, event: StepsTimed) -> None:
        fleet = self._fleet
        place, model = fleet.places.get(event.replica), fleet.models.get(event.replica.model)
        if not self.learns or fleet.costs is None or place is None or model is None or place.epoch != event.epoch:
            return
        slowdown = fleet.costs.slowdown(1 + fleet.at_work_beside(place))
        fleet.costs = refine.after_steps(fleet.costs, model, event, slowdown)

    # Up and down.

    def settle(self, model: str, now: float, decision: Decision | None = None) -> Iterator[Action]:
        """Makes the places that are wanted for a registered model, and starts those whose agent is here."""
        fleet = self._fleet
        if model not in fleet.models:
            return
        for seat in fleet.wanted_of(model):
            if seat.replica not in fleet.places:
                place = Place(seat=seat, since_s=now)
                if decision is not None:
                    place.purpose = decision.reasons.get(seat.replica, "")
                    place.weighed = decision.alternatives.get(seat.replica, ())
                fleet.add(place)
                self._await_agent(place, now)
        yield from self._start_absent(fleet.places_of(model), now)

    def retire(self, replica: ReplicaId, reason: str, now: float, weighed: tuple[Alternative, ...] = ()) -> Iterator[Action]:
        """It is no longer wanted: it drains if it serves, and is not brought up if it is on its way."""
        place = self._fleet.places.get(replica)
        if place is None or place.state is PlaceState.LEAVING:
            return
        if place.state is PlaceState.SERVING and place.epoch is not None:
            yield self._deactivate(replica, place.epoch, reason, weighed)
            self._fleet.enter(place, PlaceState.LEAVING, now)
        elif place.state is PlaceState.LOADING:
            self._fleet.enter(place, PlaceState.LEAVING, now)  # taken down once it has come up and so named its life
        else:
            yield from self._drop(place, reason)

    def resize(self, seat: Seat, reason: str, now: float) -> Iterator[Action]:
        """At once where memory is elastic and there are addresses for so much; else it is loaded anew."""
        place = self._fleet.places.get(seat.replica)
        if place is None:
            return
        place.seat = seat
        if place.state is not PlaceState.SERVING:  # what comes up meanwhile is told when it serves
            return
        agent = self._fleet.agents.get(place.agent or "")
        limit, most = seat.kv_limit_bytes, place.most_kv_bytes
        if agent is not None and agent.elastic and (most is None or (limit is not None and limit <= most)):
            yield from self._limit(place, reason)
        else:
            yield from self.retire(seat.replica, f"{reason}, so it is loaded anew", now)

    def _limit(self, place: Place, reason: str) -> Iterator[Action]:
        assert place.epoch is not None
        limit = place.seat.kv_limit_bytes
        yield Resize(replica=place.replica, epoch=place.epoch, kv_limit_bytes=limit, reason=reason)

    def try_again(self, place: Place, now: float) -> None:
        """Whatever made it fail may be over: somebody has changed its model, or wants it in so many words."""
        if place.state in (PlaceState.FAILED, PlaceState.QUARANTINED):
            place.failures = 0
            self._await_agent(place, now)

    def due(self, now: float) -> Iterator[Action]:
        """What was to happen by now, with replicas and for the requests of agents that are away."""
        for place in self._fleet.due_by(now):
            yield from self._due(place, now)
        for agent in list(self._fleet.awaited.values()):
            if agent.requests_due_s is not None and agent.requests_due_s <= now:
                yield from self._give_up_routed(agent, set(), "its agent was lost and has not come back")

    def due_s(self) -> float | None:
        """The soonest of them."""
        soonest = self._fleet.due_s
        for agent in self._fleet.awaited.values():
            if agent.requests_due_s is not None and (soonest is None or agent.requests_due_s < soonest):
                soonest = agent.requests_due_s
        return soonest

    def _due(self, place: Place, now: float) -> Iterator[Action]:
        fleet = self._fleet
        if place.state is PlaceState.QUARANTINED:
            yield self._activate(place, f"tried again after {place.failures} failures in a row, the last: {place.why}", now)
            return
        place.due_s = None
        fleet.note_due(place)
        if fleet.policy.on_demand:  # it may have a place elsewhere
            self._want_no_longer(place.replica)
            yield from self._drop(place, f"no agent with its GPUs has been here for {fleet.limits.agent_absence_s:g} s")
            fleet.stirred_models.add(place.replica.model)
        yield from self._dispatcher.refuse_held(place.replica.model, now)

    def _want_no_longer(self, replica: ReplicaId) -> None:
        self._fleet.wanted = Placement(tuple(seat for seat in self._fleet.wanted.seats if seat.replica != replica))

    def _activate(self, place: Place, reason: str, now: float) -> Activate:
        self._fleet.enter(place, PlaceState.LOADING, now)
        place.most_kv_bytes = place.seat.kv_limit_bytes
        model = self._fleet.models[place.replica.model]
        return Activate(model=model, seat=place.seat, reason=reason, alternatives=place.weighed)

    def _deactivate(self, replica: ReplicaId, epoch: Epoch, reason: str, weighed: tuple[Alternative, ...] = ()) -> Deactivate:
        model = self._fleet.models.get(replica.model)
        drain_s = model.drain_s if model else 0.0
        return Deactivate(replica=replica, epoch=epoch, drain_s=drain_s, reason=reason, alternatives=weighed)

    def _await_agent(self, place: Place, now: float) -> None:
        place.agent = None
        self._fleet.enter(place, PlaceState.ABSENT, now, due_s=now + self._fleet.limits.agent_absence_s)

    def _start_absent(self, places: Iterable[Place], now: float) -> Iterator[Action]:
        for place in places:
            agent = self._fleet.owner(place.seat)
            if place.state is PlaceState.ABSENT and agent is not None and self._fleet.has_room(place):
                place.agent = agent
                reason = place.purpose or f"the placement wants it on GPUs {list(place.seat.gpu_ids)} of {agent}"
                yield self._activate(place, reason, now)

    def room_changed(self, gpu_id: int, now: float) -> Iterator[Action]:
        """Processes of others hold more or less of a GPU than before."""
        yield from self._start_absent(list(self._fleet.on_gpu(gpu_id)), now)

    def _beside(self, place: Place) -> list[Place]:
        """Whoever may have waited for its room."""
        near = {other.replica: other for gpu_id in place.seat.gpu_ids for other in self._fleet.on_gpu(gpu_id)}
        return list(near.values())

    def _drop(self, place: Place, why: str) -> Iterator[Action]:
        yield from self._dispatcher.give_back(place, why)
        self._fleet.remove(place)

    # Models.

    def registered(self, model: ModelSpec, now: float) -> Iterator[Action]:
        fleet = self._fleet
        known = fleet.models.get(model.name)
        fleet.register(model)
        if known is not None and known != model:
            for place in list(fleet.places_of(model.name)):
                self.try_again(place, now)
                if place.state is not PlaceState.ABSENT and not model.runs_as(known):
                    # Its seat stays, so it comes back, as what it is now.
                    yield from self.retire(place.replica, "its entry has changed, and it is loaded anew", now)
        yield from self.settle(model.name, now)
        fleet.stirred_models.add(model.name)

    def removed(self, model: str, now: float) -> Iterator[Action]:
        fleet, reason = self._fleet, f"{model} was removed"
        if model not in fleet.models:
            return
        for place in fleet.places_of(model):
            if place.state is PlaceState.SERVING and place.epoch is not None:
                yield self._deactivate(place.replica, place.epoch, reason)
            if place.state in (PlaceState.SERVING, PlaceState.LOADING):
                fleet.enter(place, PlaceState.LEAVING, now)
        fleet.unregister(model)
        for place in list(fleet.places_of(model)):
            if place.state is not PlaceState.LEAVING:
                yield from self._drop(place, reason)
        yield from self._dispatcher.end_model(model)
        fleet.stirred_models.add(model)

    # Agents and GPUs.

    def agent_joined(self, event: AgentJoined, now: float) -> Iterator[Action]:
        fleet = self._fleet
        known = fleet.agents.get(event.agent)
        if known is not None:
            if event.agent_start < known.start or (event.agent_start == known.start and known.present):
                return
            if known.present:
                yield from self.agent_lost(AgentLost(agent=known.name, reason="it came back as a new process"), now)
            yield from self._give_up_routed(known, set(event.requests), "it was lost with its agent")
        fleet.enlist(
            Agent(name=event.agent, start=event.agent_start, gpus=event.gpus, earlier=event.earlier, elastic=event.elastic)
        )
        yield self.queue_by(event.agent)
        for orphan in known.orphans if known is not None else ():
            if orphan.request_id in event.requests:
                reason = "its agent was away, and it was sent to its front-end meanwhile"
                yield Abort(request_id=orphan.request_id, replica=orphan.replica, epoch=orphan.epoch, reason=reason)
        own = {gpu.gpu_id for gpu in event.gpus}
        yield from self._start_absent([p for p in fleet.places.values() if own.issuperset(p.seat.gpu_ids)], now)
        fleet.stirred_agents.add(event.agent)

    def queue_by(self, agent: str) -> QueueBy:
        local = self._fleet.local
        return QueueBy(agent=agent, local=local, reason=f"requests go by {local} under {self._fleet.policy.name}")

    def agent_lost(self, event: AgentLost, now: float) -> Iterator[Action]:
        fleet = self._fleet
        agent = fleet.agents.get(event.agent)
        if agent is None or not agent.present:
            return
        agent.present = False
        fleet.expect(agent, now + fleet.limits.agent_return_s)
        for place in [place for place in fleet.places.values() if place.agent == event.agent]:
            if place.state is PlaceState.LEAVING:
                yield from self._drop(place, event.reason)
                yield from self.settle(place.replica.model, now)
                yield from self._dispatcher.refuse_held(place.replica.model, now)
            elif place.state is not PlaceState.FAILED:
                self._await_agent(place, now)

    def _give_up_routed(self, agent: Agent, kept: set[str], reason: str) -> Iterator[Action]:
        """An agent's requests wait for it no longer, but for those that it still has; the others are brought again."""
        self._fleet.expect(agent, None)
        for orphan, requeue in self._dispatcher.orphan(agent.lives, kept, reason):
            agent.orphans.append(orphan)
            yield requeue

    def gpu_lost(self, event: GpuLost, now: float) -> Iterator[Action]:
        """What has a rank there is lost; it waits for nobody, and goes elsewhere if its policy finds a place."""
        fleet = self._fleet
        agent = fleet.holder(event.gpu_id)
        if agent is None:
            return
        fleet.lose(agent, event.gpu_id)
        why = f"GPU {event.gpu_id} is lost: {event.reason}"
        for place in list(fleet.on_gpu(event.gpu_id)):
            if place.state is PlaceState.LEAVING:
                yield from self._drop(place, why)
                yield from self.settle(place.replica.model, now)
            elif fleet.policy.on_demand:
                self._want_no_longer(place.replica)
                yield from self._drop(place, why)
            else:
                if place.epoch is not None:
                    place.ended = place.epoch
                place.agent, place.why = None, why
                fleet.enter(place, PlaceState.ABSENT, now)
                yield from self._dispatcher.abandon(place, now)
            yield from self._dispatcher.refuse_held(place.replica.model, now)
        fleet.stirred_agents.add(agent.name)

"""Where front-ends and agents meet: feeds the control scheduler with what they say and carries out what it decides.

Owns the connections, the payloads of the requests that are held here, and the one timer. One loop owns all of it, and
nothing is awaited between a decision and its actions. A front-end is gone when its process is, not when a connection ends:
it may only be coming back, and its streams go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chimera.control.lookout import Lookout
from chimera.control.telemetry import Telemetry
from chimera.control.witness import Witness
from chimera.core.measures import Measures
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.core.record import Entry
from chimera.core.replica import ReplicaId, ReplicaState
from chimera.msg import actions, events, stream
from chimera.msg.actions import Action
from chimera.sched.control import ControlInput, ControlScheduler
from chimera.sched.cost import CostTable
from chimera.sched.log import Recorder
from chimera.sched.policies.policy import WarmRules
from chimera.wire.channel import Channel, Server, serve
from chimera.wire.codec import Message
from chimera.wire.vigil import Vigil

if TYPE_CHECKING:
    from chimera.spans.decisions import DecisionSpans

log = logging.getLogger(__name__)

MOST_STRAY = 1024
NOTED_EVERY_S = 1.0
"""How fine the past is that viewers are shown."""

News = events.ReplicaReady | events.ReplicaStopped | events.ActivationFailed | events.WorkerLost
"""What command-line clients that stay connected are told, beginning with the newest of each replica; and every front-end's
greeting."""


class _Front:
    """One front-end process; its channel comes and goes."""

    def __init__(self, hello: stream.Hello, channel: Channel, vigil: Vigil) -> None:
        self.hello = hello
        self.name = hello.name
        self.channel = channel
        self.vigil = vigil


class Exchange:
    """`decisions` takes each line of the decision log. `on_change` is called when an operator has changed what control is
    in charge of."""

    def __init__(
        self,
        *,
        models: Iterable[ModelSpec],
        wanted: Placement,
        socket: Path,
        policy: str = "static",
        local: str | None = None,
        costs: CostTable | None = None,
        warm: WarmRules | None = None,
        decisions: Callable[[bytes], object] | None = None,
        witness: Witness | None = None,
        spans: DecisionSpans | None = None,
        on_change: Callable[[], object] | None = None,
    ) -> None:
        self.scheduler = ControlScheduler(wanted, policy=policy, local=local, costs=costs, warm=warm, learns=True)
        self._has_costs = costs is not None
        self._models = {model.name: model for model in models}
        self._socket = socket
        self._recorder = Recorder(self.scheduler)
        self._decisions = decisions
        if decisions is not None:
            decisions(self._recorder.opening())
        self._witness = witness
        """Empty where nobody counts."""
        self._spans = spans
        self._server: Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._lookout = Lookout(time.time() - time.monotonic())
        self._noting: asyncio.TimerHandle | None = None
        self._telemetry = Telemetry()
        self._parted = asyncio.Event()
        self._fronts: dict[str, _Front] = {}
        self._agents: dict[str, Channel] = {}
        self._watchers: set[Channel] = set()
        self._supervisor: Channel | None = None
        """Who has started all of this, and reads the operator's files."""
        self._on_change = on_change
        self._news: dict[ReplicaId, News] = {}
        self._payloads: dict[str, bytes] = {}
        """Of the requests that were not handed to an agent yet."""
        self._stray: deque[stream.Cancel | stream.FrontLost] = deque(maxlen=MOST_STRAY)
        """Of requests that an agent may have which is not here now, or from an earlier control."""

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        return tuple(self._models.values())

    async def start(self) -> None:
        if self._witness is not None:
            self._witness.start()
        for model in self._models.values():
            self._decide(events.ModelRegistered(model=model))
        self._server = await serve(self._socket, self._greet)
        self._note()

    async def wait_until_alone(self) -> None:
        """Until the last front-end and the last agent are gone."""
        while self._fronts or self._agents:
            self._parted.clear()
            await self._parted.wait()

    async def stop(self) -> None:
        for timer in (self._timer, self._noting):
            if timer is not None:
                timer.cancel()
        for front in self._fronts.values():
            front.vigil.close()
        self._agents.clear()  # their connections end because we go, not they
        if self._server is not None:
            await self._server.close()
        if self._witness is not None:
            self._witness.close()

    # Who comes and goes.

    def _greet(self, channel: Channel) -> None:
        """Whoever connects says first who it is."""

        def first(message: Message) -> None:
            match message:
                case stream.Hello(role="front"):
                    self._take_in_front(message, channel)
                case stream.Hello(role="agent", name=name):
                    self._take_in_agent(name, channel)
                case stream.Hello(role="supervisor"):
                    self._supervisor = channel
                    self._take_in_watcher(channel)
                case stream.Hello(role="cli"):
                    self._take_in_watcher(channel)
                case _:
                    log.warning("sent away a stranger said=%s", type(message).__name__)
                    channel.close()

        channel.deliver_to(first)

    def _take_in_front(self, hello: stream.Hello, channel: Channel) -> None:
        known = self._fronts.get(hello.name)
        if known is not None and known.vigil.pid != hello.pid:
            log.warning("sent away front-end %s pid=%d: no two have one name", hello.name, hello.pid)
            channel.close()
            return
        if known is not None:
            known.channel.close()
            known.channel = channel
        else:
            try:
                vigil = Vigil(hello.pid, lambda: self._front_gone(front))
            except ProcessLookupError:  # it died with its greeting on the way
                channel.close()
                self._call_off(hello.name)
                return
            front = _Front(hello, channel, vigil)
            self._fronts[hello.name] = front
        channel.deliver_to(lambda message: self._front_says(hello.name, channel, message))
        for model in self._models.values():
            channel.send(events.ModelRegistered(model=model))
        for watcher in self._watchers:
            watcher.send(hello)
        log.info("front-end %s is here pid=%d", hello.name, hello.pid)

    def _front_gone(self, front: _Front) -> None:
        """Its clients are gone with it: whatever ran or waited for them is called off, here and at the agents."""
        front.vigil.close()
        front.channel.close()
        if self._fronts.get(front.name) is front:
            del self._fronts[front.name]
            self._parted.set()
        if self._witness is not None:
            self._witness.front_gone(front.name)
        open_requests = self.scheduler.requests_of(front.name)
        log.log(
            logging.WARNING if open_requests else logging.INFO,
            "front-end %s is gone requests=%d",
            front.name,
            len(open_requests),
        )
        for request_id in open_requests:
            self._payloads.pop(request_id, None)
            self._decide(events.RequestCancelled(request_id=request_id))
        self._call_off(front.name)

    def _call_off(self, front: str) -> None:
        """Agents may have requests of it that came through an earlier control, also those that are not here yet."""
        lost = stream.FrontLost(front=front)
        for agent in self._agents.values():
            agent.send(lost)
        self._stray.append(lost)
        (self._socket.parent / f"{front}.sock").unlink(missing_ok=True)

    def _take_in_agent(self, name: str, channel: Channel) -> None:
        known = self._agents.get(name)
        if known is not None:
            self._agent_gone(name, known, "it has connected anew")
        self._agents[name] = channel
        for stray in self._stray:
            channel.send(stray)
        channel.deliver_to(
            lambda message: self._agent_says(name, channel, message),
            lambda fault: self._agent_gone(name, channel, str(fault or "its connection has ended")),
        )
        log.info("agent %s is here", name)

    def _agent_gone(self, name: str, channel: Channel, reason: str) -> None:
        if self._agents.get(name) is not channel:
            return
        del self._agents[name]
        self._telemetry.forget_agent(name)
        self._parted.set()
        channel.close()
        log.warning("agent %s is gone reason=%s", name, reason)
        self._decide(events.AgentLost(agent=name, reason=reason))

    def _take_in_watcher(self, channel: Channel) -> None:
        self._watchers.add(channel)
        for front in self._fronts.values():
            channel.send(front.hello)
        for news in self._news.values():
            channel.send(news)
        channel.deliver_to(lambda message: self._watcher_says(channel, message), lambda _: self._watcher_gone(channel))

    def _watcher_gone(self, channel: Channel) -> None:
        self._watchers.discard(channel)
        if self._supervisor is channel:
            self._supervisor = None

    # What they say.

    def _front_says(self, name: str, channel: Channel, message: Message) -> None:
        match message:
            case stream.Enqueue(request=request, payload=payload):
                self._payloads[request.request_id] = payload
                self._decide(events.RequestArrived(request=request))
                if not self.scheduler.holds(request.request_id):
                    self._payloads.pop(request.request_id, None)  # told twice: an agent has it
            case stream.Cancel(request_id=request_id):
                self._cancel(message, request_id)
            case stream.RequestTold(record=record) if self._witness is not None:
                self._witness.told(record)
            case stream.TallyTold(tally=tally) if self._witness is not None:
                self._witness.tallied(name, tally)
            case stream.StandingWanted(request_id=request_id):
                standing = self.scheduler.standing(request_id, time.monotonic())
                if standing is not None:
                    position, wait_s, why = standing
                    channel.send(stream.StandingTold(request_id=request_id, position=position, wait_s=wait_s, why=why))
            case stream.MeasuresWanted():
                channel.send(self._measures())
            case stream.SnapshotWanted():
                channel.send(self._snapshot())
            case stream.SightWanted(cast=cast, after=after):
                channel.send(self._sight(cast, after))
            case stream.PastWanted():
                channel.send(stream.PastTaken(past=self._lookout.past(self._snapshot().snapshot, self._since(0))))
            case events.LoadWanted() | events.UnloadWanted():
                self._decide(message)
            case events.ResizeWanted():
                self._decide(message)
                self._note_change()
            case stream.Flush():
                for agent in self._agents.values():
                    agent.send(message)
            case events.PolicyChosen(policy=policy, local=local) if policy in (None, "static") or self._has_costs:
                log.info("policy=%s local=%s chosen through front-end %s", policy, local, name)
                self._decide(message)
                self._note_change()
            case events.ModelRegistered() | events.ModelRemoved():
                self._change_models(message)
            case stream.ReloadWanted() | stream.EntryFiled():
                self._ask_supervisor(message)
            case _:
                log.warning("front-end %s says what control does not understand: %s", name, type(message).__name__)

    def _agent_says(self, name: str, channel: Channel, message: Message) -> None:
        if self._agents.get(name) is not channel:
            return  # From a connection that was given up for a newer one.
        match message:
            case (
                events.AgentJoined()
                | events.ReplicaReady()
                | events.ReplicaStopped()
                | events.ActivationFailed()
                | events.WorkerLost()
                | events.RequestFinished()
                | events.StepsTimed()
                | events.GpuLost()
                | events.GpuSampled()
                | actions.Reject()
                | actions.Requeue()
            ):
                self._decide(message)
            case stream.Heartbeat():
                self._telemetry.note(message)
                if self._witness is not None:
                    self._witness.beat(message)
            case stream.Flushed(front=front):
                self._tell_front(front, message)
            case stream.LedgerTold(view=view):
                self._telemetry.note_ledgers(name, view)
            case stream.EntriesTold(entries=entries):
                if self._witness is not None:
                    self._witness.log(entries)
            case _:
                log.warning("agent %s says what control does not understand: %s", name, type(message).__name__)
        if isinstance(message, News):
            self._spread(message)

    def _spread(self, news: News) -> None:
        if news.replica is not None:
            self._news[news.replica] = news
        for watcher in self._watchers:
            watcher.send(news)
        match news:
            case events.ReplicaReady(replica=replica, load_s=load_s):
                self._report(replica, ReplicaState.SERVING, f"ready in {load_s:.1f} s", load_s=load_s)
            case events.ReplicaStopped(replica=replica, reason=reason):
                self._report(replica, ReplicaState.STOPPED, reason)
            case events.ActivationFailed(replica=replica, reason=reason):
                self._report(replica, ReplicaState.STOPPED, reason, failed=True)
            case events.WorkerLost(replica=ReplicaId() as replica, reason=reason):
                self._report(replica, ReplicaState.STOPPED, reason, failed=True)

    def _report(
        self,
        replica: ReplicaId,
        state: ReplicaState,
        reason: str,
        *,
        gpu_ids: tuple[int, ...] = (),
        load_s: float | None = None,
        failed: bool = False,
    ) -> None:
        now = time.monotonic()
        self._tell_fronts(
            stream.ReplicaNews(
                replica=replica, state=state, reason=reason, gpu_ids=gpu_ids, at_s=now, load_s=load_s, failed=failed
            )
        )

    def _watcher_says(self, channel: Channel, message: Message) -> None:
        match message:
            case stream.SnapshotWanted():
                channel.send(self._snapshot())
            case events.PlacementChanged() if channel is self._supervisor:
                self._change_models(message)
            case events.PolicyChosen(policy=policy, local=local) if channel is self._supervisor:
                log.info("policy=%s local=%s chosen by the placement file", policy, local)
                self._decide(message)
                self._note_change()
            case stream.Prepare() if channel is self._supervisor:
                for agent in self._agents.values():
                    agent.send(message)
            case stream.Refiled(front=front) if channel is self._supervisor:
                self._tell_front(front, message)
            case _:
                log.warning("a watcher says what control does not understand: %s", type(message).__name__)

    def _ask_supervisor(self, order: stream.ReloadWanted | stream.EntryFiled) -> None:
        if self._supervisor is not None:
            self._supervisor.send(order)
            return
        fault = "nobody is there who could read it: control was started by itself"
        self._tell_front(order.front, stream.Refiled(order=order.order, front=order.front, faults=(fault,)))

    def _change_models(self, change: events.ModelRegistered | events.ModelRemoved | events.PlacementChanged) -> None:
        """On an operator's word; every front-end hears of it."""
        told: list[events.ModelRegistered | events.ModelRemoved] = []
        match change:
            case events.PlacementChanged():
                told += [events.ModelRemoved(model=name) for name in change.removed]
                told += [events.ModelRegistered(model=model) for model in change.models]
            case _:
                told.append(change)
        for one in told:
            if isinstance(one, events.ModelRegistered):
                self._models[one.model.name] = one.model
            else:
                self._models.pop(one.model, None)
        self._decide(change)
        for one in told:
            self._tell_fronts(one)
        self._note_change()

    def _note_change(self) -> None:
        if self._on_change is not None:
            self._on_change()

    def _cancel(self, cancel: stream.Cancel, request_id: str) -> None:
        self._payloads.pop(request_id, None)
        held = self.scheduler.holds(request_id)
        decided = self._decide(events.RequestCancelled(request_id=request_id))
        if held or any(isinstance(action, actions.Abort) and action.request_id == request_id for action in decided):
            return
        # Unknown here: an earlier control may have routed it. Who does not have it ignores this.
        for agent in self._agents.values():
            agent.send(cancel)
        self._stray.append(cancel)

    def _measures(self) -> stream.MeasuresTaken:
        return stream.MeasuresTaken(measures=self._counted(), snapshot=self._snapshot().snapshot)

    def _counted(self) -> Measures:
        return Measures() if self._witness is None else self._witness.measures()

    # What viewers see.

    def _note(self) -> None:
        self._lookout.note(self._snapshot().snapshot, self._counted())
        self._noting = asyncio.get_running_loop().call_later(NOTED_EVERY_S, self._note)

    def _sight(self, cast: int, after: int) -> stream.SightTaken:
        fault = "" if self._witness is None else self._witness.fault
        return stream.SightTaken(
            sight=self._lookout.sight(self._snapshot().snapshot, self._since(after), cast=cast, fault=fault)
        )

    def _since(self, number: int) -> list[tuple[int, Entry]]:
        return [] if self._witness is None else self._witness.since(number)

    def _snapshot(self) -> stream.SnapshotTaken:
        return stream.SnapshotTaken(snapshot=self._telemetry.overlay(self.scheduler.snapshot(time.monotonic())))

    # Deciding and carrying out.

    def _decide(self, event: ControlInput) -> list[Action]:
        now = time.monotonic()
        decided = self.scheduler.on(event, now)
        took_s = time.monotonic() - now
        if self._decisions is not None:
            self._decisions(self._recorder.line(now, event, decided))
        for action in decided:
            self._perform(action)
        if self._witness is not None:
            self._witness.step(event, decided, now, took_s)
        if self._spans is not None:
            self._spans.step(event, decided, now)
        return decided

    def _perform(self, action: Action) -> None:
        match action:
            case actions.Route(request=request):
                delivery = stream.Delivery(route=action, payload=self._payloads.pop(request.request_id))
                self._tell_agent(action, delivery)
            case actions.Activate():
                log.info("activate replica=%s gpus=%s reason=%s", action.seat.replica, action.seat.gpu_ids, action.reason)
                self._report(action.seat.replica, ReplicaState.LOADING, action.reason, gpu_ids=action.seat.gpu_ids)
                if self._spans is not None:
                    action = msgspec.structs.replace(action, trace=self._spans.activate(action, time.monotonic()))
                self._tell_agent(action, action)
            case actions.Deactivate():
                log.info("deactivate replica=%s reason=%s", action.replica, action.reason)
                self._report(action.replica, ReplicaState.DRAINING, action.reason)
                self._tell_agent(action, action)
            case actions.Resize():
                log.info("resize replica=%s bytes=%s reason=%s", action.replica, action.kv_limit_bytes, action.reason)
                self._tell_agent(action, action)
            case actions.Abort():
                self._tell_agent(action, action)
            case actions.QueueBy():
                log.info("queue by=%s agent=%s reason=%s", action.local, action.agent, action.reason)
                self._tell_agent(action, action)
            case actions.Reject(request_id=request_id, front=front) | actions.Requeue(request_id=request_id, front=front):
                self._payloads.pop(request_id, None)
                self._tell_front(front, action)
            case actions.WakeAt(at_s=at_s):
                self._wake_at(at_s)
            case _:
                raise TypeError(f"control cannot carry out a {type(action).__name__}")

    def _tell_agent(self, action: Action, message: Message) -> None:
        agent = self.scheduler.agent_of(action)
        channel = None if agent is None else self._agents.get(agent)
        if channel is not None:
            channel.send(message)
        elif isinstance(action, actions.Abort):  # its agent may come back, and its worker go on with it meanwhile
            self._stray.append(stream.Cancel(request_id=action.request_id))

    def _tell_front(self, front: str, message: Message) -> None:
        known = self._fronts.get(front)
        if known is not None:  # else it is away, and brings again what was not answered
            known.channel.send(message)

    def _tell_fronts(self, message: Message) -> None:
        for front in self._fronts.values():
            front.channel.send(message)

    def _wake_at(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, at_s - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._decide, events.Woke())

"""A whole system on paper: one control, two agents, their workers, one front-end, and links that are late, repeat and break.

The schedulers are the real ones; everything else is the least that can stand for a process or a connection. Links keep their
order, as sockets do; a link that breaks loses what is on it. Old news of an agent's earlier process may come at any time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import msgspec
from chimera.core.model import Slo
from chimera.core.placement import Placement, Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.msg.actions import (
    Abort,
    Action,
    Activate,
    Admit,
    Deactivate,
    Pause,
    Preempt,
    QueueBy,
    Reject,
    Requeue,
    Resume,
    Route,
    WakeAt,
)
from chimera.msg.events import (
    ActivationFailed,
    AgentLost,
    Event,
    GpuLost,
    ModelRegistered,
    Outcome,
    ReplicaFound,
    ReplicaStopped,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    Woke,
    WorkerLost,
)
from chimera.sched.control import ControlScheduler
from chimera.sched.cost import CostTable
from chimera.sched.fleet import Limits
from chimera.sched.gpu import MOST_LOSSES
from chimera.sched.log import Recorder
from chimera.sched.node import NodeInput, NodeScheduler
from chimera.sched.turns import MOST_PREEMPTIONS, MOST_STANDING_S

from tests.sched.builders import joined, model, ready, request

CREDITS = 2
LIMITS = Limits(queue_per_model=6, hold_s=200.0, agent_absence_s=30.0)
FRONT_TRIES = 3
FRONT_MOVES = 64


class Worker:
    """One life of one replica."""

    def __init__(self, seat: Seat, epoch: Epoch) -> None:
        self.seat = seat
        self.replica = seat.replica
        self.epoch = epoch
        self.loaded = False
        self.leaving = False
        self.running: list[str] = []
        self.paused_until_s: float | None = None

    def stands(self, now: float) -> bool:
        """A paused worker goes on by itself after its time."""
        return self.paused_until_s is not None and self.paused_until_s > now


class AgentSide:
    """An agent's process: its scheduler, its workers, and its two directions of one link."""

    def __init__(self, world: World, name: str, gpu_ids: tuple[int, ...]) -> None:
        self.world = world
        self.name = name
        self.gpu_ids = gpu_ids
        self.up: deque[Event | Action] = deque()
        self.down: deque[NodeInput] = deque()
        self.heard: deque[Event] = deque()
        """From its workers."""
        self.told: list[Event] = []
        """All that workers of this process ever said."""
        self.connected = False
        self.workers: dict[ReplicaId, Worker] = {}
        self.newest: dict[ReplicaId, Epoch] = {}
        self.begin(outlived=False)

    def begin(self, *, outlived: bool) -> None:
        """A new process. Workers that can say what they are may have outlived the old one; the others have left with it."""
        survivors = [worker for worker in self.workers.values() if worker.loaded] if outlived else []
        self.start = self.world.next_start()
        self.lost_gpus: set[int] = set()
        self.node = NodeScheduler(self.name, self.start, self.gpu_ids, costs=self.world.costs, learns=True)
        self.wake_s: float | None = None
        self.recorder = Recorder(self.node)
        self.log = [self.recorder.opening()]
        self.workers = {worker.replica: worker for worker in survivors}
        self.earlier = {worker.epoch.agent_start for worker in survivors}
        self.heard.clear()
        self.told.clear()
        for worker in survivors:
            self.on(self._found(worker))

    def _found(self, worker: Worker) -> ReplicaFound:
        name = worker.replica.model
        return ReplicaFound(
            model=self.world.models[name],
            seat=worker.seat,
            ready=ready(name, worker.epoch, index=worker.replica.index, credits=CREDITS),
            running=tuple(self.world.front.every[request_id] for request_id in worker.running),
            leaving=worker.leaving,
        )

    def connect(self) -> None:
        self.connected = True
        tenants = list(self.node.tenants())
        requests = [i for t in tenants for i in (*(r.request_id for r in t.queue), *t.running)]
        gpus = [gpu_id for gpu_id in self.gpu_ids if gpu_id not in self.lost_gpus]
        here = joined(self.name, start=self.start, gpus=gpus, pages=self.world.pages)
        self.up.append(msgspec.structs.replace(here, earlier=tuple(self.earlier), requests=tuple(requests)))
        self.up.extend(self.node.living())

    def tell_up(self, message: Event | Action) -> None:
        if self.connected:
            self.up.append(message)

    def on(self, event: NodeInput) -> None:
        actions = self.node.on(event, self.world.now)
        self.log.append(self.recorder.line(self.world.now, event, actions))
        self.node.check()
        for action in actions:
            self.perform(action)

    def report(self, event: Event) -> None:
        self.told.append(event)
        self.on(event)
        self.tell_up(event)

    def perform(self, action: Action) -> None:
        match action:
            case Activate(seat=seat, epoch=epoch):
                assert epoch is not None
                assert epoch.agent_start == self.start
                assert seat.replica not in self.newest or self.newest[seat.replica] < epoch, "a life is older than its elder"
                self.newest[seat.replica] = epoch
                self.world.minted.add(epoch)
                assert seat.replica not in self.workers, "two workers for one replica"
                assert not self.lost_gpus.intersection(seat.gpu_ids), "a life on a lost GPU"
                self.workers[seat.replica] = Worker(seat, epoch)
            case Admit(request_id=request_id, replica=replica, epoch=epoch):
                worker = self.workers.get(replica)
                if worker is not None:  # else the news of its death is on the way
                    assert worker.epoch == epoch, "a request for another life"
                    assert worker.loaded
                    worker.running.append(request_id)
                    assert len(worker.running) <= CREDITS, "more requests than credits"
            case Abort(request_id=request_id, replica=replica):
                worker = self.workers.get(replica)
                if worker is not None and request_id in worker.running:
                    self.end(worker, request_id, Outcome.CANCELLED)
            case Deactivate(replica=replica, epoch=epoch):
                worker = self.workers.get(replica)
                if worker is not None:
                    assert worker.epoch == epoch, "the wrong life was taken down"
                    worker.leaving = True
            case Preempt(request_id=request_id, replica=replica, epoch=epoch):
                worker = self.workers.get(replica)
                if worker is not None and worker.epoch == epoch and request_id in worker.running:
                    self.end(worker, request_id, Outcome.REQUEUED, preempted=True)
            case Pause(replica=replica, epoch=epoch, for_s=for_s):
                worker = self.workers.get(replica)
                if worker is not None and worker.epoch == epoch:
                    assert for_s is not None and for_s <= MOST_STANDING_S, "nobody stands still for so long"
                    worker.paused_until_s = self.world.now + for_s
            case Resume(replica=replica, epoch=epoch):
                worker = self.workers.get(replica)
                if worker is not None and worker.epoch == epoch:
                    worker.paused_until_s = None
            case Reject() | Requeue():
                self.tell_up(action)
            case WakeAt(at_s=at_s):
                self.wake_s = at_s
            case _:
                raise AssertionError(f"no agent carries out {action}")

    # What workers do.

    def end(self, worker: Worker, request_id: str, outcome: Outcome, *, preempted: bool = False) -> None:
        worker.running.remove(request_id)
        if outcome in (Outcome.STOP, Outcome.LENGTH):
            self.world.front.ended(request_id)
        if outcome is Outcome.REQUEUED:
            self.world.front.again(request_id, preempted=preempted)
        self.heard.append(
            RequestFinished(request_id=request_id, replica=worker.replica, epoch=worker.epoch, outcome=outcome, output_tokens=1)
        )

    def load(self, worker: Worker) -> None:
        worker.loaded = True
        self.heard.append(ready(worker.replica.model, worker.epoch, index=worker.replica.index, credits=CREDITS))

    def fail(self, worker: Worker, *, permanent: bool) -> None:
        del self.workers[worker.replica]
        self.heard.append(ActivationFailed(replica=worker.replica, epoch=worker.epoch, reason="no memory", permanent=permanent))

    def kill(self, worker: Worker) -> None:
        del self.workers[worker.replica]
        self.heard.append(WorkerLost(worker="w", reason="killed", replica=worker.replica, epoch=worker.epoch))

    def lose_gpu(self, gpu_id: int) -> None:
        """The device answers no more; whatever has a rank on it is gone."""
        self.lost_gpus.add(gpu_id)
        for worker in [worker for worker in self.workers.values() if gpu_id in worker.seat.gpu_ids]:
            del self.workers[worker.replica]
        self.report(GpuLost(gpu_id=gpu_id, reason="it has fallen off the bus"))

    def leave(self, worker: Worker) -> None:
        for request_id in list(worker.running):
            self.end(worker, request_id, Outcome.REQUEUED)
        del self.workers[worker.replica]
        self.heard.append(ReplicaStopped(replica=worker.replica, epoch=worker.epoch, reason="drained"))


class Front:
    """Keeps every client's request until its end, and names each attempt anew."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.open: dict[str, Request] = {}
        self.every: dict[str, Request] = {}
        self.faults: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.sent = 0
        self.up: deque[Event] = deque()

    def send(self, name: str, slo: Slo | None = None) -> None:
        self.sent += 1
        self.submit(request(f"r{self.sent}", name, at=self.world.now, slo=slo or Slo()))

    def submit(self, attempt: Request) -> None:
        self.open[attempt.request_id] = self.every[attempt.request_id] = attempt
        self.up.append(RequestArrived(request=attempt))

    def ended(self, request_id: str) -> None:
        """An answer, an error, or the client's leave; of an attempt that is still open."""
        if self.open.pop(request_id, None) is not None:
            self.ends[request_id.partition(".")[0]] += 1

    def leave(self, request_id: str) -> None:
        self.ended(request_id)
        self.up.append(RequestCancelled(request_id=request_id))

    def again(self, request_id: str, *, fault: bool = False, lost: bool = False, preempted: bool = False) -> None:
        attempt = self.open.get(request_id)
        if attempt is None:
            return
        name = request_id.partition(".")[0]
        self.faults[name] += fault
        if attempt.tries >= FRONT_MOVES or self.faults[name] > FRONT_TRIES:
            self.ended(request_id)
            return
        del self.open[request_id]
        next_attempt = msgspec.structs.replace(
            attempt,
            request_id=f"{name}.{attempt.tries + 1}",
            tries=attempt.tries + 1,
            losses=attempt.losses + lost,
            preempted=attempt.preempted + preempted,
        )
        assert next_attempt.preempted <= MOST_PREEMPTIONS, "it has made way often enough"
        assert next_attempt.losses <= MOST_LOSSES, "it may be what ends engines"
        self.submit(next_attempt)


class World:
    def __init__(
        self,
        wanted: Placement,
        agents: dict[str, tuple[int, ...]],
        models: Iterable[str],
        *,
        policy: str = "static",
        local: str = "fcfs",
        costs: CostTable | None = None,
        pages: int = 8,
    ) -> None:
        self.now = 0.0
        self.policy = policy
        self.local = local
        self.costs = costs
        self.pages = pages
        self.starts = 0
        self.minted: set[Epoch] = set()
        self.wanted = wanted
        self.models = {name: model(name) for name in models}
        self.front = Front(self)
        self.ghosts: list[Event] = []
        self.agents = {name: AgentSide(self, name, gpu_ids) for name, gpu_ids in agents.items()}
        self.begin_control()

    def next_start(self) -> int:
        self.starts += 100
        return self.starts

    # Control's process.

    def begin_control(self) -> None:
        self.control = ControlScheduler(
            self.wanted, LIMITS, policy=self.policy, local=self.local, costs=self.costs, learns=True
        )
        self.recorder = Recorder(self.control)
        self.log = [self.recorder.opening()]
        self.wake_s: float | None = None
        for name in self.models:
            self.tell_control(ModelRegistered(model=self.models[name]))

    def tell_control(self, event: Event | Reject | Requeue) -> None:
        actions = self.control.on(event, self.now)
        self.log.append(self.recorder.line(self.now, event, actions))
        self.control.check()
        for action in actions:
            self.perform(action)
        if isinstance(event, RequestCancelled) and not actions:
            for agent in self.agents.values():
                if agent.connected:
                    agent.down.append(event)

    def perform(self, action: Action) -> None:
        match action:
            case Route() | Activate() | Deactivate() | Abort() | QueueBy():
                if isinstance(action, Deactivate | Abort):
                    assert action.epoch in self.minted, "control invented an epoch"
                if isinstance(action, Activate):
                    assert action.epoch is None, "control invented an epoch"
                name = self.control.agent_of(action)
                if name is not None:
                    self.agents[name].down.append(action)
            case Reject():
                self.front.ended(action.request_id)
            case Requeue():
                self.front.again(action.request_id, fault=action.fault, lost=action.lost)
            case WakeAt():
                self.wake_s = action.at_s
            case _:
                raise AssertionError(f"control does not carry out {action}")

    def restart_control(self) -> None:
        for agent in self.agents.values():
            self._break(agent)
        self.begin_control()
        self.front.up.clear()
        for attempt in list(self.front.open.values()):
            self.front.submit(attempt)

    # Links.

    def cut(self, agent: AgentSide) -> None:
        self._break(agent)
        self.tell_control(AgentLost(agent=agent.name, reason="its connection has ended"))

    def _break(self, agent: AgentSide) -> None:
        agent.connected = False
        agent.up.clear()
        agent.down.clear()

    def restart_agent(self, agent: AgentSide, *, outlived: bool) -> None:
        self.ghosts += [m for m in (*agent.up, *agent.heard) if isinstance(m, Event) and hasattr(m, "epoch")]
        if agent.connected:
            self.cut(agent)
        agent.begin(outlived=outlived)
        # What an earlier process has said comes late, but not after what the next one says of the same lives.
        going_on = {start for side in self.agents.values() for start in side.earlier}
        self.ghosts = [m for m in self.ghosts if m.epoch.agent_start not in going_on]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.wake_s is not None and self.wake_s <= self.now:
            self.wake_s = None
            self.tell_control(Woke())
        for agent in self.agents.values():
            if agent.wake_s is not None and agent.wake_s <= self.now:
                agent.wake_s = None
                agent.on(Woke())

    def deliver(self, agent: AgentSide, direction: str, *, again: bool = False) -> None:
        """The next message of a link; `again` leaves it there, to come once more."""
        link: deque[Event | Action] = getattr(agent, direction)
        message = link[0] if again else link.popleft()
        match direction:
            case "up":
                self.tell_control(message)  # type: ignore[arg-type]
            case "down":
                agent.on(message)  # type: ignore[arg-type]
            case _:
                assert isinstance(message, Event)
                agent.report(message)

    def links(self) -> list[tuple[AgentSide, str]]:
        return [(agent, d) for agent in self.agents.values() for d in ("up", "down", "heard") if getattr(agent, d)]

    # Until nothing is left to happen.

    def settle(self) -> None:
        for _ in range(2000):
            if self._stir():
                continue
            if not self.front.open and not self._at_work():
                return
            self.pass_time(5.0)
        raise AssertionError(f"no end: {self.front.open}")

    def _stir(self) -> bool:
        moved = False
        for agent in self.agents.values():
            if not agent.connected:
                agent.connect()
                moved = True
            for worker in list(agent.workers.values()):
                if worker.leaving:
                    agent.leave(worker)
                elif not worker.loaded:
                    agent.load(worker)
                elif worker.running and not worker.stands(self.now):
                    agent.end(worker, worker.running[0], Outcome.STOP)
                else:
                    continue
                moved = True
        while self.front.up:
            self.tell_control(self.front.up.popleft())
            moved = True
        while self.links():
            self.deliver(*self.links()[0])
            moved = True
        return moved

    def _at_work(self) -> bool:
        return any(len(tenant.queue) or tenant.running for agent in self.agents.values() for tenant in agent.node.tenants())

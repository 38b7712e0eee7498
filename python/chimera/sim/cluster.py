"""The system on paper: one control, an agent per node, engines, and a front-end that keeps every client's request to its end.

Control and agents are the schedulers of the live server, told the same messages in the same order. Messages between them
take no time of their own: what they cost is part of `request_s` in the cost table. What is told is put into one mailbox and
read in order, so a decision is never interrupted by another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.metrics import Story
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.core.replica import ReplicaId
from chimera.core.request import Request
from chimera.msg import actions, events
from chimera.sched.control import ControlInput, ControlScheduler
from chimera.sched.cost import CostTable
from chimera.sched.fleet import Limits
from chimera.sched.node import NodeInput, NodeScheduler
from chimera.sched.policies.policy import WarmRules
from chimera.sim import engine as engines
from chimera.sim.chronicle import Chronicle, Span
from chimera.sim.clock import Clock
from chimera.sim.engine import SimEngine
from chimera.sim.gpu import SimGpu
from chimera.trace.trace import Row

FRONT = "front-0"
Witness = Callable[[ControlInput, Sequence[actions.Action], float], None]


class Switch(msgspec.Struct, frozen=True, kw_only=True):
    """One activation of a replica."""

    replica: ReplicaId
    asked_s: float
    took_s: float
    move: bool
    """Another replica of the model stood elsewhere."""


class _Open:
    """A request whose client still waits."""

    __slots__ = ("first_token_s", "output_tokens", "request", "slo", "tries")

    def __init__(self, request: Request, output_tokens: int) -> None:
        self.request = request
        self.output_tokens = output_tokens
        self.slo = request.slo
        self.first_token_s: float | None = None
        self.tries = 0


class _Agent:
    """One node."""

    def __init__(self, name: str, start: int, gpus: Sequence[Gpu], node: NodeScheduler, paper: dict[int, SimGpu]) -> None:
        self.name = name
        self.start = start
        self.gpus = tuple(gpus)
        self.node = node
        self.paper = paper
        self.engines: dict[ReplicaId, SimEngine] = {}
        self.wake_s: float | None = None


class Cluster:
    def __init__(
        self,
        *,
        models: Sequence[ModelSpec],
        gpus: Sequence[Gpu],
        filed: Placement,
        costs: CostTable,
        policy: str = "static",
        local: str = "fcfs",
        warm: WarmRules | None = None,
        limits: Limits | None = None,
        chronicle: Chronicle | None = None,
        witness: Witness | None = None,
        told: Callable[[Story], None],
    ) -> None:
        """`told` hears each request's story when it ends, `witness` each event that control hears and what it decided."""
        self.clock = Clock()
        self._witness = witness
        self.chronicle = chronicle or Chronicle()
        self._told = told
        self.switches: list[Switch] = []
        self.requeues = 0
        self.preemptions = 0
        self.pauses = 0
        self.costs = costs
        self.models = {model.name: model for model in models}
        self.control = ControlScheduler(filed, limits, policy=policy, local=local, costs=costs, warm=warm)
        self._open: dict[str, _Open] = {}
        self._mail: deque[tuple[_Agent | None, ControlInput | NodeInput]] = deque()
        self._reading = False
        self._control_wake_s: float | None = None
        self._sent = 0
        self._made: dict[str, int] = {}
        """Tokens that lost engines had made, by request, until their front-end is asked to bring it again."""
        self.agents = self._make_agents(gpus, local)
        self.gpus = {gpu_id: paper for agent in self.agents.values() for gpu_id, paper in agent.paper.items()}
        self._agent_with = {gpu_id: agent for agent in self.agents.values() for gpu_id in agent.paper}
        self._engines_of: dict[str, list[SimEngine]] = {}
        for model in models:
            self.tell(None, events.ModelRegistered(model=model))
        for agent in self.agents.values():
            self.tell(None, events.AgentJoined(agent=agent.name, agent_start=agent.start, gpus=agent.gpus))

    def _make_agents(self, gpus: Sequence[Gpu], local: str) -> dict[str, _Agent]:
        by_node: dict[str, list[Gpu]] = {}
        for gpu in gpus:
            by_node.setdefault(gpu.node, []).append(gpu)
        made = {}
        for number, (name, own) in enumerate(sorted(by_node.items()), start=1):
            node = NodeScheduler(name, number, [gpu.gpu_id for gpu in own], local=local, costs=self.costs)
            made[name] = _Agent(name, number, own, node, {gpu.gpu_id: SimGpu(gpu, self.costs) for gpu in own})
        return made

    # The front-end.

    def send(self, row: Row) -> None:
        """A client asks: the request comes to control after what it costs to take it in."""
        now = self.clock.now
        model = self.models[row.model]
        self._sent += 1
        request = Request(
            request_id=str(self._sent),
            model=row.model,
            front=FRONT,
            prompt_tokens=row.prompt_tokens,
            max_tokens=max(1, min(row.output_tokens, model.context_length - row.prompt_tokens)),
            arrived_s=now,
            slo=model.slo,
            priority=model.priority,
        )
        opened = _Open(request, request.max_tokens)
        self._open[request.request_id] = opened
        if row.prompt_tokens >= model.context_length:
            self._close(request.request_id, refusal="context_length_exceeded")
            return
        self.tell(None, events.RequestArrived(request=request))

    @property
    def open(self) -> int:
        return len(self._open)

    def late(self) -> int:
        """Open requests whose first token comes too late, if it comes."""
        waiting = (o for o in self._open.values() if o.first_token_s is None and o.slo.ttft_s is not None)
        return sum(self.clock.now - o.request.arrived_s > o.slo.ttft_s for o in waiting)  # type: ignore[operator]

    def _close(self, request_id: str, *, last_token_s: float | None = None, refusal: str = "") -> None:
        opened = self._open.pop(request_id)
        request = opened.request
        overhead_s = self.costs.request_s
        story = Story(
            request_id=request.request_id.partition(".")[0],
            model=request.model,
            sent_s=request.arrived_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=opened.output_tokens if last_token_s is not None else 0,
            slo=opened.slo,
            first_token_s=None if opened.first_token_s is None else opened.first_token_s + overhead_s,
            last_token_s=None if last_token_s is None else last_token_s + overhead_s,
            refusal=refusal,
        )
        self._told(story)

    def _again(self, request_id: str, emitted: int, *, lost: bool = False, preempted: bool = False) -> None:
        """Brings a request again, with the tokens that its client has."""
        opened = self._open.pop(request_id, None)
        if opened is None:
            return
        self.requeues += 1
        opened.tries += 1
        before = opened.request
        if emitted >= before.max_tokens:  # it went with its last token
            self._open[request_id] = opened
            self._close(request_id, last_token_s=self.clock.now)
            return
        opened.request = msgspec.structs.replace(
            before,
            request_id=f"{request_id.partition('.')[0]}.{opened.tries}",
            prompt_tokens=before.prompt_tokens + emitted,
            max_tokens=before.max_tokens - emitted,
            emitted_tokens=before.emitted_tokens + emitted,
            tries=opened.tries,
            losses=before.losses + lost,
            preempted=before.preempted + preempted,
        )
        self._open[opened.request.request_id] = opened
        self.tell(None, events.RequestArrived(request=opened.request))

    def close_open(self) -> None:
        """The measurement ends: what is not answered yet never was."""
        for request_id in list(self._open):
            self._close(request_id, refusal="open")

    # Messages.

    def tell(self, whom: _Agent | None, message: ControlInput | NodeInput) -> None:
        """To an agent, or to control."""
        self._mail.append((whom, message))
        if self._reading:
            return
        self._reading = True
        mail = self._mail
        while mail:
            agent, told = mail.popleft()
            if agent is None:
                self._control_hears(told)  # type: ignore[arg-type]
            else:
                self._agent_hears(agent, told)  # type: ignore[arg-type]
        self._reading = False

    def _control_hears(self, message: ControlInput) -> None:
        decided = self.control.on(message, self.clock.now)
        if self._witness is not None:
            self._witness(message, decided, self.clock.now)
        for action in decided:
            match action:
                case actions.Route() | actions.QueueBy():
                    self._mail.append((self.agents[action.agent], action))
                case actions.Activate() | actions.Deactivate() | actions.Abort():
                    name = self.control.agent_of(action)
                    if name is not None:
                        self._mail.append((self.agents[name], action))
                case actions.Reject():
                    self._rejected(action)
                case actions.Requeue():
                    # An engine that was lost has told its front-ends of every token that it made.
                    self._again(action.request_id, self._made.pop(action.request_id, 0), lost=action.lost)
                case actions.WakeAt():
                    self._control_wake_s = action.at_s
                    self.clock.at(action.at_s, self._wake_control)
                case _:
                    raise TypeError(f"control cannot carry out a {type(action).__name__}")

    def _wake_control(self) -> None:
        if self._control_wake_s is not None and self._control_wake_s <= self.clock.now:
            self._control_wake_s = None
            self.tell(None, events.Woke())

    def _rejected(self, reject: actions.Reject) -> None:
        self._made.pop(reject.request_id, None)
        if reject.request_id in self._open:
            self.chronicle.note(self.clock.now, "reject", request=reject.request_id, reason=reject.reason)
            self._close(reject.request_id, refusal=str(reject.code))

    def _agent_hears(self, agent: _Agent, message: NodeInput) -> None:
        for action in agent.node.on(message, self.clock.now):
            match action:
                case actions.Admit():
                    self._admit(agent, action)
                case actions.Activate():
                    self._activate(agent, action)
                case actions.Deactivate():
                    engine = agent.engines.get(action.replica)
                    if engine is not None and engine.epoch == action.epoch:
                        self.chronicle.note(
                            self.clock.now,
                            "deactivate",
                            replica=str(action.replica),
                            gpus=engine.seat.gpu_ids,
                            reason=action.reason,
                        )
                        engine.leave(action.drain_s)
                case actions.Abort():
                    engine = agent.engines.get(action.replica)
                    if engine is not None:
                        engine.abort(action.request_id)
                case actions.Preempt() | actions.Pause() | actions.Resume():
                    engine = agent.engines.get(action.replica)
                    if engine is not None and engine.epoch == action.epoch:
                        self._interfere(engine, action)
                case actions.Reject() | actions.Requeue():
                    self._mail.append((None, action))
                case actions.WakeAt():
                    self._wake_agent_at(agent, action.at_s)
                case _:
                    raise TypeError(f"no agent carries out a {type(action).__name__}")

    def _wake_agent_at(self, agent: _Agent, at_s: float) -> None:
        agent.wake_s = at_s

        def wake() -> None:
            if agent.wake_s is not None and agent.wake_s <= self.clock.now:
                agent.wake_s = None
                self.tell(agent, events.Woke())

        self.clock.at(at_s, wake)

    # What agents do.

    def _admit(self, agent: _Agent, admit: actions.Admit) -> None:
        engine = agent.engines.get(admit.replica)
        opened = self._open.get(admit.request_id)
        if engine is None or opened is None:
            return  # the news of its end is on the way
        if not engine.fits_ever(opened.request):
            self._close(admit.request_id, refusal="context_length_exceeded")
            self._report_end(engine, opened.request, events.Outcome.FAILED)
            return
        engine.submit(opened.request)

    def _interfere(self, engine: SimEngine, action: actions.Preempt | actions.Pause | actions.Resume) -> None:
        match action:
            case actions.Preempt():
                self.preemptions += 1
                engine.give_back(action.request_id)
            case actions.Pause():
                self.pauses += 1
                engine.pause()
            case actions.Resume():
                engine.resume()

    def _activate(self, agent: _Agent, order: actions.Activate) -> None:
        assert order.epoch is not None
        replica = order.seat.replica
        self.chronicle.note(self.clock.now, "activate", replica=str(replica), gpus=order.seat.gpu_ids, reason=order.reason)
        engine = SimEngine(
            model=order.model,
            seat=order.seat,
            epoch=order.epoch,
            gpus=[agent.paper[gpu_id] for gpu_id in order.seat.gpu_ids],
            node_gpus=list(agent.paper.values()),
            costs=self.costs,
            clock=self.clock,
            listener=self,
        )
        agent.engines[replica] = engine
        self._engines_of.setdefault(replica.model, []).append(engine)
        engine.come_up()

    def _agent_of(self, engine: SimEngine) -> _Agent:
        return self._agent_with[engine.seat.gpu_ids[0]]

    def _report(self, engine: SimEngine, event: events.Event) -> None:
        """First the agent's scheduler, then control, as in the live system."""
        self.tell(self._agent_of(engine), event)
        self.tell(None, event)

    def _report_end(self, engine: SimEngine, request: Request, outcome: events.Outcome) -> None:
        finished = events.RequestFinished(
            request_id=request.request_id,
            replica=engine.seat.replica,
            epoch=engine.epoch,
            outcome=outcome,
            output_tokens=request.max_tokens,
        )
        self._report(engine, finished)

    # What engines say.

    def engine_ready(self, engine: SimEngine) -> None:
        now = self.clock.now
        replica = engine.seat.replica
        self.chronicle.note(now, "serves", replica=str(replica), gpus=engine.seat.gpu_ids)
        took_s = now - engine.asked_s
        move = any(other.draining for other in self._engines_of[replica.model] if other is not engine)
        self.switches.append(Switch(replica=replica, asked_s=engine.asked_s, took_s=took_s, move=move))
        free_bytes = min(gpu.free_bytes for gpu in engine.gpus)
        kv_bytes = free_bytes if engine.seat.kv_limit_bytes is None else engine.seat.kv_limit_bytes
        ready = events.ReplicaReady(
            replica=replica,
            epoch=engine.epoch,
            credits=self.costs.running,
            kv_tokens=max(0, kv_bytes) // max(1, engine.model.kv_bytes_per_token),
            context_length=engine.model.context_length,
            load_s=took_s,
        )
        self._report(engine, ready)

    def engine_empty(self, engine: SimEngine) -> None:
        replica = engine.seat.replica
        self._gone(engine, "left")
        self._report(engine, events.ReplicaStopped(replica=replica, epoch=engine.epoch, reason="drained"))

    def first_token(self, request: Request) -> None:
        opened = self._open.get(request.request_id)
        if opened is not None and opened.first_token_s is None:
            opened.first_token_s = self.clock.now

    def sequence_ended(self, engine: SimEngine, sequence: engines.Sequence) -> None:
        request = sequence.request
        if request.request_id in self._open:
            self._close(request.request_id, last_token_s=self.clock.now)
        self._report_end(engine, request, events.Outcome.LENGTH)

    def sequence_left(self, engine: SimEngine, sequence: engines.Sequence, *, aborted: bool, preempted: bool = False) -> None:
        request = sequence.request
        if not aborted:
            self._again(request.request_id, engine.emitted(sequence), preempted=preempted)
        self._report_end(engine, request, events.Outcome.CANCELLED if aborted else events.Outcome.REQUEUED)

    def _gone(self, engine: SimEngine, what: str) -> None:
        now = self.clock.now
        replica = engine.seat.replica
        self._agent_of(engine).engines.pop(replica, None)
        self._engines_of[replica.model].remove(engine)
        self.chronicle.note(now, what, replica=str(replica), gpus=engine.seat.gpu_ids)
        self.chronicle.spans.append(
            Span(
                replica=str(replica),
                gpus=engine.seat.gpu_ids,
                asked_s=engine.asked_s,
                ready_s=engine.ready_s if engine.serving else None,
                gone_s=now,
            )
        )

    # What goes wrong.

    def lose_worker(self, replica: ReplicaId, reason: str = "killed") -> None:
        """The worker of a replica dies, with all that it holds; front-ends have the tokens that it made."""
        for agent in self.agents.values():
            engine = agent.engines.get(replica)
            if engine is not None:
                self._gone(engine, "lost")
                self._made.update(engine.made())
                engine.die()
                lost = events.WorkerLost(worker=str(replica), reason=reason, replica=replica, epoch=engine.epoch)
                self._report(engine, lost)

    def lose_gpu(self, gpu_id: int, reason: str = "it answers no more") -> None:
        """The device is gone for good, and whatever had a rank on it."""
        agent = self._agent_with[gpu_id]
        for engine in list(self.gpus[gpu_id].engines):
            self._gone(engine, "lost")
            self._made.update(engine.made())
            engine.die()
        lost = events.GpuLost(gpu_id=gpu_id, reason=reason)
        self._mail.append((agent, lost))  # control hears of it before clients come again
        self.tell(None, lost)

    def choose_policy(self, policy: str) -> None:
        self.chronicle.note(self.clock.now, "policy", reason=policy)
        self.tell(None, events.PolicyChosen(policy=policy))

    # Figures.

    def end_spans(self) -> None:
        for agent in self.agents.values():
            for engine in list(agent.engines.values()):
                self._gone(engine, "end")

    def busy_gpu_s(self) -> float:
        return sum(gpu.busy_until(self.clock.now) for gpu in self.gpus.values())

    def check(self) -> None:
        """Raises if what the schedulers promise does not hold on paper."""
        self.control.check()
        for agent in self.agents.values():
            agent.node.check()
        for gpu in self.gpus.values():
            assert gpu.kv_bytes >= 0 and gpu.held_bytes >= 0, f"GPU {gpu.gpu.gpu_id} gave back more than it held"
            loading = any(not engine.serving for engine in gpu.engines)
            assert gpu.free_bytes >= 0 or loading, f"GPU {gpu.gpu.gpu_id} holds more than it has"

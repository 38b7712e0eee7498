"""The agent of one node: feeds the node's scheduler with what control, its workers and the clock say, and carries out what
it decides.

Owns the payloads of the requests that wait here, the decision log and the one timer. Every decision is the scheduler's;
every process is the pool's. One loop owns all of it, and nothing is awaited between a decision and its actions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chimera.agent.gang import End, Gang, Worker
from chimera.agent.memory import NodeMemory
from chimera.agent.pool import SPEAK_WITHIN_S, WorkerPool
from chimera.agent.roster import Roster
from chimera.agent.watchdog import SILENT_S, Watchdog
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.record import Entry
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.errors import ProtocolError
from chimera.ledger.book import Survivors
from chimera.msg import actions, events, stream
from chimera.msg.actions import Action
from chimera.msg.events import Event
from chimera.sched.cost import CostTable
from chimera.sched.log import Recorder
from chimera.sched.node import NodeInput, NodeScheduler
from chimera.wire.codec import Message
from chimera.wire.link import Link

if TYPE_CHECKING:
    from chimera.spans.tries import TrySpans

log = logging.getLogger(__name__)

Reported = (
    events.RequestFinished
    | events.ReplicaReady
    | events.ReplicaStopped
    | events.ActivationFailed
    | events.WorkerLost
    | events.StepsTimed
    | events.GpuLost
    | events.GpuSampled
)
"""The events that control's scheduler hears of too."""

DRAIN_S = 30.0
PREPARE_AFTER_S = 1.0
"""How long after its start an agent looks for something to prepare: until then the first activations have come."""
_LEDGERS_EVERY_S = 0.25
_MOST_UNTOLD = 4096
"""Entries for control's log that wait for it to come back."""


class _Held(msgspec.Struct):
    """A request that came here; its payload is let go of when its engine gets it."""

    route: actions.Route
    payload: bytes | None
    admitted_s: float | None = None


class Agent:
    """`decisions` takes each line of the decision log."""

    def __init__(
        self,
        *,
        name: str,
        agent_start: int,
        gpus: tuple[Gpu, ...],
        run_dir: Path,
        elastic: bool = False,
        spare_workers: int = 0,
        prepare: Sequence[ModelSpec] = (),
        prepare_at_once: int = 1,
        costs: CostTable | None = None,
        decisions: Callable[[bytes], object] | None = None,
        spans: TrySpans | None = None,
        silent_s: float = SILENT_S,
    ) -> None:
        self.name = name
        self._spans = spans
        self.scheduler = NodeScheduler(name, agent_start, [gpu.gpu_id for gpu in gpus], costs=costs, learns=True)
        self._joined = events.AgentJoined(agent=name, agent_start=agent_start, gpus=gpus, elastic=elastic)
        self._recorder = Recorder(self.scheduler)
        self._decisions = decisions
        if decisions is not None:
            decisions(self._recorder.opening())
        self._pool = WorkerPool(
            prefix=f"{name}.{agent_start % 10**9:x}",
            socket=run_dir / f"agent-{name}.sock",
            parent_socket=run_dir / "parent.sock",
            on_message=self._worker_says,
            on_lost=self._worker_lost,
            on_complete=self._meet_control,
            roster=Roster(run_dir / f"agent-{name}.workers"),
            spare=spare_workers,
        )
        self._watchdog = Watchdog(self._pool, self._pool.kill, silent_s)
        self.memory: NodeMemory | None = None
        """Empty where KV pools are of fixed size."""
        if elastic:
            self.memory = NodeMemory(
                gpus,
                agent_start,
                send=self._order_pages,
                start=self._start_replica,
                fail=self._fail_replica,
                stop=self._stop_worker,
                let_go=self._have_let_go,
                survivors=self._survivors(time.monotonic() + SPEAK_WITHIN_S),
            )
        self._room_bytes: dict[int, int] = {}
        """For all caches of a GPU together, as the scheduler was last told."""
        self._memory_timer: asyncio.TimerHandle | None = None
        self._ledger_timer: asyncio.TimerHandle | None = None
        self._held: dict[str, _Held] = {}
        self._done: list[Entry] = []
        """What was done to leases since control last heard of it."""
        self._timer: asyncio.TimerHandle | None = None
        self._to_prepare = deque(model for model in prepare if model.tp_size == 1)
        """Models whose first activation shall not have to wait for what one worker can do before."""
        self._prepare_at_once = prepare_at_once
        self._prepare_timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._earlier: set[int] = set()
        """Starts of the agents before this one, whose workers go on here."""
        self._ended_meanwhile: list[events.RequestFinished] = []
        """Before control was met."""
        self._control = Link(run_dir / "control.sock", on_open=self._greet_control, on_message=self._control_says)

    @property
    def workers(self) -> Iterable[Worker]:
        """For those who report; not to be changed."""
        return self._pool

    async def start(self) -> None:
        await self._pool.start()
        self._watchdog.start()

    def _meet_control(self) -> None:
        """Once it is known here what lives: a control that knew less would start it again."""
        self._control.start()
        if self._to_prepare:
            self._prepare_timer = asyncio.get_running_loop().call_later(PREPARE_AFTER_S, self._prepare_next)

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Let the workers finish what they have, and leave; nothing is brought up any more."""
        self._stopping = True
        await self._pool.stop(drain_s)
        self._watchdog.stop()
        for timer in (self._timer, self._memory_timer, self._ledger_timer, self._prepare_timer):
            if timer is not None:
                timer.cancel()
        await self._control.close()

    # What comes in.

    def _greet_control(self) -> None:
        """A control that is new here, or was away, learns what there is."""
        self._control.send(stream.Hello(role="agent", name=self.name, pid=os.getpid()))
        ended, self._ended_meanwhile = self._ended_meanwhile, []
        requests = (*self._held, *(event.request_id for event in ended))
        standing = self.scheduler.standing()
        self._control.send(
            msgspec.structs.replace(self._joined, earlier=tuple(self._earlier), requests=requests, standing=standing)
        )
        for ready in self.scheduler.living():
            self._control.send(ready)
        for event in ended:
            self._control.send(event)
        self._tell_ledgers()

    def _control_says(self, message: Message) -> None:
        match message:
            case actions.Activate() if self._stopping:
                pass
            case actions.Activate() | actions.Deactivate() | actions.QueueBy():
                self._obey(message)
            case stream.Delivery(route=route, payload=payload):
                self._accept(route, payload)
            case actions.Abort(request_id=request_id) | stream.Cancel(request_id=request_id):
                self._cancel(request_id)
            case stream.FrontLost(front=front):
                for request_id in [i for i, held in self._held.items() if held.route.request.front == front]:
                    self._cancel(request_id)
            case actions.Pause() | actions.Resume():
                self._perform(message)
            case actions.Resize(replica=replica, epoch=epoch, kv_limit_bytes=limit) if self.memory is not None:
                self.memory.resize((replica, epoch), limit, time.monotonic(), message.reason)
                self._set_memory_timer()
            case actions.Resize():
                pass  # its pool is of the size that it came up with
            case stream.Prepare(model=model) if model.tp_size == 1:
                self._to_prepare.append(model)
                self._prepare_next()
            case stream.Prepare():
                pass  # a gang's images are built by its ranks
            case stream.Flush():
                for ready in self.scheduler.living():
                    if ready.replica in message.replicas:
                        self._tell(ready.replica, ready.epoch, message)
            case _:
                log.warning("control says what no agent understands: %s", type(message).__name__)

    def _worker_says(self, worker: Worker, message: Message) -> None:
        match message:
            case stream.Standing():
                self._take_over(worker, message)
            case events.PagesHeld():
                if self.memory is not None and worker.activation is not None:
                    self.memory.take_over(worker.activation, message, time.monotonic())
                    self._set_memory_timer()
            case events.RequestFinished(request_id=request_id, outcome=outcome):
                if self._spans is not None:
                    ended = outcome in (events.Outcome.STOP, events.Outcome.LENGTH)
                    self._spans.end(request_id, time.monotonic(), "" if ended else str(outcome))
                message = msgspec.structs.replace(message, admitted_s=self._forget_admitted(request_id))
                self._report(message)
                if not self._control.up:
                    self._ended_meanwhile.append(message)
            case events.ReplicaReady():
                self._note_ready(worker, message)
            case events.ActivationFailed() if worker.gang is not None and not worker.gang.is_alone:
                log.warning("cannot serve worker=%s replica=%s reason=%s", worker.name, message.replica, message.reason)
                self._break_up(worker.gang, message)
            case events.ActivationFailed() | events.ReplicaStopped():
                log.info("empty worker=%s replica=%s reason=%s", worker.name, message.replica, message.reason)
                if worker.gang is not None:
                    self._leave(worker.gang, worker, message)
            case stream.Prepared():
                self._note_preparation(message)
                self._pool.vacate(worker)
                self._prepare_next()
            case events.PagesKept():
                worker.parked = message.kept.models
                self._hear_of_memory(message)
            case events.PagesWanted() | events.PagesReturned():
                self._hear_of_memory(message)
            case events.StepsTimed():
                self._report(message)
            case stream.Heartbeat() | stream.Flushed():
                self._control.send(message)
            case stream.Pong():
                pass  # that it said something is what counts
            case _:
                log.warning("worker=%s says what no agent understands: %s", worker.name, type(message).__name__)

    def _worker_lost(self, worker: Worker, reason: str) -> None:
        level = logging.INFO if worker.replica is None else logging.WARNING
        log.log(level, "lost worker=%s replica=%s reason=%s", worker.name, worker.replica, reason)
        lost = events.WorkerLost(worker=worker.name, reason=reason, replica=worker.replica, epoch=worker.epoch)
        self._hear_of_memory(lost)
        if worker.gang is None:
            self._report(lost)
            self._prepare_next()
            return
        gang = worker.gang
        gang.leave(worker, lost)
        self._break_up(gang, lost)

    def _note_ready(self, worker: Worker, ready: events.ReplicaReady) -> None:
        log.info("ready replica=%s worker=%s load_s=%.3f", ready.replica, worker.name, ready.load_s)
        gang = worker.gang
        if gang is None:
            return
        if gang.is_alone:  # several are lost with their agent: the next would not know who belongs together
            self._pool.settle(worker)
        told = gang.all_ready(worker, ready)
        if told is not None:
            self._report(told)
            self._prepare_next()

    def _leave(self, gang: Gang, worker: Worker, end: End) -> None:
        """A worker has become EMPTY."""
        gang.leave(worker, end)
        if isinstance(end, events.ReplicaStopped) and end.kept is not None:
            worker.parked = end.kept.models
        self._pool.vacate(worker)
        self._note_end(gang)

    def _break_up(self, gang: Gang, end: End) -> None:
        for worker in gang.break_up(end):
            self._pool.vacate(worker)
        self._note_end(gang)

    def _note_end(self, gang: Gang) -> None:
        """Once all are out: before that their GPUs are not free."""
        if not gang.is_over or gang.end is None or gang.epoch is None:
            return
        self._report(gang.end)
        stopped = events.ReplicaStopped(replica=gang.replica, epoch=gang.epoch, reason=gang.end.reason)
        self._hear_of_memory(gang.end if isinstance(gang.end, events.ReplicaStopped) else stopped)
        self._prepare_next()

    def _take_over(self, worker: Worker, standing: stream.Standing) -> None:
        """A worker has outlived the agent before this one."""
        activation, ready = standing.activation, standing.ready
        if activation is None or ready is None:
            self._pool.found(worker, None)
            return
        log.info("found replica=%s worker=%s running=%d", ready.replica, worker.name, len(standing.running))
        self._earlier.add(ready.epoch.agent_start)
        for request in standing.running:
            reason = "an earlier agent gave it to the worker"
            route = actions.Route(request=request, replica=ready.replica, agent=self.name, reason=reason)
            self._held[request.request_id] = _Held(route, None)
        worker.activation = activation
        self._decide(
            events.ReplicaFound(
                model=activation.model,
                seat=activation.seat,
                ready=ready,
                running=standing.running,
                leaving=standing.leaving,
            )
        )
        self._pool.found(worker, activation)

    def _survivors(self, until_s: float) -> dict[int, Survivors]:
        """By GPU, whose leases are not known yet."""
        by_gpu: dict[int, set[str]] = {}
        for entry in self._pool.survivors:
            for gpu_id in entry.gpu_ids:
                by_gpu.setdefault(gpu_id, set()).add(entry.name)
        return {gpu_id: Survivors(until_s=until_s, workers=frozenset(names)) for gpu_id, names in by_gpu.items()}

    def _prepare_next(self) -> None:
        """A few at a time, and while nobody waits for a model that is being brought up."""
        loading = any(tenant.state is ReplicaState.LOADING for tenant in self.scheduler.tenants())
        if self._stopping or loading:
            return
        at_it = sum(worker.chore is not None for worker in self._pool)
        for _ in range(min(self._prepare_at_once - at_it, len(self._to_prepare))):
            chore = stream.Prepare(model=self._to_prepare.popleft(), gpu_ids=(self._joined.gpus[0].gpu_id,))
            self._pool.prepare(chore)

    def _note_preparation(self, message: stream.Prepared) -> None:
        if message.fault:
            log.warning("could not prepare model=%s reason=%s", message.model, message.fault)
        else:
            log.info("prepared model=%s host_bytes=%d took_s=%.3f", message.model, message.host_bytes, message.took_s)

    # The GPUs themselves.

    def note_strangers(self, gpu_id: int, strangers_bytes: int) -> None:
        """Memory that processes of others hold there is nobody's to lease."""
        sampled = events.GpuSampled(gpu_id=gpu_id, strangers_bytes=strangers_bytes)
        log.info("strangers gpu=%d bytes=%d", gpu_id, strangers_bytes)
        self._report(sampled)
        self._hear_of_memory(sampled)

    def note_gpu_lost(self, gpu_id: int, reason: str) -> None:
        """What runs there is lost before its processes are gone: a device that does not answer may keep them for long."""
        log.error("lost gpu=%d reason=%s", gpu_id, reason)
        self._report(events.GpuLost(gpu_id=gpu_id, reason=reason))
        left = tuple(gpu for gpu in self._joined.gpus if gpu.gpu_id != gpu_id)
        self._joined = msgspec.structs.replace(self._joined, gpus=left)
        for worker in list(self._pool):
            if worker.activation is not None and gpu_id in worker.activation.seat.gpu_ids and worker.vigil is not None:
                worker.vigil.signal(signal.SIGKILL)

    # Deciding, and telling control.

    def _decide(self, event: NodeInput) -> None:
        now = time.monotonic()
        decided = self.scheduler.on(event, now)
        if self._decisions is not None:
            self._decisions(self._recorder.line(now, event, decided))
        for action in decided:
            self._perform(action)

    def _report(self, event: Reported) -> None:
        """Control hears of an event after what it has led to: of every end of a request before the end of its replica."""
        self._decide(event)
        self._control.send(event)

    def _obey(self, order: actions.Activate | actions.Deactivate | actions.QueueBy) -> None:
        try:
            self._decide(order)
        except ProtocolError as fault:
            log.error("refused an order of control: %s", fault)

    def _accept(self, route: actions.Route, payload: bytes) -> None:
        known = self._held.get(route.request.request_id)
        if known is not None and known.route.request.tries >= route.request.tries:
            return  # Told twice.
        self._held[route.request.request_id] = _Held(route, payload)
        if self._spans is not None:
            self._spans.begin(route, time.monotonic())
        self._decide(route)

    def _cancel(self, request_id: str) -> None:
        self._held.pop(request_id, None)
        if self._spans is not None:
            self._spans.end(request_id, time.monotonic(), "cancelled")
        self._decide(events.RequestCancelled(request_id=request_id))

    def _forget_admitted(self, request_id: str) -> float | None:
        """When it was admitted. Not one whose payload is still here: then it is an older attempt that has ended."""
        held = self._held.get(request_id)
        if held is None or held.payload is not None:
            return None
        del self._held[request_id]
        return held.admitted_s

    # Carrying out.

    def _perform(self, action: Action) -> None:
        match action:
            case actions.Activate():
                log.info("activate replica=%s gpus=%s reason=%s", action.seat.replica, action.seat.gpu_ids, action.reason)
                self._employ(action)
            case actions.Admit():
                self._submit(action)
            case actions.Abort():
                self._tell(action.replica, action.epoch, action)
            case actions.Preempt():
                log.info("preempt replica=%s request=%s reason=%r", action.replica, action.request_id, action.reason)
                self._tell(action.replica, action.epoch, action)
            case actions.Deactivate() if self.memory is not None and self.memory.waits((action.replica, action.epoch)):
                self._call_off(action)
            case actions.Deactivate():
                log.info("deactivate replica=%s reason=%s", action.replica, action.reason)
                gang = self._pool.gang(action.replica, action.epoch)
                if gang is not None:
                    gang.tell_all(action)
            case actions.Pause() | actions.Resume():
                log.info("%s replica=%s reason=%s", type(action).__name__.lower(), action.replica, action.reason)
                self._tell(action.replica, action.epoch, action)
            case actions.Reject() | actions.Requeue():
                self._held.pop(action.request_id, None)
                if self._spans is not None:
                    fault = str(action.code) if isinstance(action, actions.Reject) else "requeued"
                    self._spans.end(action.request_id, time.monotonic(), fault, action.reason)
                self._control.send(action)
            case actions.WakeAt(at_s=at_s):
                self._wake_at(at_s)
            case _:
                raise TypeError(f"no agent can carry out a {type(action).__name__}")

    def _employ(self, activation: actions.Activate) -> None:
        if self.memory is None:
            self._pool.employ(activation)
            return
        gang = self._pool.promise(activation)
        self.memory.admit(activation, [worker.name for worker in gang.members], time.monotonic())
        self._set_memory_timer()

    def _call_off(self, order: actions.Deactivate) -> None:
        """It waits for its memory still: no engine has heard of it."""
        self._vacate(order.replica, order.epoch)
        stopped = events.ReplicaStopped(replica=order.replica, epoch=order.epoch, reason=order.reason)
        self._report(stopped)
        self._hear_of_memory(stopped)

    def _vacate(self, replica: ReplicaId, epoch: Epoch) -> None:
        """Those who were to become it, and have heard of nothing."""
        gang = self._pool.gang(replica, epoch)
        for worker in () if gang is None else gang.members:
            self._pool.vacate(worker)

    def _submit(self, admitted: actions.Admit) -> None:
        held = self._held.get(admitted.request_id)
        assert held is not None and held.payload is not None, f"{admitted.request_id} was admitted without its payload"
        request, payload = held.route.request, held.payload
        held.payload, held.admitted_s = None, time.monotonic()
        if self._spans is not None:
            trace = self._spans.admit(admitted.request_id, held.admitted_s, admitted.reason)
            request = msgspec.structs.replace(request, trace=trace)
        submission = stream.Submit(
            request_id=admitted.request_id, epoch=admitted.epoch, front=request.front, payload=payload, request=request
        )
        self._tell(admitted.replica, admitted.epoch, submission)

    def _tell(self, replica: ReplicaId, epoch: Epoch | None, message: Message) -> None:
        """To who has the orders in this life of the replica; if there is nobody, its loss is on the way to the scheduler."""
        gang = self._pool.gang(replica, epoch)
        if gang is not None:
            gang.tell(message)

    # Elastic memory.

    def _hear_of_memory(self, event: Event) -> None:
        if self.memory is not None:
            self.memory.hear(event, time.monotonic())
            self._set_memory_timer()

    def _order_pages(self, order: actions.Grant | actions.Recall) -> None:
        name = type(order).__name__.lower()
        log.info("%s replica=%s pages=%d reason=%r", name, order.replica, order.level, order.reason)
        self._done.append(
            Entry(
                at_s=time.monotonic(),
                what=name,
                model=order.replica.model,
                replica=str(order.replica),
                gpus=(order.gpu_id,),
                pages=order.level,
                reason=order.reason,
            )
        )
        self._tell(order.replica, order.epoch, order)

    def _start_replica(self, activation: actions.Activate) -> None:
        gang = self._pool.gang(activation.seat.replica, activation.epoch)
        if gang is not None:  # else its loss is on the way to the scheduler
            gang.start(activation)

    def _fail_replica(self, failed: events.ActivationFailed) -> None:
        self._vacate(failed.replica, failed.epoch)
        log.warning("no memory replica=%s reason=%s", failed.replica, failed.reason)
        # Not from inside the decision that asked for it.
        asyncio.get_running_loop().call_soon(self._report, failed)

    def _have_let_go(self, name: str, order: stream.LetGo) -> None:
        worker = next((worker for worker in self._pool if worker.name == name), None)
        if worker is not None:
            worker.send(order)

    def _stop_worker(self, name: str) -> None:
        worker = next((worker for worker in self._pool if worker.name == name), None)
        if worker is not None:
            self._pool.kill(worker, "it keeps memory that was recalled")

    def _note_room(self) -> None:
        """How much there is for caches, told to the scheduler when it has changed."""
        assert self.memory is not None
        for gpu in self._joined.gpus:
            room_bytes = self.memory.kv_bytes(gpu.gpu_id)
            if self._room_bytes.get(gpu.gpu_id) != room_bytes:
                self._room_bytes[gpu.gpu_id] = room_bytes
                self._decide(events.RoomChanged(gpu_id=gpu.gpu_id, kv_bytes=room_bytes))

    def _set_memory_timer(self) -> None:
        assert self.memory is not None
        # Not from inside the decision that it may be part of.
        asyncio.get_running_loop().call_soon(self._note_room)
        if self._memory_timer is not None:
            self._memory_timer.cancel()
        due_s, loop = self.memory.next_wake_s, asyncio.get_running_loop()
        delay_s = 0.0 if due_s is None else max(0.001, due_s - time.monotonic())
        self._memory_timer = None if due_s is None else loop.call_later(delay_s, self._hear_of_memory, events.Woke())
        if self._ledger_timer is None:
            # Once for all that changes meanwhile; a quiet node sends nothing.
            self._ledger_timer = loop.call_later(_LEDGERS_EVERY_S, self._tell_ledgers)

    def _tell_ledgers(self) -> None:
        self._ledger_timer = None
        if self.memory is not None:
            self._control.send(stream.LedgerTold(view=self.memory.view(time.monotonic())))
        if self._done and self._control.up:
            self._control.send(stream.EntriesTold(entries=tuple(self._done)))
            self._done.clear()
        del self._done[:-_MOST_UNTOLD]

    def _wake_at(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, at_s - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._decide, events.Woke())

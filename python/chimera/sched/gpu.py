"""One GPU: which replicas live here, who waits for them, and when their engines may take the next request.

Owns the queue and the credits of every replica whose first rank sits here, and gives each life of a replica its epoch.
Knows counts and names; does not know what a request says, where its tokens go, or what happens on other GPUs. Whose turn it
is, `turns.py` says.

Invariants: a request is in one place, a queue or an engine; the engine of a replica never holds more requests than it gave
credits; whatever speaks of another epoch than the present one changes nothing. What was in an engine that is lost comes back
to be served elsewhere, unless it was in one that was lost before: then it may be what ends them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import msgspec

from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.msg.actions import (
    Abort,
    Action,
    Activate,
    Admit,
    Deactivate,
    Pause,
    Preempt,
    Reject,
    RejectCode,
    Requeue,
    Resume,
    Route,
)
from chimera.msg.events import (
    ANSWERED,
    ActivationFailed,
    Event,
    ReplicaFound,
    ReplicaReady,
    ReplicaStopped,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    RoomChanged,
    Woke,
    WorkerLost,
)
from chimera.sched.cost import CostTable
from chimera.sched.tenant import Running, Tenant, TenantState
from chimera.sched.turns import Turns, TurnsState

GpuInput = Event | Activate | Deactivate | Route | Abort
"""What happened here, and what control wants done."""

MOST_LOSSES = 1
"""A request that was in an engine at one loss more is not served again."""


class Mint:
    """Makes epochs, each later than all before it. One per agent: a replica may move from GPU to GPU."""

    __slots__ = ("agent_start", "counter")

    def __init__(self, agent_start: int, counter: int = 0) -> None:
        self.agent_start = agent_start
        self.counter = counter

    def next(self) -> Epoch:
        self.counter += 1
        return Epoch(self.agent_start, self.counter)


class GpuState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a `GpuScheduler` remembers."""

    gpu_id: int
    tenants: tuple[TenantState, ...] = ()
    turns: TurnsState = TurnsState()


class GpuScheduler:
    """Order and admission on one GPU. A tensor-parallel replica belongs to the scheduler of its first GPU."""

    def __init__(self, gpu_id: int, mint: Mint, local: str = "fcfs", costs: CostTable | None = None) -> None:
        self.gpu_id = gpu_id
        self._mint = mint
        self._tenants: dict[ReplicaId, Tenant] = {}
        self.turns = Turns(self._tenants, local, costs)
        self._waiting = 0
        """Requests in the queues of all tenants."""
        self._where: dict[str, ReplicaId] = {}
        """The replica whose queue or engine holds the request."""

    def on(self, event: GpuInput, now: float) -> list[Action]:
        match event:
            case RequestFinished():
                return self._finished(event, now)
            case Route():
                return self.arrived(event.request, event.replica, now)
            case Woke():
                return self._admit_all(now) if self.turns.paced else []
            case RequestArrived():
                return self.arrived(event.request, least_loaded(self.tenants(), event.request.model), now)
            case RequestCancelled() | Abort():
                return self._cancelled(event.request_id)
            case Activate():
                return self._activate(event)
            case Deactivate():
                return self._deactivate(event)
            case ReplicaFound():
                return self._found(event, now)
            case ReplicaReady():
                return self._ready(event, now)
            case ReplicaStopped():
                return self._stopped(event)
            case ActivationFailed():
                return self._not_activated(event)
            case WorkerLost():
                return self._worker_lost(event)
            case RoomChanged():
                self.turns.room_told(event.kv_bytes)
                return self._admit_all(now) if self.turns.paced else []
            case _:
                return []

    # What a loop or a node asks.

    def knows(self, replica: ReplicaId) -> bool:
        return replica in self._tenants

    def holds(self, request_id: str) -> bool:
        return request_id in self._where

    def tenants(self) -> Iterator[Tenant]:
        return iter(self._tenants.values())

    @property
    def wake_s(self) -> float | None:
        """When some engine should be through its prompts and can be given more; `None` if no request waits for that."""
        return self.turns.wake_s

    def order_by(self, local: str, costs: CostTable | None, now: float) -> list[Action]:
        """Requests go by another order, or by other costs, from now on."""
        done: list[Action] = []
        if local != self.turns.local:
            done = [self._resume(tenant, "nobody has to wait for it any more") for tenant in self.turns.go_on(math.inf)]
            self.turns.wake_s = None
            for tenant in self.tenants():
                tenant.order_by(local, costs)
        self.turns.local, self.turns.costs = local, costs
        for tenant in self.tenants():
            done += self._admit(tenant, now)
        return done

    def slowdown(self, replica: ReplicaId) -> float:
        """What the neighbours of a replica account for at the moment."""
        return self.turns.slowdown(self._tenants[replica])

    def reprice(self, model: str, costs: CostTable) -> None:
        """What work costs is known better; those who wait for the model are measured anew."""
        self.turns.costs = costs
        for tenant in self.tenants():
            if tenant.replica.model == model:
                tenant.order_by(self.turns.local, costs)

    # Replicas.

    def _activate(self, order: Activate) -> list[Action]:
        tenant = self._tenants.get(order.seat.replica)
        if tenant is None:
            tenant = Tenant(order.model, order.seat, self._mint.next(), self.turns.local, self.turns.costs)
            self._tenants[tenant.replica] = tenant
        elif tenant.state is ReplicaState.STOPPED:
            tenant.seat, tenant.epoch, tenant.state = order.seat, self._mint.next(), ReplicaState.LOADING
        elif tenant.seat.gpu_ids != order.seat.gpu_ids and tenant.state is not ReplicaState.DRAINING:
            return self._leave(
                tenant, order.model.drain_s, f"its seat moves from GPUs {_gpus(tenant.seat)} to {_gpus(order.seat)}"
            )
        else:
            return []
        waiting = f"; {len(tenant.queue)} requests wait for it" if len(tenant.queue) else ""
        return [
            Activate(
                model=order.model,
                seat=order.seat,
                epoch=tenant.epoch,
                reason=f"{order.reason}; life {tenant.epoch}{waiting}",
                trace=order.trace,
            )
        ]

    def _deactivate(self, order: Deactivate) -> list[Action]:
        tenant = self._tenants.get(order.replica)
        if tenant is None or tenant.epoch != order.epoch or tenant.state is ReplicaState.DRAINING:
            return []
        if tenant.state is ReplicaState.STOPPED:
            return self.evict(tenant.replica, order.reason)
        return self._leave(tenant, order.drain_s, order.reason)

    def _leave(self, tenant: Tenant, drain_s: float, reason: str) -> list[Action]:
        tenant.state = ReplicaState.DRAINING
        return [
            *self._requeue_waiting(tenant, f"{tenant.replica} leaves GPU {self.gpu_id}: {reason}"),
            *self._wake_up(tenant, "it leaves"),
            Deactivate(
                replica=tenant.replica,
                epoch=tenant.epoch,
                drain_s=drain_s,
                reason=f"{reason}; {len(tenant.running)} running requests have {drain_s:g} s to end",
            ),
        ]

    def _ready(self, event: ReplicaReady, now: float) -> list[Action]:
        tenant = self._living(event.replica, event.epoch)
        if tenant is None or tenant.state is not ReplicaState.LOADING:
            return []
        tenant.state, tenant.ready, tenant.load_s = ReplicaState.SERVING, event, event.load_s
        self.turns.came_up(tenant, event.kv_tokens)
        return self._admit(tenant, now)

    def _found(self, event: ReplicaFound, now: float) -> list[Action]:
        """It goes on with what it runs; what waited for it was lost with the agent."""
        tenant = Tenant(event.model, event.seat, event.ready.epoch, self.turns.local, self.turns.costs)
        tenant.state = ReplicaState.DRAINING if event.leaving else ReplicaState.SERVING
        tenant.ready, tenant.load_s = event.ready, event.ready.load_s
        for request in event.running:
            tenant.take(request, now)
            self._where[request.request_id] = tenant.replica
        self._tenants[tenant.replica] = tenant
        return []

    def _stopped(self, event: ReplicaStopped) -> list[Action]:
        tenant = self._living(event.replica, event.epoch)
        if tenant is None:
            return []
        reason = f"{tenant.replica} has left GPU {self.gpu_id}: {event.reason}"
        left = [_requeue(request, reason) for request in self._clear_engine(tenant)]
        waiting = self._requeue_waiting(tenant, reason)
        del self._tenants[tenant.replica]
        self.turns.left(tenant)
        return [*left, *waiting]

    def _not_activated(self, event: ActivationFailed) -> list[Action]:
        tenant = self._living(event.replica, event.epoch)
        if tenant is None:
            return []
        reason = f"{tenant.replica} could not be brought up: {event.reason}"
        actions = self._lost(tenant, reason)
        if event.permanent and self.knows(event.replica):
            # No next life will come to serve those who wait, and a restarted control may not know that they wait here.
            actions += self.evict(event.replica, reason)
        return actions

    def _worker_lost(self, event: WorkerLost) -> list[Action]:
        if event.replica is None or event.epoch is None:
            return []
        tenant = self._living(event.replica, event.epoch)
        return [] if tenant is None else self._lost(tenant, f"the engine serving this request was lost: {event.reason}")

    def _lost(self, tenant: Tenant, reason: str) -> list[Action]:
        """This life is over. What its engine held goes back to its front-ends; what waits, waits on."""
        left = self._clear_engine(tenant)
        if tenant.state is ReplicaState.DRAINING:
            del self._tenants[tenant.replica]
        tenant.state, tenant.ready = ReplicaState.STOPPED, None
        return [self._sent_back(request, tenant, reason) for request in left]

    def _sent_back(self, request: Request, tenant: Tenant, reason: str) -> Requeue | Reject:
        if request.losses < MOST_LOSSES:
            return Requeue(request_id=request.request_id, front=request.front, reason=reason, fault=True, lost=True)
        return Reject(
            request_id=request.request_id,
            front=request.front,
            code=RejectCode.WORKER_LOST,
            retry_after_s=tenant.load_s,
            reason=f"{reason}; it is the {_nth(request.losses + 1)} engine lost with this request in it, which may be why",
        )

    def lose(self, replica: ReplicaId, reason: str) -> list[Action]:
        """Like a lost worker, but no next life comes for those who wait."""
        tenant = self._tenants[replica]
        actions = self._lost(tenant, f"the engine serving this request was lost: {reason}")
        return actions + self.evict(replica, reason) if self.knows(replica) else actions

    def _living(self, replica: ReplicaId, epoch: Epoch) -> Tenant | None:
        """The tenant, if `epoch` is its present life."""
        tenant = self._tenants.get(replica)
        if tenant is None or tenant.epoch != epoch or tenant.state is ReplicaState.STOPPED:
            return None
        return tenant

    def evict(self, replica: ReplicaId, reason: str) -> list[Action]:
        """Forgets a tenant that has no life here, and sends its waiting requests back."""
        tenant = self._tenants[replica]
        assert tenant.state is ReplicaState.STOPPED, f"{replica} is {tenant.state}"
        waiting = self._requeue_waiting(tenant, reason)
        del self._tenants[replica]
        return waiting

    # Requests.

    def arrived(self, request: Request, replica: ReplicaId | None, now: float) -> list[Action]:
        if request.request_id in self._where:
            return []
        tenant = None if replica is None else self._tenants.get(replica)
        if tenant is None or tenant.state is ReplicaState.DRAINING:
            return [_requeue(request, f"{replica or request.model} is not on GPU {self.gpu_id}, or is leaving it")]
        self._enqueue(request, tenant)
        return self._admit(tenant, now)

    def _cancelled(self, request_id: str) -> list[Action]:
        replica = self._where.get(request_id)
        if replica is None:
            return []
        tenant = self._tenants[replica]
        if request_id in tenant.queue:
            self._unqueue(request_id, tenant)
            return []
        if request_id in tenant.ending:
            return []
        tenant.ending.add(request_id)
        reason = "its client left, or it is served elsewhere"
        return [Abort(request_id=request_id, replica=replica, epoch=tenant.epoch, reason=reason)]

    def _finished(self, event: RequestFinished, now: float) -> list[Action]:
        tenant = self._living(event.replica, event.epoch)
        if tenant is None or event.request_id not in tenant.running:
            return []
        tenant.give_back(event.request_id)
        del self._where[event.request_id]
        if event.outcome in ANSWERED:
            tenant.answered(event.output_tokens)
        return self._admit(tenant, now)

    def _enqueue(self, request: Request, tenant: Tenant) -> None:
        tenant.queue.push(request)
        self._where[request.request_id] = tenant.replica
        self._waiting += 1

    def _unqueue(self, request_id: str, tenant: Tenant) -> None:
        """It leaves without its turn."""
        tenant.queue.remove(request_id)
        del self._where[request_id]
        self._waiting -= 1

    def _admit(self, tenant: Tenant, now: float) -> list[Action]:
        """Fills the free credits from the queues, as far as the engines can use them."""
        if self.turns.paced:
            return self._admit_all(now)
        admitted: list[Action] = []
        while len(tenant.queue) and tenant.free_credits > 0:
            admitted.append(self._give(tenant, now))
        return admitted

    def _admit_all(self, now: float) -> list[Action]:
        """Everyone whose turn it is, whoever makes way for others, and whoever has stood still for long enough."""
        turns = self.turns
        done: list[Action] = []
        if turns.standing():
            done += [self._resume(tenant, "its time to stand still is over") for tenant in turns.go_on(now)]
        elif not self._waiting:
            turns.wake_s = None
            return done
        for waited_for in [t for t in self._tenants.values() if len(t.queue)]:
            done += self._turn_away(waited_for, now)
        while self._waiting and (tenant := turns.next(now)) is not None:
            done += self._give_its_turn(tenant, now)
        if not self._waiting:
            turns.wake_s = None
        elif (way := turns.make_way(now)) is not None:
            done.append(self._preempt(*way))
        turns.note_standing()
        return done

    def _give_its_turn(self, tenant: Tenant, now: float) -> Iterator[Action]:
        admitted = self._give(tenant, now)
        request = tenant.running[admitted.request_id].request
        for neighbour, for_s in self.turns.stand_still(tenant, request, now):
            reason = f"{request.request_id} of {tenant.replica} would be late beside it, and it has no promise to keep"
            yield Pause(replica=neighbour.replica, epoch=neighbour.epoch, for_s=for_s, reason=reason)
        self.turns.gave(tenant, request, now)
        yield admitted

    def _give(self, tenant: Tenant, now: float) -> Admit:
        request = tenant.queue.pop(now)
        self._waiting -= 1
        tenant.take(request, now)
        return Admit(
            request_id=request.request_id,
            replica=tenant.replica,
            epoch=tenant.epoch,
            reason=f"its turn after {max(0.0, now - request.arrived_s):.3f} s: {len(tenant.running)} of "
            f"{tenant.credits} credits in use, {len(tenant.queue)} wait",
        )

    def _preempt(self, tenant: Tenant, running: Running, urgent: Request) -> Preempt:
        request = running.request
        tenant.yielding.add(request.request_id)
        why = "its own first token was late" if running.late else "nothing is promised to it"
        return Preempt(
            request_id=request.request_id,
            replica=tenant.replica,
            epoch=tenant.epoch,
            reason=f"{urgent.request_id} of {urgent.model} would be late for want of its place, and {why}; "
            f"it makes way for the {_nth(request.preempted + 1)} time",
        )

    def _resume(self, tenant: Tenant, reason: str) -> Resume:
        return Resume(replica=tenant.replica, epoch=tenant.epoch, reason=reason)

    def _wake_up(self, tenant: Tenant, reason: str) -> list[Action]:
        if tenant.standing_until_s is None:
            return []
        tenant.standing_until_s = None
        return [self._resume(tenant, reason)]

    def _turn_away(self, tenant: Tenant, now: float) -> list[Action]:
        """Those of the strict that cannot be in time."""
        begin_s = self.turns.begin_s(tenant, now)
        return [self._too_late(request, tenant, begin_s - now) for request in tenant.queue.hopeless(begin_s)]

    def _too_late(self, request: Request, tenant: Tenant, begins_in_s: float) -> Reject:
        """With the moment from which one like it could be in time."""
        self._unqueue(request.request_id, tenant)
        seconds, promise_s = tenant.prefill_s(request), request.slo.ttft_s or 0.0
        free_s = begins_in_s + tenant.queue.backlog_s()
        reason = f"its first token cannot come within {promise_s:g} s: {len(tenant.queue)} wait for {tenant.replica}"
        if seconds > promise_s:
            reason = f"its prompt alone takes {seconds:.2f} s, and its first token is due within {promise_s:g} s"
        return Reject(
            request_id=request.request_id,
            front=request.front,
            code=RejectCode.SLO_UNATTAINABLE,
            retry_after_s=None if seconds > promise_s else max(seconds, free_s + seconds - promise_s),
            reason=reason,
        )

    def _requeue_waiting(self, tenant: Tenant, reason: str) -> list[Action]:
        waiting = list(tenant.queue)
        for request in waiting:
            self._unqueue(request.request_id, tenant)
        return [_requeue(request, reason) for request in waiting]

    def _clear_engine(self, tenant: Tenant) -> list[Request]:
        """The engine holds nothing any more. Returns those of its requests that somebody still waits for."""
        left = [r.request for request_id, r in tenant.running.items() if request_id not in tenant.ending]
        for request_id in list(tenant.running):
            del self._where[request_id]
            tenant.give_back(request_id)
        tenant.standing_until_s = None
        tenant.busy_until_s = 0.0
        return left

    # Memory.

    def state(self) -> GpuState:
        tenants = tuple(tenant.memory() for tenant in self.tenants())
        return GpuState(gpu_id=self.gpu_id, tenants=tenants, turns=self.turns.state())

    @classmethod
    def from_state(cls, state: GpuState, mint: Mint, local: str = "fcfs", costs: CostTable | None = None) -> GpuScheduler:
        scheduler = cls(state.gpu_id, mint, local, costs)
        scheduler.turns.revive(state.turns)
        for told in state.tenants:
            tenant = Tenant.from_memory(told, local, costs)
            scheduler._tenants[tenant.replica] = tenant
            held = [*tenant.running, *(request.request_id for request in tenant.queue)]
            scheduler._where.update(dict.fromkeys(held, tenant.replica))
            scheduler._waiting += len(tenant.queue)
        return scheduler

    def check(self) -> None:
        """Raises if an invariant of this module does not hold."""
        found: list[str] = []
        for replica, tenant in self._tenants.items():
            held = [*(request.request_id for request in tenant.queue), *tenant.running]
            found += held
            assert all(self._where.get(request_id) == replica for request_id in held), f"{replica} holds what is elsewhere"
            assert len(tenant.running) <= tenant.credits or not tenant.running, f"{replica} runs more than its credits"
            told = tenant.ending | tenant.yielding
            assert told <= tenant.running.keys(), f"{replica} ends what it does not run"
            paced = self.turns.paced and any(t.running for t in self.tenants())
            assert paced or not (tenant.free_credits > 0 and len(tenant.queue)), f"{replica} keeps a request from a free credit"
            assert not tenant.running or tenant.ready is not None, f"{replica} runs requests before it was ready"
            assert tenant.state is not ReplicaState.DRAINING or not len(tenant.queue), f"{replica} queues while it leaves"
            assert tenant.epoch <= Epoch(self._mint.agent_start, self._mint.counter), f"{replica} has an epoch of the future"
        assert len(found) == len(set(found)) == len(self._where), "a request is in two places, or in none"
        assert self._waiting == sum(len(tenant.queue) for tenant in self.tenants()), "those that wait are miscounted"


def _requeue(request: Request, reason: str) -> Requeue:
    return Requeue(request_id=request.request_id, front=request.front, reason=reason)


def _nth(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def _gpus(seat: Seat) -> str:
    return "+".join(str(gpu_id) for gpu_id in seat.gpu_ids)


def least_loaded(tenants: Iterable[Tenant], model: str) -> ReplicaId | None:
    """The replica of the model with the fewest requests, for a request whose sender named none."""
    open_tenants = [t for t in tenants if t.replica.model == model and t.state is not ReplicaState.DRAINING]
    return min(open_tenants, key=lambda t: (len(t.queue) + len(t.running), t.replica)).replica if open_tenants else None

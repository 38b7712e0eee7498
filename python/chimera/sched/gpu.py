"""One GPU: which of its waiting requests goes next, and when its replica may take it.

Owns the queue and the credits of every replica whose first rank sits here, and gives each life of a replica its epoch.
Knows counts and names; does not know what a request says, where its tokens go, or what happens on other GPUs.

Under a local policy that knows deadlines, an engine is given no more prompts than it prefills in a moment, so that the order
stays ours, and all queues of the GPU take turns. Under `goodput` prompts also leave time for the decodes of those that run,
and a request waits here while there is no room for its cache. Work goes on whatever the estimates say: a GPU that runs
nothing is always given the next request.

Invariants: a request is in one place, a queue or an engine; the engine of a replica never holds more requests than it gave
credits; whatever speaks of another epoch than the present one changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.msg.actions import Abort, Action, Activate, Admit, Deactivate, Reject, RejectCode, Requeue, Route
from chimera.msg.events import (
    ActivationFailed,
    Event,
    ReplicaFound,
    ReplicaReady,
    ReplicaStopped,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    Woke,
    WorkerLost,
)
from chimera.sched.cost import CostTable, EngineCost
from chimera.sched.queues import Queue, queue_named

GpuInput = Event | Activate | Deactivate | Route | Abort
"""What happened here, and what control wants done."""

LATE_TURN = 8
"""Of so many turns one is for a request that is late already, the oldest: n late ones are gone after n × 8 turns."""
LEAST_DUTY = 0.3
"""An engine may always spend this share of its time on prompts, whatever its decodes suffer."""
AHEAD_S = 0.1
"""So much prefill an engine may have before it beyond the prompt it is at."""


class Mint:
    """Makes epochs, each later than all before it. One per agent: a replica may move from GPU to GPU."""

    __slots__ = ("agent_start", "counter")

    def __init__(self, agent_start: int, counter: int = 0) -> None:
        self.agent_start = agent_start
        self.counter = counter

    def next(self) -> Epoch:
        self.counter += 1
        return Epoch(self.agent_start, self.counter)


class Tenant:
    """A replica on this GPU: its present life, who waits for it, and whom it serves."""

    __slots__ = (
        "busy_until_s",
        "context_tokens",
        "cost",
        "ending",
        "epoch",
        "final_tokens",
        "load_s",
        "model",
        "queue",
        "ready",
        "running",
        "seat",
        "state",
    )

    def __init__(self, model: ModelSpec, seat: Seat, epoch: Epoch, local: str, costs: CostTable | None) -> None:
        self.model = model
        self.seat = seat
        self.epoch = epoch
        self.cost: EngineCost | None = None if costs is None or local == "fcfs" else costs.of(model)
        """Empty when requests are handed on as soon as there are credits."""
        self.busy_until_s = 0.0
        """When the prompts that the engine was given should be through."""
        self.state = ReplicaState.LOADING
        self.ready: ReplicaReady | None = None
        self.load_s: float | None = None
        self.queue: Queue = queue_named(local, self.prefill_s)
        self.running: dict[str, Request] = {}
        self.context_tokens = 0
        """Of the running, half through."""
        self.final_tokens = 0
        """Of the running, at their ends."""
        self.ending: set[str] = set()
        """Of the running, those the engine was told to stop; it holds them until it says that they have ended."""

    def take(self, request: Request) -> None:
        self.running[request.request_id] = request
        self.context_tokens += request.prompt_tokens + request.max_tokens // 2
        self.final_tokens += request.final_tokens

    def give_back(self, request_id: str) -> None:
        request = self.running.pop(request_id)
        self.context_tokens -= request.prompt_tokens + request.max_tokens // 2
        self.final_tokens -= request.final_tokens

    def prefill_s(self, request: Request) -> float:
        return 0.0 if self.cost is None else self.cost.prompt_s(request.prompt_tokens)

    @property
    def replica(self) -> ReplicaId:
        return self.seat.replica

    @property
    def credits(self) -> int:
        return self.ready.credits if self.ready else 0

    @property
    def free_credits(self) -> int:
        return self.credits - len(self.running) if self.state is ReplicaState.SERVING else 0


class TenantState(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSpec
    seat: Seat
    epoch: Epoch
    state: ReplicaState
    ready: ReplicaReady | None
    load_s: float | None
    queued: tuple[Request, ...]
    running: tuple[Request, ...]
    ending: tuple[str, ...]
    busy_until_s: float = 0.0


class GpuState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a `GpuScheduler` remembers."""

    gpu_id: int
    tenants: tuple[TenantState, ...] = ()
    passed: int = 0
    room_bytes: int = 0
    wake_s: float | None = None


class GpuScheduler:
    """Order and admission on one GPU. A tensor-parallel replica belongs to the scheduler of its first GPU."""

    def __init__(self, gpu_id: int, mint: Mint, local: str = "fcfs", costs: CostTable | None = None) -> None:
        self.gpu_id = gpu_id
        self._mint = mint
        self._local = local
        self._costs = costs
        self._room_bytes = 0
        """For the caches of all tenants together, as the newest of them found it."""
        self._wake_s: float | None = None
        self._passed = 0
        """Turns on this GPU since a late request had one."""
        self._tenants: dict[ReplicaId, Tenant] = {}
        self._where: dict[str, ReplicaId] = {}
        """The replica whose queue or engine holds the request."""

    def on(self, event: GpuInput, now: float) -> list[Action]:
        match event:
            case RequestFinished():
                return self._finished(event, now)
            case Route():
                return self._arrived(event.request, event.replica, now)
            case RequestArrived():
                return self._arrived(event.request, least_loaded(self.tenants(), event.request.model), now)
            case RequestCancelled() | Abort():
                return self._cancelled(event.request_id)
            case Activate():
                return self._activate(event)
            case Deactivate():
                return self._deactivate(event)
            case ReplicaFound():
                return self._found(event)
            case ReplicaReady():
                return self._ready(event, now)
            case ReplicaStopped():
                return self._stopped(event)
            case ActivationFailed():
                return self._not_activated(event)
            case WorkerLost():
                return self._worker_lost(event)
            case Woke():
                return self._admit_all(now) if self._costs is not None and self._local != "fcfs" else []
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
        return self._wake_s

    # Replicas.

    def _activate(self, order: Activate) -> list[Action]:
        tenant = self._tenants.get(order.seat.replica)
        if tenant is None:
            tenant = Tenant(order.model, order.seat, self._mint.next(), self._local, self._costs)
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
                model=order.model, seat=order.seat, epoch=tenant.epoch, reason=f"{order.reason}; life {tenant.epoch}{waiting}"
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
        held = sum(t.model.kv_bytes(t.final_tokens) for t in self.tenants())
        self._room_bytes = tenant.model.kv_bytes(event.kv_tokens) + held
        return self._admit(tenant, now)

    def _found(self, event: ReplicaFound) -> list[Action]:
        """It goes on with what it runs; what waited for it was lost with the agent."""
        tenant = Tenant(event.model, event.seat, event.ready.epoch, self._local, self._costs)
        tenant.state = ReplicaState.DRAINING if event.leaving else ReplicaState.SERVING
        tenant.ready, tenant.load_s = event.ready, event.ready.load_s
        for request in event.running:
            tenant.take(request)
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
        if self._costs is not None:
            self._room_bytes += self._costs.resident_bytes(tenant.model)
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
        """This life is over. What the engine held ends here, for its client may have seen tokens; what waits, waits on."""
        left = self._clear_engine(tenant)
        if tenant.state is ReplicaState.DRAINING:
            del self._tenants[tenant.replica]
        tenant.state, tenant.ready = ReplicaState.STOPPED, None
        return [
            Reject(
                request_id=request.request_id,
                front=request.front,
                code=RejectCode.WORKER_LOST,
                retry_after_s=tenant.load_s,
                reason=reason,
            )
            for request in left
        ]

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

    def _arrived(self, request: Request, replica: ReplicaId | None, now: float) -> list[Action]:
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
        if tenant.queue.remove(request_id) is not None:
            del self._where[request_id]
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
        tenant.ending.discard(event.request_id)
        return self._admit(tenant, now)

    def _enqueue(self, request: Request, tenant: Tenant) -> None:
        tenant.queue.push(request)
        self._where[request.request_id] = tenant.replica

    def _admit(self, tenant: Tenant, now: float) -> list[Action]:
        """Fills the free credits from the queues, as far as the engines can use them."""
        if tenant.cost is None:
            admitted: list[Action] = []
            while tenant.free_credits > 0 and len(tenant.queue):
                admitted.append(self._give(tenant, now))
            return admitted
        return self._admit_all(now)

    def _admit_all(self, now: float) -> list[Action]:
        """Whose turn it is among all that wait on this GPU: in time before late, by deadline; now and then the oldest late."""
        self._wake_s = None
        waiting = [t for t in self._tenants.values() if len(t.queue)]
        done: list[Action] = [action for tenant in waiting for action in self._turn_away(tenant, now)]
        while waiting:
            waiting = [t for t in waiting if len(t.queue) and t.free_credits > 0]
            if not waiting:
                return done
            moments = (moment_s for t in waiting if (moment_s := t.busy_until_s - AHEAD_S) > now)
            self._wake_s = min(moments, default=None)
            if self._passed >= LATE_TURN and any(t.queue.turn(now)[0] for t in waiting):
                oldest = min(waiting, key=lambda t: (not t.queue.turn(now)[0], t.queue.turn(now)[1], t.replica))
                if not self._may_take(oldest, now):
                    return done  # the others have had their turns
                self._passed = 0
                done.append(self._give(oldest, now))
                continue
            order = sorted(waiting, key=lambda t: (*t.queue.turn(now), t.replica)) if len(waiting) > 1 else waiting
            chosen = next((t for t in order if self._may_take(t, now)), None)
            if chosen is None:
                return done
            self._passed += 1
            done.append(self._give(chosen, now))
        return done

    def _give(self, tenant: Tenant, now: float) -> Admit:
        request = tenant.queue.pop(now)
        tenant.take(request)
        if tenant.cost is not None:
            seconds = tenant.prefill_s(request) * self._slowdown(tenant) / self._duty(tenant)
            tenant.busy_until_s = max(now, tenant.busy_until_s) + seconds
        return Admit(
            request_id=request.request_id,
            replica=tenant.replica,
            epoch=tenant.epoch,
            reason=f"its turn after {max(0.0, now - request.arrived_s):.3f} s: {len(tenant.running)} of "
            f"{tenant.credits} credits in use, {len(tenant.queue)} wait",
        )

    def _turn_away(self, tenant: Tenant, now: float) -> list[Action]:
        turned: list[Action] = []
        for request in tenant.queue.hopeless(now):
            tenant.queue.remove(request.request_id)
            del self._where[request.request_id]
            reason = f"its first token cannot come within {request.slo.ttft_s} s any more; {len(tenant.queue)} wait"
            code = RejectCode.SLO_UNATTAINABLE
            turned.append(
                Reject(request_id=request.request_id, front=request.front, code=code, retry_after_s=1.0, reason=reason)
            )
        return turned

    def _slowdown(self, tenant: Tenant) -> float:
        """How much longer the tenant's steps take beside the engines that run something here."""
        if self._costs is None:
            return 1.0
        return self._costs.slowdown(1 + sum(bool(t.running) for t in self.tenants() if t is not tenant))

    def _may_take(self, tenant: Tenant, now: float) -> bool:
        """Whether the engine has use for one more request now, rather than soon."""
        if tenant.cost is None or not any(t.running for t in self.tenants()):
            return True
        if tenant.running and tenant.busy_until_s > now + AHEAD_S:
            return False
        return self._local != "goodput" or self._has_room(tenant)

    def _has_room(self, tenant: Tenant) -> bool:
        """Whether the caches of all that run here leave room for one more like them; if not, its order is better kept here."""
        limit_bytes = tenant.seat.kv_limit_bytes
        count = len(tenant.running)
        wanted_tokens = tenant.final_tokens * (count + 1) // max(1, count)
        if limit_bytes is not None:
            return tenant.model.kv_bytes(wanted_tokens) <= limit_bytes
        held = sum(t.model.kv_bytes(t.final_tokens) for t in self.tenants() if t is not tenant)
        return held + tenant.model.kv_bytes(wanted_tokens) <= self._room_bytes

    def _duty(self, tenant: Tenant) -> float:
        """The share of its time that the engine may spend on prompts, so that those it decodes keep their TPOT."""
        promise_s = tenant.model.slo.tpot_s
        if self._local != "goodput" or promise_s is None or tenant.cost is None or not tenant.running:
            return 1.0
        if self._slowdown(tenant) > 1:
            return 1.0  # what neighbours spoil, fewer prompts do not mend
        return max(LEAST_DUTY, 1 - tenant.cost.decode_s(len(tenant.running), tenant.context_tokens) / promise_s)

    def _requeue_waiting(self, tenant: Tenant, reason: str) -> list[Action]:
        waiting = list(tenant.queue)
        for request in waiting:
            tenant.queue.remove(request.request_id)
            del self._where[request.request_id]
        return [_requeue(request, reason) for request in waiting]

    def _clear_engine(self, tenant: Tenant) -> list[Request]:
        """The engine holds nothing any more. Returns those of its requests that somebody still waits for."""
        left = [request for request_id, request in tenant.running.items() if request_id not in tenant.ending]
        for request_id in tenant.running:
            del self._where[request_id]
        for request_id in list(tenant.running):
            tenant.give_back(request_id)
        tenant.ending.clear()
        return left

    # Memory.

    def state(self) -> GpuState:
        return GpuState(
            gpu_id=self.gpu_id,
            passed=self._passed,
            room_bytes=self._room_bytes,
            wake_s=self._wake_s,
            tenants=tuple(
                TenantState(
                    model=t.model,
                    seat=t.seat,
                    epoch=t.epoch,
                    state=t.state,
                    ready=t.ready,
                    load_s=t.load_s,
                    queued=tuple(t.queue),
                    running=tuple(t.running.values()),
                    ending=tuple(sorted(t.ending)),
                    busy_until_s=t.busy_until_s,
                )
                for t in self._tenants.values()
            ),
        )

    @classmethod
    def from_state(cls, state: GpuState, mint: Mint, local: str = "fcfs", costs: CostTable | None = None) -> GpuScheduler:
        scheduler = cls(state.gpu_id, mint, local, costs)
        scheduler._passed = state.passed
        scheduler._room_bytes = state.room_bytes
        scheduler._wake_s = state.wake_s
        for told in state.tenants:
            tenant = Tenant(told.model, told.seat, told.epoch, local, costs)
            tenant.busy_until_s = told.busy_until_s
            tenant.state, tenant.ready, tenant.load_s = told.state, told.ready, told.load_s
            for request in told.running:
                tenant.take(request)
            tenant.ending = set(told.ending)
            scheduler._tenants[tenant.replica] = tenant
            scheduler._where.update(dict.fromkeys(tenant.running, tenant.replica))
            for request in told.queued:
                scheduler._enqueue(request, tenant)
        return scheduler

    def check(self) -> None:
        """Raises if an invariant of this module does not hold."""
        found: list[str] = []
        for replica, tenant in self._tenants.items():
            held = [*(request.request_id for request in tenant.queue), *tenant.running]
            found += held
            assert all(self._where.get(request_id) == replica for request_id in held), f"{replica} holds what is elsewhere"
            assert len(tenant.running) <= tenant.credits or not tenant.running, f"{replica} runs more than its credits"
            assert tenant.ending <= tenant.running.keys(), f"{replica} ends what it does not run"
            paced = tenant.cost is not None and any(t.running for t in self.tenants())
            assert paced or not (tenant.free_credits > 0 and len(tenant.queue)), f"{replica} keeps a request from a free credit"
            assert not tenant.running or tenant.ready is not None, f"{replica} runs requests before it was ready"
            assert tenant.state is not ReplicaState.DRAINING or not len(tenant.queue), f"{replica} queues while it leaves"
            assert tenant.epoch <= Epoch(self._mint.agent_start, self._mint.counter), f"{replica} has an epoch of the future"
        assert len(found) == len(set(found)) == len(self._where), "a request is in two places, or in none"


def _requeue(request: Request, reason: str) -> Requeue:
    return Requeue(request_id=request.request_id, front=request.front, reason=reason)


def _gpus(seat: Seat) -> str:
    return "+".join(str(gpu_id) for gpu_id in seat.gpu_ids)


def least_loaded(tenants: Iterable[Tenant], model: str) -> ReplicaId | None:
    """The replica of the model with the fewest requests, for a request whose sender named none."""
    open_tenants = [t for t in tenants if t.replica.model == model and t.state is not ReplicaState.DRAINING]
    return min(open_tenants, key=lambda t: (len(t.queue) + len(t.running), t.replica)).replica if open_tenants else None

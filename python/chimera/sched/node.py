"""The GPUs of one agent: hands every event to the GPU scheduler that it concerns.

Owns the agent's epochs and the map from replicas and requests to their home GPU; decides nothing else. A tensor-parallel
replica lives with the scheduler of its first GPU. Knows no worker, no process and no payload.

What the agent's loop owes beyond the package's contract: it carries out the actions of an event (`Reject` and `Requeue`
go up to control) before it forwards that event, so control hears of every request of a life before it hears of its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.errors import ProtocolError
from chimera.msg.actions import Abort, Action, Activate, Deactivate, QueueBy, Requeue, Route, WakeAt
from chimera.msg.events import (
    ActivationFailed,
    GpuLost,
    PagesReturned,
    PagesWanted,
    ReplicaFound,
    ReplicaReady,
    ReplicaStopped,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    RoomChanged,
    StepsTimed,
    Woke,
    WorkerLost,
)
from chimera.sched import refine
from chimera.sched.cost import CostTable
from chimera.sched.gpu import GpuInput, GpuScheduler, GpuState, Mint, least_loaded
from chimera.sched.queues import LOCAL_POLICIES
from chimera.sched.tenant import Tenant

NodeInput = GpuInput | QueueBy


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a `NodeScheduler` remembers."""

    agent: str
    agent_start: int
    counter: int
    gpus: tuple[GpuState, ...]
    local: str = "fcfs"
    costs: CostTable | None = None
    wake_s: float | None = None
    lost: tuple[int, ...] = ()
    learns: bool = False


class NodeScheduler:
    """All GPU schedulers of one agent behind one door.

    `local` says in which order requests go; what knows more than deadlines needs a cost table. One that `learns` corrects the
    table by what it sees.
    """

    def __init__(
        self,
        agent: str,
        agent_start: int,
        gpu_ids: Sequence[int],
        *,
        local: str = "fcfs",
        costs: CostTable | None = None,
        learns: bool = False,
    ) -> None:
        self.agent = agent
        self._mint = Mint(agent_start)
        self._local = local
        self._costs = costs
        self._learns = learns
        self._wake_s: float | None = None
        self._lost: set[int] = set()
        """GPUs that answer no more."""
        self._gpus = {gpu_id: GpuScheduler(gpu_id, self._mint, local, costs) for gpu_id in gpu_ids}
        self._homes: dict[ReplicaId, GpuScheduler] = {}
        """Where a replica was found last; it may have left since."""

    def on(self, event: NodeInput, now: float) -> list[Action]:
        actions = self._decide(event, now)
        soonest = None
        for gpu in self._gpus.values():
            wake_s = gpu.turns.wake_s
            if wake_s is not None and (soonest is None or wake_s < soonest):
                soonest = wake_s
        if soonest is None or (self._wake_s is not None and now < self._wake_s <= soonest):
            return actions
        self._wake_s = soonest
        return [*actions, WakeAt(at_s=soonest, reason="an engine should be through its prompts")]

    def _decide(self, event: NodeInput, now: float) -> list[Action]:
        match event:  # what comes with every request first
            case Route():
                return self._arrived(event.request, event.replica, now)
            case (
                RequestFinished()
                | Deactivate()
                | ReplicaStopped()
                | ActivationFailed()
                | WorkerLost()
                | PagesWanted()
                | PagesReturned()
            ):
                home = None if event.replica is None else self._home(event.replica)
                return [] if home is None else home.on(event, now)
            case Activate():
                return self._activate(event, now)
            case RequestArrived():
                return self._arrived(event.request, least_loaded(self.tenants(), event.request.model), now)
            case RequestCancelled() | Abort():
                return self._cancelled(event, now)
            case ReplicaFound():
                return self._found(event, now)
            case QueueBy():
                return self._order_by(event.local, now)
            case GpuLost():
                return self._gpu_lost(event)
            case RoomChanged():
                return self._gpus[event.gpu_id].on(event, now) if event.gpu_id in self._gpus else []
            case Woke():
                self._wake_s = None
                return [action for gpu in self._gpus.values() for action in gpu.on(event, now)]
            case StepsTimed():
                self._learn_steps(event)
                return []
            case ReplicaReady():
                self._learn_activation(event)
                home = self._home(event.replica)
                return [] if home is None else home.on(event, now)
            case _:
                return []

    def tenants(self) -> Iterator[Tenant]:
        """Every replica here, for those who report; not to be changed."""
        return (tenant for gpu in self._gpus.values() for tenant in gpu.tenants())

    def living(self) -> list[ReplicaReady]:
        """What the agent says after `AgentJoined` when it meets control again: each replica that serves."""
        serving = (t.ready for t in self.tenants() if t.state is ReplicaState.SERVING)
        return [ready for ready in serving if ready is not None]

    def standing(self) -> tuple[Seat, ...]:
        """Where they are."""
        return tuple(t.seat for t in self.tenants() if t.state is ReplicaState.SERVING)

    def _home(self, replica: ReplicaId) -> GpuScheduler | None:
        known = self._homes.get(replica)
        if known is None or not known.knows(replica):
            known = next((gpu for gpu in self._gpus.values() if gpu.knows(replica)), None)
            if known is not None:
                self._homes[replica] = known
        return known

    def _activate(self, order: Activate, now: float) -> list[Action]:
        foreign = [gpu_id for gpu_id in order.seat.gpu_ids if gpu_id not in self._gpus]
        if foreign or not order.seat.gpu_ids:
            raise ProtocolError(f"{order.seat.replica} was sent to agent {self.agent}, which does not have GPUs {foreign}")
        if self._lost.intersection(order.seat.gpu_ids):
            return []  # Control hears of the loss, or has heard of it by now.
        target = self._gpus[order.seat.gpu_ids[0]]
        home = self._home(order.seat.replica)
        if home is None or home is target:
            return target.on(order, now)
        tenant = next(t for t in home.tenants() if t.replica == order.seat.replica)
        if tenant.state is not ReplicaState.STOPPED:
            return home.on(order, now)  # It leaves there first; control asks again once it has.
        waiting = home.evict(tenant.replica, f"{tenant.replica} moves from GPU {home.gpu_id} to GPU {target.gpu_id}")
        return [*waiting, *target.on(order, now)]

    def _found(self, event: ReplicaFound, now: float) -> list[Action]:
        target = self._gpus.get(event.seat.gpu_ids[0])
        if target is not None and self._home(event.replica) is None:
            return target.on(event, now)
        reason = f"{event.replica} has another life by now"
        return [Deactivate(replica=event.replica, epoch=event.ready.epoch, reason=reason)]

    def _arrived(self, request: Request, replica: ReplicaId | None, now: float) -> list[Action]:
        for gpu in self._gpus.values():
            if gpu.holds(request.request_id):
                return []
        home = None if replica is None else self._home(replica)
        if home is None or replica is None:
            reason = f"{replica or request.model} is not on agent {self.agent}"
            return [Requeue(request_id=request.request_id, front=request.front, reason=reason)]
        return home.arrived(request, replica, now)

    def _order_by(self, local: str, now: float) -> list[Action]:
        if local not in LOCAL_POLICIES:
            raise ProtocolError(f"agent {self.agent} was told to queue by {local!r}; there are {', '.join(LOCAL_POLICIES)}")
        self._local = local
        return [action for gpu in self._gpus.values() for action in gpu.order_by(local, self._costs, now)]

    def _gpu_lost(self, event: GpuLost) -> list[Action]:
        """Whatever has a rank there is lost, wherever it is at home."""
        if event.gpu_id not in self._gpus or event.gpu_id in self._lost:
            return []
        self._lost.add(event.gpu_id)
        reason = f"GPU {event.gpu_id} is lost: {event.reason}"
        actions: list[Action] = []
        for gpu in self._gpus.values():
            for tenant in [tenant for tenant in gpu.tenants() if event.gpu_id in tenant.seat.gpu_ids]:
                actions += gpu.lose(tenant.replica, reason)
        return actions

    def _learn_steps(self, event: StepsTimed) -> None:
        tenant = self._alive(event.replica, event.epoch)
        home = self._home(event.replica)
        if self._learns and self._costs is not None and tenant is not None and home is not None:
            slowdown = home.slowdown(event.replica)
            self._reprice(tenant.model.name, refine.after_steps(self._costs, tenant.model, event, slowdown))

    def _learn_activation(self, event: ReplicaReady) -> None:
        tenant = self._alive(event.replica, event.epoch)
        loading = tenant is not None and tenant.state is ReplicaState.LOADING
        if self._learns and self._costs is not None and tenant is not None and loading:
            self._reprice(tenant.model.name, refine.after_activation(self._costs, tenant.model, event.load_s))

    def _alive(self, replica: ReplicaId, epoch: Epoch) -> Tenant | None:
        return next((t for t in self.tenants() if t.replica == replica and t.epoch == epoch), None)

    def _reprice(self, model: str, costs: CostTable) -> None:
        if costs is not self._costs:
            self._costs = costs
            for gpu in self._gpus.values():
                gpu.reprice(model, costs)

    def _cancelled(self, event: RequestCancelled | Abort, now: float) -> list[Action]:
        return [action for gpu in self._gpus.values() for action in gpu.on(event, now)]

    def state(self) -> NodeState:
        return NodeState(
            agent=self.agent,
            agent_start=self._mint.agent_start,
            counter=self._mint.counter,
            gpus=tuple(gpu.state() for gpu in self._gpus.values()),
            local=self._local,
            costs=self._costs,
            wake_s=self._wake_s,
            lost=tuple(sorted(self._lost)),
            learns=self._learns,
        )

    @classmethod
    def from_state(cls, state: NodeState) -> NodeScheduler:
        scheduler = cls(state.agent, state.agent_start, (), local=state.local, costs=state.costs, learns=state.learns)
        mint = scheduler._mint = Mint(state.agent_start, state.counter)
        scheduler._wake_s = state.wake_s
        scheduler._lost = set(state.lost)
        scheduler._gpus = {told.gpu_id: GpuScheduler.from_state(told, mint, state.local, state.costs) for told in state.gpus}
        return scheduler

    def check(self) -> None:
        """Raises if an invariant of this agent's decisions does not hold."""
        for gpu in self._gpus.values():
            gpu.check()
        homes = [tenant.replica for tenant in self.tenants()]
        assert len(homes) == len(set(homes)), "a replica lives on two GPUs"
        epochs = [tenant.epoch for tenant in self.tenants()]
        assert len(epochs) == len(set(epochs)), "two replicas share an epoch"

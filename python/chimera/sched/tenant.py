"""A replica on one GPU, in its present life: who waits for it, whom it serves, and what that takes.

Owns the sums over what runs. Decides nothing: whose turn it is says `turns.py`, what comes and goes `gpu.py`.
"""

from __future__ import annotations

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.msg.events import ReplicaReady
from chimera.sched.cost import CostTable, EngineCost
from chimera.sched.queues import Queue, deadline_s, queue_named

SERVING = ReplicaState.SERVING
"""By a name of its own: an enum's attribute takes as long as a call."""
OUTPUT_MEMORY = 0.9
GENEROUS = 2.0
"""An answer is taken to become up to this many times as long as answers were of late, and at most as long as it may."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A request that its engine has."""

    request: Request
    needs_tokens: int
    """Of cache, at its end as far as can be told."""
    late: bool
    """Its first token could not be in time when it was given: nothing is promised to it any more."""

    @property
    def context_tokens(self) -> int:
        """Half through."""
        return (self.request.prompt_tokens + self.needs_tokens) // 2

    @property
    def is_spare(self) -> bool:
        """Whether no promise breaks when it waits."""
        slo = self.request.slo
        return self.late or (slo.ttft_s is None and slo.tpot_s is None)


class TenantState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a `Tenant` remembers."""

    model: ModelSpec
    seat: Seat
    epoch: Epoch
    state: ReplicaState
    ready: ReplicaReady | None
    load_s: float | None
    queued: tuple[Request, ...]
    running: tuple[Running, ...]
    ending: tuple[str, ...]
    yielding: tuple[str, ...] = ()
    busy_until_s: float = 0.0
    standing_until_s: float | None = None
    stands_s: float = 0.0
    output_tokens: float = 0.0


class Tenant:
    __slots__ = (
        "busy_until_s",
        "context_tokens",
        "cost",
        "ending",
        "epoch",
        "load_s",
        "model",
        "needs_tokens",
        "output_tokens",
        "queue",
        "ready",
        "running",
        "seat",
        "spares",
        "standing_until_s",
        "stands_s",
        "state",
        "yielding",
    )

    def __init__(self, model: ModelSpec, seat: Seat, epoch: Epoch, local: str, costs: CostTable | None) -> None:
        self.model = model
        self.seat = seat
        self.epoch = epoch
        self.cost: EngineCost | None = None
        """Empty when requests are handed on as soon as there are credits."""
        self.busy_until_s = 0.0
        """When the prompts that the engine was given should be through."""
        self.state = ReplicaState.LOADING
        self.ready: ReplicaReady | None = None
        self.load_s: float | None = None
        self.queue: Queue = queue_named("fcfs", self.prefill_s)
        self.running: dict[str, Running] = {}
        self.context_tokens = 0
        self.needs_tokens = 0
        self.spares = 0
        """Of the running, those that no promise protects."""
        self.standing_until_s: float | None = None
        """Its engine takes no step until then."""
        self.stands_s = 0.0
        """When it may stand still again."""
        self.output_tokens = 0.0
        """Mean of late, per answer; 0 until one has ended."""
        self.ending: set[str] = set()
        """Of the running, those the engine was told to stop; it holds them until it says that they have ended."""
        self.yielding: set[str] = set()
        """Of the running, those the engine was told to give back, so that another can be in time."""
        self.order_by(local, costs)

    def order_by(self, local: str, costs: CostTable | None) -> None:
        """Those who wait, wait on in another order."""
        self.cost = None if costs is None or local == "fcfs" else costs.of(self.model)
        waiting, self.queue = list(self.queue), queue_named(local, self.prefill_s)
        for request in waiting:
            self.queue.push(request)

    def take(self, request: Request, now: float) -> None:
        late = request.slo.ttft_s is not None and now + self.prefill_s(request) > deadline_s(request)
        self._run(Running(request=request, needs_tokens=self._needs(request), late=late))

    def _run(self, running: Running) -> None:
        self.running[running.request.request_id] = running
        self.context_tokens += running.context_tokens
        self.needs_tokens += running.needs_tokens
        self.spares += running.is_spare

    def _needs(self, request: Request) -> int:
        if not self.output_tokens:
            return request.final_tokens
        return request.prompt_tokens + min(request.max_tokens, round(GENEROUS * self.output_tokens) + 1)

    def give_back(self, request_id: str) -> Request:
        """The engine has it no longer."""
        running = self.running.pop(request_id)
        self.context_tokens -= running.context_tokens
        self.needs_tokens -= running.needs_tokens
        self.spares -= running.is_spare
        self.ending.discard(request_id)
        self.yielding.discard(request_id)
        return running.request

    def answered(self, output_tokens: int) -> None:
        mean = self.output_tokens
        self.output_tokens = OUTPUT_MEMORY * mean + (1 - OUTPUT_MEMORY) * output_tokens if mean else float(output_tokens)

    def prefill_s(self, request: Request) -> float:
        return 0.0 if self.cost is None else self.cost.prompt_s(request.prompt_tokens)

    def step_s(self) -> float:
        """Of its engine alone, with what it runs."""
        return 0.0 if self.cost is None else self.cost.decode_s(max(1, len(self.running)), self.context_tokens)

    def answer_s(self) -> float:
        """What it takes to decode an answer; 0 until one has ended."""
        return self.output_tokens * self.step_s()

    @property
    def replica(self) -> ReplicaId:
        return self.seat.replica

    @property
    def credits(self) -> int:
        return self.ready.credits if self.ready else 0

    @property
    def free_credits(self) -> int:
        if self.ready is None or self.state is not SERVING:
            return 0
        return self.ready.credits - len(self.running)

    def memory(self) -> TenantState:
        return TenantState(
            model=self.model,
            seat=self.seat,
            epoch=self.epoch,
            state=self.state,
            ready=self.ready,
            load_s=self.load_s,
            queued=tuple(self.queue),
            running=tuple(self.running.values()),
            ending=tuple(sorted(self.ending)),
            yielding=tuple(sorted(self.yielding)),
            busy_until_s=self.busy_until_s,
            standing_until_s=self.standing_until_s,
            stands_s=self.stands_s,
            output_tokens=self.output_tokens,
        )

    @classmethod
    def from_memory(cls, told: TenantState, local: str, costs: CostTable | None) -> Tenant:
        tenant = cls(told.model, told.seat, told.epoch, local, costs)
        tenant.state, tenant.ready, tenant.load_s = told.state, told.ready, told.load_s
        tenant.busy_until_s, tenant.output_tokens = told.busy_until_s, told.output_tokens
        tenant.standing_until_s, tenant.stands_s = told.standing_until_s, told.stands_s
        for running in told.running:
            tenant._run(running)
        tenant.ending, tenant.yielding = set(told.ending), set(told.yielding)
        for request in told.queued:
            tenant.queue.push(request)
        return tenant

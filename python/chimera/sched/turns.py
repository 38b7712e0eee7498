"""Whose turn it is among all that wait on one GPU, and who makes way for whom.

Decides between the queues of a GPU; the order within one is `queues.py`'s. Knows estimates, from the cost table, and goes on
whatever they say: a GPU that runs nothing is always given the next request.

Under a local policy that knows deadlines, an engine is given no more prompts than it prefills in a moment, so that the order
stays ours, and all queues of the GPU take turns. Under `goodput` prompts also leave time for the decodes of those that run; no
more engines are at work at once than the TPOTs promised bear; a request waits here while there is no room for its cache, and
one that would be late for want of a credit or of room takes the place of one to whom nothing is promised, or can be kept, any
more. Where a neighbour's engine is what would make it late, and nothing is promised to those that the neighbour runs, that
engine stands still meanwhile.

Nobody starves. One turn in `LATE_TURN` is the oldest late request's, so behind n older ones it has its turn after
(n + 1) × LATE_TURN turns at the most; a request makes way `MOST_PREEMPTIONS` times and then runs to its end; an engine stands
still for `MOST_STANDING_S` at a time, and then works at least as long before it stands still again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from chimera.core.replica import ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.sched.cost import CostTable
from chimera.sched.queues import deadline_s
from chimera.sched.tenant import Running, Tenant

LATE_TURN = 8
"""Of so many turns one is for a request that is late already."""
LEAST_DUTY = 0.3
"""An engine may always spend this share of its time on prompts, whatever its decodes suffer."""
AHEAD_S = 0.1
"""So much prefill an engine may have before it beyond the prompt it is at."""
MOST_PREEMPTIONS = 2
MAKE_WAY_S = 0.05
"""What it takes until a request that makes way has left its engine."""
MOST_STANDING_S = 1.0


class TurnsState(msgspec.Struct, frozen=True, kw_only=True):
    """All that `Turns` remembers."""

    passed: int = 0
    room_bytes: int = 0
    room_told: bool = False
    wake_s: float | None = None


class Turns:
    """`tenants` is the GPU scheduler's own list, only read here but for what `gave` notes."""

    def __init__(self, tenants: Mapping[ReplicaId, Tenant], local: str, costs: CostTable | None) -> None:
        self.local = local
        self.costs = costs
        self.wake_s: float | None = None
        """When to look again, whatever happens; `None` if nobody waits for that."""
        self._tenants = tenants
        self._room_bytes = 0
        """For the caches of all tenants together."""
        self._room_told = False
        """By whoever keeps the books, not just by the newest tenant as it came up."""
        self._passed = 0
        """Turns since a late request had one."""

    @property
    def paced(self) -> bool:
        return self.costs is not None and self.local != "fcfs"

    # What is there for caches.

    def room_told(self, kv_bytes: int) -> None:
        self._room_bytes, self._room_told = kv_bytes, True

    def came_up(self, tenant: Tenant, kv_tokens: int) -> None:
        if not self._room_told:
            self._room_bytes = tenant.model.kv_bytes(kv_tokens) + self._held_bytes()

    def left(self, tenant: Tenant) -> None:
        if not self._room_told and self.costs is not None:
            self._room_bytes += self.costs.resident_bytes(tenant.model)

    def _held_bytes(self) -> int:
        return sum([t.model.kv_bytes(t.needs_tokens) for t in self._tenants.values()])

    # Turns.

    def next(self, now: float) -> Tenant | None:
        """Who is given its next request now: in time before late, by deadline; now and then the oldest late."""
        self.wake_s = None
        waiting = self._waiting()
        if not waiting:
            return None
        moments = [moment_s for t in waiting if (moment_s := t.busy_until_s - AHEAD_S) > now]
        self.wake_s = min(moments, default=None)
        order = sorted([(*t.queue.turn(now), t.replica, t) for t in waiting])
        if self._passed >= LATE_TURN:
            oldest = next((tenant for late, _, _, tenant in order if late), None)
            if oldest is not None:
                if not self._may_take(oldest, now):
                    return None  # the others have had their turns
                self._passed = 0
                return oldest
        for *_, tenant in order:
            if self._may_take(tenant, now):
                self._passed += 1
                return tenant
        return None

    def gave(self, tenant: Tenant, request: Request, now: float) -> None:
        if tenant.cost is not None:
            slowdown = self.slowdown(tenant)
            seconds = tenant.prefill_s(request) * slowdown / self._duty(tenant, slowdown)
            tenant.busy_until_s = max(now, tenant.busy_until_s) + seconds

    def begin_s(self, tenant: Tenant, now: float) -> float:
        """When a prompt given now is begun with."""
        return max(now, tenant.busy_until_s) if tenant.running else now

    def slowdown(self, tenant: Tenant) -> float:
        """How much longer the tenant's steps take beside the engines that are at work here."""
        if self.costs is None:
            return 1.0
        at_work = 1
        for other in self._tenants.values():
            if other.running and other is not tenant and other.standing_until_s is None:
                at_work += 1
        return self.costs.slowdown(at_work)

    def _waiting(self) -> list[Tenant]:
        return [t for t in self._tenants.values() if len(t.queue) and t.free_credits > 0]

    def _may_take(self, tenant: Tenant, now: float) -> bool:
        """Whether the engine has use for one more request now, rather than soon."""
        if tenant.standing_until_s is not None:
            return False
        if tenant.cost is None or not (tenant.running or any(t.running for t in self._tenants.values())):
            return True
        if self._is_busy(tenant, now):
            return False
        return self.local != "goodput" or (self._has_room(tenant) and not self._crowds(tenant))

    def _crowds(self, tenant: Tenant) -> bool:
        """Whether its engine would be one too many at work for the TPOT that is promised to those that run."""
        if tenant.running or self.costs is None:
            return False
        at_work = [t for t in self._tenants.values() if t.running and t.standing_until_s is None]
        slowest = self.costs.slowdown(len(at_work) + 1)
        for other in at_work:
            promise_s = other.model.slo.tpot_s
            if promise_s is None or other.cost is None or other.spares == len(other.running):
                continue
            step_s = other.step_s()
            if step_s * slowest > promise_s:
                neighbours = sum(_presence(t, other) for t in (*at_work, tenant) if t is not other)
                if step_s * self.costs.slowdown(1 + neighbours) > promise_s:
                    return True
        return False

    def _is_busy(self, tenant: Tenant, now: float) -> bool:
        return bool(tenant.running) and tenant.busy_until_s > now + AHEAD_S

    def _has_room(self, tenant: Tenant) -> bool:
        """Whether the caches of all that run here leave room for one more like them; if not, its order is better kept here."""
        limit_bytes = tenant.seat.kv_limit_bytes
        count = len(tenant.running)
        wanted_tokens = tenant.needs_tokens * (count + 1) // max(1, count)
        if limit_bytes is not None:
            return tenant.model.kv_bytes(wanted_tokens) <= limit_bytes
        held = self._held_bytes() - tenant.model.kv_bytes(tenant.needs_tokens)
        return held + tenant.model.kv_bytes(wanted_tokens) <= self._room_bytes

    def _duty(self, tenant: Tenant, slowdown: float) -> float:
        """The share of its time that the engine may spend on prompts, so that those it decodes keep their TPOT."""
        promise_s = tenant.model.slo.tpot_s
        if self.local != "goodput" or promise_s is None or tenant.cost is None or not tenant.running:
            return 1.0
        if slowdown > 1:
            return 1.0  # what neighbours spoil, fewer prompts do not mend
        return max(LEAST_DUTY, 1 - tenant.step_s() / promise_s)

    # Making way.

    def make_way(self, now: float) -> tuple[Tenant, Running, Request] | None:
        """A request that should leave its engine, and for whom; `wake_s` is set for one that is not urgent yet."""
        if self.local != "goodput" or self.costs is None or not any(t.spares for t in self._tenants.values()):
            return None
        for tenant in self._tenants.values():
            if tenant.state is not ReplicaState.SERVING or not len(tenant.queue) or not tenant.running:
                continue
            full = tenant.free_credits <= 0
            if self._is_busy(tenant, now) or not (full or not self._has_room(tenant)):
                continue  # only its prompts are before it
            urgent = tenant.queue.urgent(now)
            if urgent is None:
                continue
            where = [tenant] if full else list(self._tenants.values())
            if any(t.yielding for t in where):
                continue  # one is on its way out already
            spare = self._spare(where, urgent)
            if spare is None:
                continue
            last_moment_s = deadline_s(urgent) - tenant.prefill_s(urgent) * self.slowdown(tenant) - MAKE_WAY_S
            if last_moment_s - MAKE_WAY_S <= now:
                return (*spare, urgent)
            self._wake_at(last_moment_s - MAKE_WAY_S)
        return None

    def _spare(self, tenants: Iterable[Tenant], urgent: Request) -> tuple[Tenant, Running] | None:
        """Who has been at it for the shortest time of those that no promise protects."""
        found: tuple[Tenant, Running] | None = None
        for tenant in tenants:
            for running in tenant.running.values():  # in the order in which they were given
                request = running.request
                if (
                    running.is_spare
                    and request.preempted < MOST_PREEMPTIONS
                    and request.priority <= urgent.priority
                    and request.request_id not in tenant.ending
                    and (found is None or tenant is found[0] or request.prompt_tokens < found[1].request.prompt_tokens)
                ):
                    found = tenant, running
        return found

    # Standing still.

    def stand_still(self, tenant: Tenant, request: Request, now: float) -> list[tuple[Tenant, float]]:
        """Which neighbours stand still for this prompt, and for how long: those without a promise to keep, if they are what
        would make its first token late."""
        if self.local != "goodput" or self.costs is None or request.slo.ttft_s is None:
            return []
        seconds, left_s = tenant.prefill_s(request), deadline_s(request) - now
        if seconds > left_s or seconds * self.slowdown(tenant) <= left_s:
            return []
        still, for_s = [], min(seconds, MOST_STANDING_S)
        for other in self._tenants.values():
            careless = other.running and other.spares == len(other.running)
            if other is not tenant and careless and other.standing_until_s is None and other.stands_s <= now:
                other.standing_until_s, other.stands_s = now + for_s, now + for_s + MOST_STANDING_S
                still.append((other, for_s))
        return still

    def standing(self) -> list[Tenant]:
        return [t for t in self._tenants.values() if t.standing_until_s is not None]

    def go_on(self, now: float) -> list[Tenant]:
        """Who has stood still for long enough."""
        due = [t for t in self._tenants.values() if t.standing_until_s is not None and t.standing_until_s <= now]
        for tenant in due:
            tenant.standing_until_s = None
        return due

    def note_standing(self) -> None:
        for tenant in self._tenants.values():
            if tenant.standing_until_s is not None:
                self._wake_at(tenant.standing_until_s)

    def _wake_at(self, at_s: float) -> None:
        self.wake_s = at_s if self.wake_s is None else min(self.wake_s, at_s)

    # Memory.

    def state(self) -> TurnsState:
        return TurnsState(passed=self._passed, room_bytes=self._room_bytes, room_told=self._room_told, wake_s=self.wake_s)

    def revive(self, state: TurnsState) -> None:
        self._passed, self._room_bytes, self._room_told = state.passed, state.room_bytes, state.room_told
        self.wake_s = state.wake_s


def _presence(neighbour: Tenant, tenant: Tenant) -> float:
    """The part of the life of an answer of the tenant's that a neighbour is at work, with all that it has to do."""
    life_s = tenant.answer_s()
    asked = max(1, len(neighbour.running) + len(neighbour.queue))
    return min(1.0, asked * neighbour.answer_s() / life_s) if life_s and neighbour.output_tokens else 1.0

"""Elastic pools of several replicas on one device, joined by one ledger: the whole of elastic memory, without a GPU.

Each pool lives as in a worker: its budget is its lease's level, it gives stripes back only after they are empty and the
last launched step has ended, and it answers its ledger with what it really has. Orders and answers are late, repeated,
reordered or lost. The device is the fake one, with the GPU's capacity: a promise too many is a refused `create`.
"""

from __future__ import annotations

import pytest
import torch
from chimera.core.gpu import Gpu
from chimera.core.lease import Terms
from chimera.core.replica import Epoch, ReplicaId
from chimera.errors import DriverError
from chimera.kv.budget import Budget
from chimera.kv.pool import ElasticPool
from chimera.ledger.book import GpuLedger, Order
from chimera.msg.events import Event, PagesReturned, Woke, WorkerLost
from chimera.vmm.driver import Handle
from chimera.vmm.fake import FakeDriver
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.kv.builders import GRANULE, layout_of, reserve_for

PAGES = 12
"""One page is one stripe here."""


class PoolHolder:
    """One replica's pool and its side of the lease: what a worker does between two steps."""

    def __init__(self, replica: ReplicaId, epoch: Epoch, driver: FakeDriver) -> None:
        self.replica = replica
        self.epoch = epoch
        self.worker = f"w{epoch.counter}"
        self.terms = Terms()
        self.budget = Budget(0)
        self.step_launched = self.step_ended = 0
        self.rows: list[torch.Tensor] = []
        layout = layout_of(PAGES)
        self.reserve = reserve_for(layout, driver, budget=self.budget, low=1, high=2)
        self.pool = ElasticPool(layout, self.reserve, fence=self._fence, checked=True)

    @property
    def life(self) -> tuple[ReplicaId, Epoch]:
        return self.replica, self.epoch

    @property
    def held(self) -> int:
        return self.budget.held_bytes // GRANULE

    def obey(self, order: Order) -> PagesReturned:
        self.terms = self.terms.told(order.revision, order.level)
        self.budget.limit_bytes = self.terms.level * GRANULE
        if self.budget.excess_bytes:
            self.trim()
            self.pool.shrink(self.pool.staying_stripes - self.terms.level)
        return self.answer()

    def trim(self) -> None:
        """What is created and mapped nowhere is the first to go."""
        self.reserve.trim()

    def answer(self) -> PagesReturned:
        level = self.terms.answer(self.held)
        revision = self.terms.revision
        return PagesReturned(replica=self.replica, epoch=self.epoch, gpu_id=0, revision=revision, level=level)

    def grow(self, stripes: int) -> None:
        """As far as the lease allows; stripes called back on their way out count too."""
        self.pool.grow(min(stripes, self.terms.level - self.pool.staying_stripes))

    def tick(self) -> PagesReturned:
        self.pool.tick()
        if self.budget.excess_bytes:
            self.trim()
        return self.answer()

    def evict(self) -> None:
        """Whatever touches a stripe that is to leave."""
        keep = []
        for row in self.rows:
            if bool(self.pool.slots.on_leaving(row).any()):
                self.pool.slots.free(row)
            else:
                keep.append(row)
        self.rows = keep

    def die(self) -> None:
        """What the kernel does when a process ends."""
        self.pool.close()
        self.reserve.close()

    def handles(self) -> set[Handle]:
        return {*self.pool._arena._range.mapped.values(), *self.reserve._ready}

    def _fence(self):  # type: ignore[no-untyped-def]
        launched = self.step_launched
        return lambda: self.step_ended >= launched


class Device(RuleBasedStateMachine):
    holder_type = PoolHolder
    ledger_type = GpuLedger

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.lives = 0
        self.driver = FakeDriver(GRANULE, capacity_bytes=PAGES * GRANULE)
        self.ledger = self.ledger_type(Gpu(gpu_id=0, capacity_bytes=PAGES * GRANULE, page_bytes=GRANULE))
        self.holders: list[PoolHolder] = []
        self.down: list[Order] = []
        self.up: list[Event] = []
        self.obeyed: list[Order] = []
        self.heard: list[Event] = []

    @initialize()
    def begin(self) -> None:
        for name in "ab":
            self.start(name)

    def start(self, name: str) -> None:
        self.lives += 1
        holder = self.holder_type(ReplicaId(name), Epoch(0, self.lives), self.driver)
        self.ledger.open(holder.life, holder.worker)
        self.holders.append(holder)

    def allot_level(self, holder: PoolHolder, level: int) -> None:
        self.down += self.ledger.allot(holder.life, level, now=self.now, deadline_s=self.now, reason="test")

    # What the scheduler and the wires do.

    @rule(i=st.integers(0, 1), level=st.integers(0, PAGES), both=st.booleans())
    def allot(self, i: int, level: int, both: bool) -> None:
        """One alone, or one against the other: whoever gains must wait by itself."""
        self.allot_level(self.holders[i], level)
        if both:
            self.allot_level(self.holders[1 - i], PAGES - level)

    @rule(orders=st.integers(0, 4), events=st.integers(0, 4))
    def deliver(self, orders: int, events: int) -> None:
        """The oldest first, as wires mostly do."""
        for _ in range(min(orders, len(self.down))):
            self.obey(self.down.pop(0))
        for _ in range(min(events, len(self.up))):
            self.hear(self.up.pop(0))

    @rule(i=st.integers(0, 20), what=st.sampled_from(["order early", "order again", "event early", "event again", "lost"]))
    def misdeliver(self, i: int, what: str) -> None:
        match what:
            case "order early" if self.down:
                self.obey(self.down.pop(i % len(self.down)))
            case "order again" if self.obeyed:
                self.obey(self.obeyed[-1 - i % len(self.obeyed)])
            case "event early" if self.up:
                self.hear(self.up.pop(i % len(self.up)))
            case "event again" if self.heard:
                self.hear(self.heard[-1 - i % len(self.heard)])
            case "lost" if i % 2 and self.down:
                self.down.pop(i // 2 % len(self.down))
            case "lost" if self.up and not isinstance(self.up[i % len(self.up)], WorkerLost):
                self.up.pop(i % len(self.up))

    # What the workers do.

    @rule(i=st.integers(0, 1), stripes=st.integers(1, PAGES), slots=st.integers(1, 120))
    def step(self, i: int, stripes: int, slots: int) -> None:
        """Grow if the lease allows, take slots if there are any, launch a step that reads them."""
        holder = self.holders[i]
        holder.grow(stripes)
        row = holder.pool.slots.alloc(slots)
        if row is not None:
            holder.rows.append(row)
        holder.step_launched += 1

    @rule(i=st.integers(0, 1), evict=st.booleans())
    def free(self, i: int, evict: bool) -> None:
        holder = self.holders[i]
        if evict:
            holder.evict()
        elif holder.rows:
            holder.pool.slots.free(holder.rows.pop(0))

    @rule(i=st.integers(0, 1), step_ended=st.booleans())
    def tick(self, i: int, step_ended: bool) -> None:
        holder = self.holders[i]
        if step_ended:
            holder.step_ended = holder.step_launched
        self.up.append(holder.tick())

    @rule(i=st.integers(0, 9))
    def now_and_then_kill_or_calm_down(self, i: int) -> None:
        if i < 2:
            holder = self.holders.pop(i)
            holder.die()
            self.up.append(WorkerLost(worker=holder.worker, reason="killed"))
            self.start(holder.replica.model)
        elif i == 2:
            self.calm_down()

    def calm_down(self) -> None:
        """Half for each, and every request ends: both reach their half, and can fill it."""
        for holder in self.holders:
            while holder.rows:
                holder.pool.slots.free(holder.rows.pop())
            self.allot_level(holder, PAGES // 2)
        self.let_everything_arrive()
        for holder in self.holders:
            holder.grow(PAGES)
            assert (holder.terms.level, holder.pool.staying_stripes) == (PAGES // 2, PAGES // 2)

    def let_everything_arrive(self) -> None:
        for _ in range(100):
            while self.down or self.up:
                if self.down:
                    self.obey(self.down.pop(0))
                else:
                    self.hear(self.up.pop(0))
            for holder in self.holders:
                holder.step_ended = holder.step_launched
                holder.tick()
                self.hear(holder.tick())
            if self.ledger.next_wake_s is None and not self.down:
                return
            self.now = max(self.now, self.ledger.next_wake_s or 0.0)
            self.hear(Woke())
        raise AssertionError(f"never calm: {self.ledger.view(self.now)}")

    def hear(self, event: Event) -> None:
        if event not in self.heard:
            self.heard = [*self.heard[-5:], event]
        self.down += self.ledger.on(event, self.now)

    def obey(self, order: Order) -> None:
        if order not in self.obeyed:
            self.obeyed = [*self.obeyed[-5:], order]
        for holder in self.holders:
            if holder.life == (order.replica, order.epoch):
                self.up.append(holder.obey(order))

    # What is true at every instant. That no `create` is refused is asserted by the device itself.

    @invariant()
    def no_stripe_is_in_two_pools(self) -> None:
        handles = [handle for holder in self.holders for handle in holder.handles()]
        assert len(handles) == len(set(handles)) == self.driver.created_bytes // GRANULE

    @invariant()
    def no_pool_has_more_than_it_is_charged(self) -> None:
        charged = {entry.epoch: entry.lease.charged for entry in self.ledger.view(self.now).entries}
        for holder in self.holders:
            assert max(holder.terms.level, len(holder.handles())) <= charged[holder.epoch]

    @invariant()
    def the_books_balance(self) -> None:
        self.ledger.check()

    def teardown(self) -> None:
        for holder in self.holders:
            holder.die()
            self.up.append(WorkerLost(worker=holder.worker, reason="the end"))
        self.holders.clear()
        self.let_everything_arrive()
        assert (self.driver.created_bytes, self.ledger.view(self.now).charged) == (0, 0)
        self.driver.close()


def explore(device: type[Device], examples: int, steps: int, *, derandomize: bool = True, shrink: bool = True) -> None:
    run_state_machine_as_test(
        device,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=derandomize,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        ),
    )


def test_no_stripe_is_in_two_pools_and_the_capacity_is_respected() -> None:
    explore(Device, 10, 25)


@pytest.mark.slow
def test_no_stripe_is_in_two_pools_and_the_capacity_is_respected_at_length() -> None:
    explore(Device, 100, 80, derandomize=False)


# Planted: what each side of the lease must not do.


class ChecksWhatIsFreeThenTakesIt(PoolHolder):
    """kvcached 262 in our words: looks at the device instead of at its lease."""

    def grow(self, stripes: int) -> None:
        self.budget.limit_bytes = PAGES * GRANULE
        self.pool.grow(min(stripes, PAGES - self.reserve.driver.created_bytes // GRANULE))


class AnswersBeforeItHasGivenBack(PoolHolder):
    def answer(self) -> PagesReturned:
        level, revision = self.terms.level, self.terms.revision
        return PagesReturned(replica=self.replica, epoch=self.epoch, gpu_id=0, revision=revision, level=level)


class ForgetsItsReserve(PoolHolder):
    """Created stripes that are mapped nowhere hold memory too."""

    def trim(self) -> None:
        pass

    @property
    def held(self) -> int:
        return self.pool.present_stripes


class ObeysALateOrder(PoolHolder):
    def obey(self, order: Order) -> PagesReturned:
        self.terms = Terms(revision=max(order.revision, self.terms.revision), level=order.level)
        return super().obey(order)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", [ChecksWhatIsFreeThenTakesIt, AnswersBeforeItHasGivenBack, ForgetsItsReserve, ObeysALateOrder]
)
def test_a_planted_bug_of_a_holder_is_caught(broken: type[PoolHolder]) -> None:
    device = type(f"Device{broken.__name__}", (Device,), {"holder_type": broken})
    with pytest.raises((AssertionError, DriverError, ExceptionGroup)):
        explore(device, 1500, 50, shrink=False)

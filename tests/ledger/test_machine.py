"""The ledger against holders that hear late, twice, out of order or not at all, and against its own restarts.

A model of the world around one GPU: workers with a context each, replicas that come and go in them, orders and events in
two bags from which they are delivered at random. What is asserted is physical: what all holders together have, or may take
without asking anybody, is within the GPU at every instant; and once the world calms down every allotment is reached.
"""

import itertools
import math
from typing import TypeVar

import pytest
from chimera.core.lease import LeaseClass
from chimera.core.replica import Epoch, ReplicaId
from chimera.ledger.book import GpuLedger, Life, Order, Survivors, _Account
from chimera.ledger.holder import Holder
from chimera.msg.events import Event, PagesHeld, ReplicaStopped, Woke, WorkerLost
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from msgspec.structs import replace

from tests.ledger.builders import gpu

T = TypeVar("T")

PAGES = 16
CONTEXT = 1
WEIGHTS = 2


class Process:
    """A worker: its context, and at most one replica with its weights and its lease."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.holder: Holder | None = None

    def announce(self) -> PagesHeld:
        kept = {LeaseClass.CONTEXT: CONTEXT}
        if self.holder is None:
            return PagesHeld(worker=self.name, gpu_id=0, kept=kept)
        return self.holder.announce(reserved={LeaseClass.WEIGHTS: WEIGHTS}, kept=kept)

    @property
    def fixed(self) -> int:
        return CONTEXT + WEIGHTS if self.holder else CONTEXT

    @property
    def pages(self) -> int:
        """What it has, or may take without asking."""
        return self.fixed + (self.holder.terms.answer(self.holder.held) if self.holder else 0)


class World(RuleBasedStateMachine):
    ledger_type = GpuLedger

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.agent_start = 1
        self.names = itertools.count()
        self.epochs = itertools.count()
        self.processes: dict[str, Process] = {}
        self.down: list[Order] = []
        self.up: list[Event] = []
        self.ledger = self.ledger_type(gpu(PAGES), agent_start=self.agent_start)

    # What the caller of the ledger does.

    @initialize(n=st.integers(1, 4))
    def begin(self, n: int) -> None:
        for _ in range(n):
            self.activate(0, into_a_new_worker=True)

    @rule(i=st.integers(0, 3), into_a_new_worker=st.booleans())
    def activate(self, i: int, into_a_new_worker: bool) -> None:
        if into_a_new_worker and len(self.processes) < 4:
            self.spawn()
        if not self.empty():
            return
        process = pick(self.empty(), i)
        replica, epoch = ReplicaId(f"m{i}"), Epoch(self.agent_start, next(self.epochs))
        self.ledger.open((replica, epoch), process.name)
        if self.ledger.reserve(process.name, LeaseClass.WEIGHTS, WEIGHTS, life=(replica, epoch)):
            process.holder = Holder(replica, epoch, worker=process.name, gpu_id=0)
        else:
            self.hear(ReplicaStopped(replica=replica, epoch=epoch, reason="no room for its weights"))

    def spawn(self) -> None:
        name = f"w{next(self.names)}"
        if self.ledger.reserve(name, LeaseClass.CONTEXT, CONTEXT):
            self.processes[name] = Process(name)

    @precondition(lambda self: self.holders())
    @rule(i=st.integers(0, 3), level=st.integers(0, PAGES), within_s=st.sampled_from([0.0, 0.5, 3.0]))
    def allot(self, i: int, level: int, within_s: float) -> None:
        holder = pick(self.holders(), i)
        life = (holder.replica, holder.epoch)
        self.down += self.ledger.allot(life, level, now=self.now, deadline_s=self.now + within_s, reason="test")

    # What the holders do of themselves.

    @precondition(lambda self: self.holders())
    @rule(i=st.integers(0, 3), pages=st.integers(1, PAGES), busy=st.integers(0, PAGES))
    def take(self, i: int, pages: int, busy: int) -> None:
        holder = pick(self.holders(), i)
        holder.take(pages)
        holder.busy = min(busy, holder.held)

    @precondition(lambda self: self.holders())
    @rule(i=st.integers(0, 3), level=st.integers(0, PAGES))
    def finish_work_and_want(self, i: int, level: int) -> None:
        holder = pick(self.holders(), i)
        holder.busy = 0
        self.up += [holder.settle(), holder.want(level)]

    # What the wires do. The news of an end and the words that open a connection are never lost, only late.

    @precondition(lambda self: self.down)
    @rule(i=st.integers(0, 30), again=st.booleans())
    def deliver_order(self, i: int, again: bool) -> None:
        order = pick(self.down, i)
        if not again:
            self.down.remove(order)
        self.obey(order)

    @precondition(lambda self: self.up)
    @rule(i=st.integers(0, 30), again=st.booleans())
    def deliver_event(self, i: int, again: bool) -> None:
        event = pick(self.up, i)
        if not again:
            self.up.remove(event)
        self.hear(event)

    @rule(i=st.integers(0, 30))
    def lose(self, i: int) -> None:
        losable = [event for event in self.up if not isinstance(event, WorkerLost | ReplicaStopped | PagesHeld)]
        if i % 2 and losable:
            self.up.remove(pick(losable, i // 2))
        elif self.down:
            self.down.remove(pick(self.down, i // 2))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.hear(Woke())

    # What turns everything over. One rule, so that most of a run is spent between two of them.

    @rule(i=st.integers(0, 3), what=st.sampled_from(["kill", "stop", "restart", "silence", "calm"]))
    def upheaval(self, i: int, what: str) -> None:
        match what:
            case "kill" if self.processes:
                self.kill(pick(list(self.processes.values()), i))
            case "stop" if self.holders():
                self.stop_replica(pick(self.holders(), i))
            case "restart":
                self.restart_ledger()
            case "silence":
                self.fall_silent()
            case "calm":
                self.calm_down()

    def kill(self, process: Process) -> None:
        del self.processes[process.name]
        self.up.append(WorkerLost(worker=process.name, reason="killed"))

    def stop_replica(self, holder: Holder) -> None:
        self.processes[holder.worker].holder = None
        self.up.append(ReplicaStopped(replica=holder.replica, epoch=holder.epoch, reason="test"))

    def restart_ledger(self) -> None:
        """Connections end with whatever was on them; the living connect again and say what they have."""
        self.agent_start += 1
        awaited = Survivors(until_s=math.inf, workers=frozenset(self.processes)) if self.processes else None
        self.ledger = self.ledger_type(gpu(PAGES), agent_start=self.agent_start, survivors=awaited)
        self.down.clear()
        self.up = [process.announce() for process in self.processes.values()]

    def fall_silent(self) -> None:
        """Nothing is lost any more and no work holds a page back: holders and ledger come to agree, and say no more."""
        for holder in self.holders():
            holder.busy = 0
            self.up.append(holder.settle())
        self.let_everything_arrive()
        told = {(h.replica, h.epoch): h.terms.level for h in self.holders()}
        leases = [e for e in self.ledger.view(self.now).entries if e.lease.lease_class is LeaseClass.KV]
        assert {(ReplicaId(e.lease.holder.partition("/")[0]), e.epoch): e.lease.held for e in leases} == told

    def calm_down(self) -> None:
        """Allot what fits: every allotment is reached."""
        holders = self.holders()
        share = (PAGES - sum(process.fixed for process in self.processes.values())) // max(1, len(holders))
        for _ in range(2):  # a restarted ledger may hear of a holder only in the first round, after its allotment
            for holder in holders:
                life = (holder.replica, holder.epoch)
                self.down += self.ledger.allot(life, share, now=self.now, deadline_s=self.now, reason="calm")
            self.fall_silent()
        assert [holder.terms.level for holder in holders] == [share] * len(holders)

    # How the rules speak to the ledger and to the holders.

    def let_everything_arrive(self) -> None:
        for _ in range(200):
            while self.down or self.up:
                if self.down:
                    self.obey(self.down.pop(0))
                else:
                    self.hear(self.up.pop(0))
            if self.ledger.next_wake_s is None:
                return
            self.now = self.ledger.next_wake_s
            self.hear(Woke())
        raise AssertionError(f"the ledger never falls silent: {self.ledger.view(self.now)}")

    def hear(self, event: Event) -> None:
        self.down += self.ledger.on(event, self.now)

    def obey(self, order: Order) -> None:
        for holder in self.holders():
            if (holder.replica, holder.epoch) == (order.replica, order.epoch):
                self.up.append(holder.obey(order))

    def holders(self) -> list[Holder]:
        return [process.holder for process in self.processes.values() if process.holder]

    def empty(self) -> list[Process]:
        return [process for process in self.processes.values() if process.holder is None]

    # What is true at every instant.

    @invariant()
    def the_gpu_is_never_promised_twice(self) -> None:
        promised = sum(process.pages for process in self.processes.values())
        assert promised <= PAGES, f"{promised} pages held or promised of {PAGES}"

    @invariant()
    def the_books_balance(self) -> None:
        self.ledger.check()

    @invariant()
    def no_holder_may_have_more_than_the_ledger_charges(self) -> None:
        if self.ledger.learning:
            return
        charged = {
            (entry.lease.holder, entry.epoch): entry.lease.charged
            for entry in self.ledger.view(self.now).entries
            if entry.lease.lease_class is LeaseClass.KV
        }
        for holder in self.holders():
            assert holder.terms.answer(holder.held) <= charged.get((str(holder.replica), holder.epoch), 0)

    def teardown(self) -> None:
        for name in list(self.processes):
            del self.processes[name]
            self.up.append(WorkerLost(worker=name, reason="the end"))
        self.let_everything_arrive()
        assert self.ledger.view(self.now).charged == 0, "all pages are returned at close"


def pick(items: list[T], i: int) -> T:
    return items[i % len(items)]


def explore(world: type[World], examples: int, steps: int, *, derandomize: bool = True, shrink: bool = True) -> None:
    run_state_machine_as_test(
        world,
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


def test_no_page_is_promised_twice_and_every_allotment_is_reached() -> None:
    explore(World, 40, 40)


@pytest.mark.slow
def test_no_page_is_promised_twice_and_every_allotment_is_reached_at_length() -> None:
    explore(World, 500, 100, derandomize=False)


# The machine is worth what it catches: each of these is one thought of the book, left out.


class ForgetsAnUnansweredGrant(GpuLedger):
    def _order(self, life: Life, account: _Account, level: int, now: float) -> Order:
        held = account.lease.held
        order = super()._order(life, account, level, now)
        account.lease = replace(account.lease, held=held)
        return order


class FreesPagesWhenTheRecallIsSent(GpuLedger):
    def _charged(self) -> int:
        return super()._charged() - sum(a.lease.charged - a.lease.level for a in self._accounts.values())


class BelievesAnswersToOlderOrders(GpuLedger):
    def _answered(self, account: _Account, revision: int, level: int) -> None:
        super()._answered(account, account.lease.revision, min(level, account.ceiling))


class GivesBeforeTheSurvivorsHaveSpoken(GpuLedger):
    @property
    def learning(self) -> bool:
        return False


class AdoptsTheDead(GpuLedger):
    def _is_over(self, life: Life) -> bool:
        return False


class NeverRepeatsAnOrder(GpuLedger):
    def _wake_up(self, now: float) -> list[Order]:
        super()._wake_up(now)
        return []


class KeepsTheWeightsOfTheDead(GpuLedger):
    def _end(self, life: Life) -> None:
        weights = {key: pages for key, pages in self._reserved.items() if key[1] == life}
        super()._end(life)
        self._reserved |= weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        ForgetsAnUnansweredGrant,
        FreesPagesWhenTheRecallIsSent,
        BelievesAnswersToOlderOrders,
        GivesBeforeTheSurvivorsHaveSpoken,
        AdoptsTheDead,
        NeverRepeatsAnOrder,
        KeepsTheWeightsOfTheDead,
    ],
)
def test_a_planted_bug_is_caught(broken: type[GpuLedger]) -> None:
    world = type(f"World{broken.__name__}", (World,), {"ledger_type": broken})
    with pytest.raises(AssertionError):
        explore(world, 3000, 50, shrink=False)

"""One ledger under eight processes that grow, shrink and die at random, two of them killed with -9, and one restart of its own.

After every event two things are asserted: that the books balance, and that what the holders really have, written by each of
them into shared memory, is within the GPU. At the end nothing may be leaked. `--processes` and `--operations` scale it.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from chimera.core.gpu import Gpu
from chimera.core.replica import Epoch, ReplicaId
from chimera.errors import ProtocolError
from chimera.ledger.book import GpuLedger, Life, Order, Survivors
from chimera.ledger.holder import Holder
from chimera.ledger.node import NodeLedger
from chimera.ledger.server import LedgerServer
from chimera.msg.events import Event, PagesHeld, PagesWanted, ReplicaStopped, WorkerLost
from chimera.msg.stream import Hello
from chimera.units import MIB
from chimera.wire.blocking import BlockingChannel

from benchmark.report import Figures, parser

PAGES = 4096
LIVES_EACH = 4096
"""Slots in the shared memory: one per life that a process may live, so that a slot is never used twice."""
DIES = 1 / 400
PATIENCE_S = 0.001
"""How long a holder waits for the answer to a wish; one that cannot be met has none."""
LEARN_S = 5.0


class Witness:
    """What the holders really have, told by nobody but themselves: one number a life, and one count of operations a process."""

    def __init__(self, path: Path, processes: int) -> None:
        slots = processes * (LIVES_EACH + 1)
        with path.open("a+b") as file:
            file.truncate(slots * 8)
            self._numbers = memoryview(mmap.mmap(file.fileno(), slots * 8)).cast("q")
        self.held = self._numbers[: processes * LIVES_EACH]
        self.done = self._numbers[processes * LIVES_EACH :]


# The holders. A nursery is a process that forks one life after another, until its operations are done.


def nursery(folder: Path, seed: int, processes: int, operations: int, number: int) -> None:
    witness = Witness(folder / "witness", processes)
    for count in range(LIVES_EACH):
        if witness.done[number] >= operations:
            return
        child = os.fork()
        if child == 0:
            try:
                live(folder, random.Random(f"{seed}/{number}/{count}"), witness, operations, number, count)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    raise SystemExit(f"process {number} has used up its lives")


def live(folder: Path, rng: random.Random, witness: Witness, operations: int, number: int, count: int) -> None:
    slot = number * LIVES_EACH + count
    holder = Holder(ReplicaId(f"model-{number}"), Epoch(1, slot), worker=f"worker-{number}-{os.getpid()}", gpu_id=0)
    channel = introduce(folder, holder)
    while witness.done[number] < operations:
        if rng.random() < DIES:
            if rng.random() < 0.5:
                channel.send(ReplicaStopped(replica=holder.replica, epoch=holder.epoch, reason="died in order"))
            return
        level = rng.randrange(PAGES // 2) if rng.random() < 0.5 else rng.randrange(holder.held + 1)
        holder.busy = rng.randrange(holder.held + 1) if rng.random() < 0.1 else 0
        try:
            channel.send(holder.want(level))
            for order in channel.receive(PATIENCE_S):
                assert isinstance(order, Order)
                answer = holder.obey(order)
                witness.held[slot] = holder.held
                channel.send(answer)
        except EOFError:
            channel = introduce(folder, holder)
            continue
        holder.take(level - holder.held)
        witness.held[slot] = holder.held
        witness.done[number] += 1


def introduce(folder: Path, holder: Holder) -> BlockingChannel:
    while True:
        try:
            channel = BlockingChannel.connect(folder / "ledger.sock")
            break
        except OSError:  # the ledger is being restarted, unless the folder is gone: then it is all over
            if not folder.exists():
                os._exit(1)
            time.sleep(0.002)
    channel.send(Hello(role="worker", name=holder.worker, pid=os.getpid()))
    channel.send(holder.announce())
    return channel


# The ledger's side.


class FirstCome:
    """Gives what is asked for, if need be from whoever was allotted most. Never allots more than there is."""

    def __init__(self) -> None:
        self.left = PAGES
        self.allotted: dict[Life, int] = {}

    def __call__(self, node: NodeLedger, event: Event, now: float) -> Iterable[Order]:
        if not isinstance(event, PagesWanted):
            return
        life = (event.replica, event.epoch)
        if life not in self.allotted:
            return
        self.left += self.allotted[life]
        self.allotted[life] = 0
        if event.level > self.left:
            richest = max(self.allotted, key=lambda other: self.allotted[other])
            taken = min(event.level - self.left, self.allotted[richest] // 2)
            yield from self._allot(node, richest, self.allotted[richest] - taken, now)
        yield from self._allot(node, life, min(event.level, self.left), now)

    def _allot(self, node: NodeLedger, life: Life, level: int, now: float) -> list[Order]:
        self.left += self.allotted[life] - level
        self.allotted[life] = level
        return node[0].allot(life, level, now=now, deadline_s=now + 0.5, reason="first come, first served")

    def begin(self, life: Life, level: int) -> None:
        self.allotted[life] = level
        self.left -= level

    def end(self, life: Life) -> None:
        self.left += self.allotted.pop(life, 0)


class Audited(LedgerServer):
    """Checks everything after every event."""

    def __init__(self, ledger: NodeLedger, arbiter: FirstCome, witness: Witness) -> None:
        super().__init__(ledger, arbiter)
        self.arbiter = arbiter
        self.witness = witness
        self.lives: dict[str, Life] = {}
        self.events = 0
        self.broken: list[str] = []
        self.work_s = 0.0
        self.gone = asyncio.Event()
        self.gone_s: dict[str, float] = {}

    def feed(self, event: Event) -> None:
        self.events += 1
        self._follow(event)
        try:
            begin_s = time.perf_counter()
            super().feed(event)
            self.work_s += time.perf_counter() - begin_s
            self.ledger[0].check()
        except (ProtocolError, AssertionError) as fault:
            self.broken.append(f"{type(event).__name__}: {fault}")
            raise
        really = sum(self.witness.held[epoch.counter] for _, epoch in self.lives.values())
        if really > PAGES:
            self.broken.append(f"{type(event).__name__}: the holders have {really} pages of {PAGES}")
        if isinstance(event, WorkerLost):
            self.gone_s[event.worker] = time.monotonic()
            self.gone.set()

    def _follow(self, event: Event) -> None:
        if isinstance(event, PagesHeld) and event.replica and event.epoch:
            if event.worker not in self.lives and event.worker not in self.gone_s:  # its end may overtake its first words
                self.lives[event.worker] = (event.replica, event.epoch)
                self.arbiter.begin((event.replica, event.epoch), event.level)
        elif isinstance(event, WorkerLost) and event.worker in self.lives:
            self.arbiter.end(self.lives.pop(event.worker))

    async def kill_one(self, rng: random.Random) -> tuple[float, int]:
        """How long the pages of a holder killed with -9 take to be back, and how many there were."""
        while True:
            rich = {e.worker: e.lease.charged for e in self.ledger[0].view(0.0).entries if e.lease.charged}
            if not rich:  # all of them between two lives
                await asyncio.sleep(0.001)
                continue
            worker, pages = rng.choice(sorted(rich.items()))
            begin_s = time.monotonic()
            try:
                os.kill(int(worker.rpartition("-")[2]), signal.SIGKILL)
                break
            except ProcessLookupError:  # it has just died of itself
                await asyncio.sleep(0)
        while worker not in self.gone_s:
            self.gone.clear()
            await asyncio.wait_for(self.gone.wait(), 10)
        assert not any(e.worker == worker for e in self.ledger[0].view(0.0).entries), f"{worker} is dead and charged"
        return self.gone_s[worker] - begin_s, pages


async def run(folder: Path, options: argparse.Namespace, figures: Figures) -> None:
    rng = random.Random(options.seed)
    witness = Witness(folder / "witness", options.processes)
    gpu = Gpu(gpu_id=0, capacity_bytes=PAGES * 2 * MIB)
    first = Audited(NodeLedger([GpuLedger(gpu)]), FirstCome(), witness)
    await first.start(folder / "ledger.sock")
    begin_s = time.monotonic()
    arguments = [str(folder), str(options.seed), str(options.processes), str(options.operations)]
    children = [
        subprocess.Popen([sys.executable, __file__, "--nursery", *arguments, str(n)])  # noqa: ASYNC220 (nothing runs yet)
        for n in range(options.processes)
    ]
    try:
        total = options.processes * options.operations
        await reached(witness, total * 1 // 4, children)
        kills = [await first.kill_one(rng)]
        await reached(witness, total * 2 // 4, children)
        second, relearnt_s = await restarted(first, gpu, folder)
        await reached(witness, total * 3 // 4, children)
        kills.append(await second.kill_one(rng))
        await reached(witness, total, children)
        while second.lives:
            second.gone.clear()
            await asyncio.wait_for(second.gone.wait(), 10)
        statuses = [await asyncio.to_thread(child.wait, 10) for child in children]
        wall_s = time.monotonic() - begin_s
        await second.close()
    finally:
        for child in children:
            child.kill()
    done = sum(witness.done)
    broken = first.broken + second.broken
    for fault in broken[:10]:
        print(f"# {fault}")
    events = first.events + second.events
    figures.add("operations", done, "", at_least=total)
    figures.add("events checked", events, "")
    figures.add("operations per second, all processes and checks", done / wall_s, "1/s")
    figures.add("ledger, per event with its sends", (first.work_s + second.work_s) / events * 1e6, "µs")
    figures.add("invariants broken", len(broken), "", at_most=0)
    figures.add("processes that failed", sum(status != 0 for status in statuses), "", at_most=0)
    figures.add("pages leaked", second.ledger[0].view(0.0).charged, "pages", at_most=0)
    for back_s, pages in kills:
        figures.add(f"holder of {pages} pages killed with -9, pages back", back_s * 1e3, "ms", at_most=1000)
    figures.add("ledger restarted, all holders known again", relearnt_s * 1e3, "ms", at_most=LEARN_S * 1e3)


async def restarted(old: Audited, gpu: Gpu, folder: Path) -> tuple[Audited, float]:
    """A new ledger in place of the old one, of which nothing is kept but the names of its holders."""
    begin_s = time.monotonic()
    survivors = list(old.lives)
    await old.close()
    awaited = Survivors(until_s=begin_s + LEARN_S, workers=frozenset(survivors))
    ledger = NodeLedger([GpuLedger(gpu, agent_start=2, survivors=awaited)])
    new = Audited(ledger, FirstCome(), old.witness)
    for worker in survivors:
        new.watch(worker, int(worker.rpartition("-")[2]))
    await new.start(folder / "ledger.sock")
    while ledger[0].learning:  # noqa: ASYNC110 (the ledger has no event for it, and needs none)
        await asyncio.sleep(0.001)
    return new, time.monotonic() - begin_s


def alone(rng: random.Random) -> float:
    """One ledger with eighteen replicas and no socket: seconds for a level to be allotted, told and answered."""
    ledger = GpuLedger(Gpu(gpu_id=0, capacity_bytes=PAGES * 2 * MIB))
    holders = [Holder(ReplicaId(f"model-{n}"), Epoch(0, n), worker=f"worker-{n}", gpu_id=0) for n in range(18)]
    of_life = {(holder.replica, holder.epoch): holder for holder in holders}
    for life, holder in of_life.items():
        ledger.open(life, holder.worker)
    levels = [(rng.choice(list(of_life)), rng.randrange(PAGES // 12)) for _ in range(2000)]
    begin_s = time.perf_counter()
    for life, level in levels:
        orders = ledger.allot(life, level, now=0.0, deadline_s=1.0, reason="alone")
        while orders:
            order = orders.pop()
            orders += ledger.on(of_life[order.replica, order.epoch].obey(order), 0.0)
    return (time.perf_counter() - begin_s) / len(levels)


async def reached(witness: Witness, operations: int, children: list[subprocess.Popen[bytes]]) -> None:
    while sum(witness.done) < operations:
        await asyncio.sleep(0.01)
        if all(child.poll() is not None for child in children):
            raise SystemExit(f"the holders ended after {sum(witness.done)} operations of {operations}")


def main() -> int:
    if sys.argv[1:2] == ["--nursery"]:
        nursery(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        return 0
    options = parser(__doc__)
    options.add_argument("--processes", type=int, default=8)
    options.add_argument("--operations", type=int, default=10_000, help="of each process")
    arguments = options.parse_args()
    figures = Figures("One ledger, many processes", seed=arguments.seed)
    rng = random.Random(arguments.seed)
    figures.samples("eighteen replicas, one level allotted and answered", [alone(rng) * 1e6 for _ in range(11)], "µs")
    with tempfile.TemporaryDirectory(prefix="ledger-") as folder:
        asyncio.run(run(Path(folder), arguments, figures))
    return figures.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())

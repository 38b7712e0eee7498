"""Elastic memory of replicas over several GPUs: all of them in one go or none, and as much as the tightest can give."""

from __future__ import annotations

import random
from typing import TypeVar

import pytest
from chimera.agent.memory import NodeMemory
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.ledger.book import Order
from chimera.ledger.holder import Holder
from chimera.msg import actions, events
from chimera.units import GIB, MIB

PAGE = 2 * MIB
T = TypeVar("T")


class Node:
    """GPUs of 2 GiB and the replicas on them, each with a holder for every GPU; time stands unless it is moved."""

    def __init__(self, gpu_count: int = 2, seed: int = 0) -> None:
        self.now = 100.0
        gpus = [Gpu(gpu_id=i, capacity_bytes=2 * GIB, page_bytes=PAGE, virtual=True) for i in range(gpu_count)]
        self.memory = NodeMemory(
            gpus,
            7,
            send=self._deliver,
            start=self._begin,
            fail=self._failed,
            stop=lambda worker: pytest.fail(worker),
            let_go=lambda worker, _: pytest.fail(worker),
        )
        self.holders: dict[str, dict[int, Holder]] = {}
        self.lives: dict[str, tuple[ReplicaId, Epoch]] = {}
        self.unread: list[Order] = []
        self.failed: list[str] = []
        self._chance = random.Random(seed)

    def bring_up(self, name: str, *gpu_ids: int, weight_bytes: int = 64 * MIB) -> None:
        epoch = Epoch(7, len(self.lives) + 1)
        spec = ModelSpec(
            name=name,
            path="",
            tokenizer_path="",
            architecture="",
            weight_bytes=weight_bytes,
            kv_bytes_per_token=MIB,
            context_length=4096,
            tp_size=len(gpu_ids),
        )
        seat = Seat(replica=ReplicaId(name), gpu_ids=gpu_ids)
        self.lives[name] = (seat.replica, epoch)
        order = actions.Activate(model=spec, seat=seat, epoch=epoch, reason="")
        self.memory.admit(order, [f"{name}-{rank}" for rank in range(len(gpu_ids))], self.now)

    def want(self, name: str, level: int) -> None:
        self.now += 1.0
        for holder in self.holders[name].values():
            self.memory.hear(holder.want(level), self.now)
        self.memory.hear(events.Woke(), self.now + 0.1)

    def stop(self, name: str) -> None:
        replica, epoch = self.lives[name]
        self.holders.pop(name, None)
        self.memory.hear(events.ReplicaStopped(replica=replica, epoch=epoch, reason="unloaded"), self.now)

    def settle(self) -> None:
        """Every replica reads its orders, in any order of GPUs, and says so."""
        while self.unread:
            order = self.unread.pop(self._chance.randrange(len(self.unread)))
            holders = self.holders.get(order.replica.model)
            if holders is not None and holders[order.gpu_id].epoch == order.epoch:
                self.memory.hear(holders[order.gpu_id].obey(order), self.now)
            self.check()

    def check(self) -> None:
        for ledger in self.memory.ledger:
            ledger.check()

    def level(self, name: str) -> int:
        """On all its GPUs."""
        (level,) = {holder.terms.level for holder in self.holders[name].values()}
        return level

    def _deliver(self, order: Order) -> None:
        self.unread.append(order)

    def _begin(self, activation: actions.Activate) -> None:
        assert activation.epoch is not None and len(activation.leases) == len(activation.seat.gpu_ids)
        holders = self.holders[activation.seat.replica.model] = {}
        for rank, (gpu_id, lease) in enumerate(zip(activation.seat.gpu_ids, activation.leases, strict=True)):
            worker = f"{activation.seat.replica.model}-{rank}"
            holder = Holder(activation.seat.replica, activation.epoch, worker=worker, gpu_id=gpu_id)
            holder.terms = holder.terms.told(lease.revision, lease.level)
            holder.take(lease.level)
            holders[gpu_id] = holder

    def _failed(self, failed: events.ActivationFailed) -> None:
        self.failed.append(failed.reason)


def test_a_gang_has_on_each_gpu_what_the_tightest_can_give_and_the_rest_goes_to_others() -> None:
    node = Node()
    node.bring_up("a", 0)
    node.bring_up("b", 1, weight_bytes=GIB)
    node.bring_up("g", 0, 1)
    node.settle()
    assert node.level("g") == node.level("b") == (1024 - 512 - 32) // 2
    assert node.level("a") == 1024 - 32 - 32 - node.level("g")


def test_a_gang_grows_only_when_all_its_gpus_give_more() -> None:
    node = Node()
    for name, gpu_ids in (("a", (0,)), ("b", (1,)), ("g", (0, 1))):
        node.bring_up(name, *gpu_ids)
        node.settle()
    node.want("a", 0)
    node.want("b", 400)
    node.want("g", 900)
    node.settle()
    assert node.level("g") == 1024 - 64 - node.level("b"), "GPU 0 could give more"
    node.want("b", 0)
    node.want("g", 901)
    node.settle()
    assert node.level("g") >= 800


def test_a_gang_that_lacks_room_on_one_gpu_takes_nothing_of_the_others() -> None:
    node = Node()
    node.bring_up("b", 1, weight_bytes=GIB)
    node.bring_up("g", 0, 1, weight_bytes=GIB)
    assert node.failed and "GPU 1 lacks" in node.failed[0]
    assert node.memory.ledger[0].free == 1024 and node.unread == []


def test_a_gang_waits_for_all_its_gpus_without_having_any() -> None:
    node = Node()
    node.bring_up("a", 0)
    node.bring_up("b", 1)
    node.bring_up("g", 0, 1)
    assert "g" not in node.holders
    for order in list(node.unread):
        if order.gpu_id == 0:
            node.unread.remove(order)
            node.memory.hear(node.holders["a"][0].obey(order), node.now)
    assert "g" not in node.holders, "GPU 0 has room now, and GPU 1 has not"
    node.settle()
    assert node.level("g") > 0


def test_what_a_lost_gang_had_is_free_on_each_gpu_when_its_rank_there_is_gone() -> None:
    node = Node()
    node.bring_up("g", 0, 1)
    node.memory.hear(events.WorkerLost(worker="g-1", reason="killed"), node.now)
    assert (node.memory.ledger[0].free, node.memory.ledger[1].free) == (0, 1024), "rank 0 may still have what it had"
    node.memory.hear(events.WorkerLost(worker="g-0", reason="killed with it"), node.now)
    assert node.memory.ledger[0].free == 1024


@pytest.mark.parametrize("seed", range(20))
def test_gangs_that_overlap_all_come_up_and_agree_on_their_levels(seed: int) -> None:
    """Whatever order they come in: with GPUs given one by one, these could wait for one another for ever."""
    chance, node = random.Random(seed), Node(4, seed)
    seats = {"ab": (0, 1), "bc": (1, 2), "cd": (2, 3), "da": (3, 0), "all": (0, 1, 2, 3), "a": (0,), "c": (2,)}
    names = list(seats)
    chance.shuffle(names)
    for name in names:
        node.bring_up(name, *seats[name])
        if chance.random() < 0.5:
            node.settle()
    node.settle()
    assert set(node.holders) == set(seats) and not node.failed
    for _ in range(60):
        name = chance.choice(names)
        node.want(name, chance.randrange(1000))
        if chance.random() < 0.1:
            node.stop(name)
            node.settle()
            node.bring_up(name, *seats[name])
        node.settle()
        assert all(node.level(name) > 0 for name in names)
    for name in names:
        node.stop(name)
    assert all(ledger.free == 1024 for ledger in node.memory.ledger)

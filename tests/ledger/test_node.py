"""Several GPUs behind one door."""

import pytest
from chimera.core.lease import LeaseClass
from chimera.errors import ProtocolError
from chimera.ledger.book import GpuLedger
from chimera.ledger.node import NodeLedger
from chimera.msg.events import GpuSampled, ReplicaStopped, Woke, WorkerLost

from tests.ledger.builders import AGENT_START, NOW, gpu, levels, life, opened


def node_of(*pages: int) -> NodeLedger:
    return NodeLedger(GpuLedger(gpu(n, gpu_id), agent_start=AGENT_START) for gpu_id, n in enumerate(pages))


def test_an_event_reaches_the_gpu_it_speaks_of() -> None:
    node = node_of(8, 4)
    a = opened(node[0], "a")
    assert levels(node[0].allot((a.replica, a.epoch), 8, now=NOW, deadline_s=NOW, reason="test")) == [("Grant", "a", 8)]
    node.on(GpuSampled(gpu_id=1, strangers_bytes=1), NOW)
    assert (node[0].free, node[1].free) == (0, 3)


def test_a_gpu_of_another_node_breaks_the_contract() -> None:
    with pytest.raises(ProtocolError, match="GPU 9, which is not on this node"):
        node_of(8).on(GpuSampled(gpu_id=9, strangers_bytes=1), NOW)


def test_a_lost_rank_frees_its_own_gpu_and_not_its_sisters() -> None:
    """Each rank of a tensor-parallel replica is a process: the memory of one comes back when that one has exited."""
    node = node_of(8, 8)
    gang = life("a")
    for rank in (0, 1):
        node[rank].open(gang, f"w-{rank}")
        node[rank].reserve(f"w-{rank}", LeaseClass.WEIGHTS, 5, life=gang)
    node.on(WorkerLost(worker="w-0", replica=gang[0], epoch=gang[1], reason="killed"), NOW)
    assert (node[0].free, node[1].free) == (8, 3)


def test_a_stopped_replica_frees_every_gpu_it_stood_on() -> None:
    node = node_of(8, 8)
    gang = life("a")
    for rank in (0, 1):
        node[rank].open(gang, f"w-{rank}")
        node[rank].reserve(f"w-{rank}", LeaseClass.WEIGHTS, 5, life=gang)
    node.on(ReplicaStopped(replica=gang[0], epoch=gang[1], reason="drained"), NOW)
    assert (node[0].free, node[1].free) == (8, 8)


def test_the_node_wakes_for_whichever_gpu_is_due_first() -> None:
    node = node_of(8, 8)
    assert node.next_wake_s is None
    a, b = opened(node[0], "a", level=4), opened(node[1], "b", level=4)
    node[0].allot((a.replica, a.epoch), 1, now=NOW, deadline_s=NOW + 9, reason="test")
    node[1].allot((b.replica, b.epoch), 1, now=NOW, deadline_s=NOW + 5, reason="test")
    assert node.next_wake_s == NOW + 5
    assert levels(node.on(Woke(), NOW + 5)) == [("Recall", "b", 1)]


def test_the_view_has_every_gpu() -> None:
    assert [view.gpu.gpu_id for view in node_of(8, 4).view(NOW).gpus] == [0, 1]

"""One agent's GPUs behind one door, told in events."""

from __future__ import annotations

import pytest
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.errors import ProtocolError
from chimera.msg.actions import Abort, Action, Activate, Deactivate, Requeue
from chimera.msg.events import ModelRemoved, ReplicaStopped, RequestCancelled
from chimera.sched.gpu import GpuInput
from chimera.sched.node import NodeScheduler

from tests.sched.builders import activate, arrived, finished, only, ready, routed, words, worker_lost

E1, E2, E3 = (Epoch(7, counter) for counter in (1, 2, 3))
A, B = ReplicaId("a"), ReplicaId("b")


class Watched:
    """A scheduler whose invariants are looked at after every event."""

    def __init__(self) -> None:
        self.scheduler = NodeScheduler("north", 7, (0, 1, 2))

    def on(self, event: GpuInput, now: float = 0.0) -> list[Action]:
        actions = self.scheduler.on(event, now)
        self.scheduler.check()
        assert all(action.reason for action in actions), actions
        assert NodeScheduler.from_state(self.scheduler.state()).state() == self.scheduler.state()
        return actions


@pytest.fixture
def node() -> Watched:
    """`a` twice, on GPUs 0 and 1, both serving one request at a time."""
    watched = Watched()
    watched.on(activate("a", 0))
    watched.on(activate("a", 1, index=1))
    watched.on(ready("a", E1, credits=1))
    watched.on(ready("a", E2, credits=1, index=1))
    return watched


def test_epochs_grow_over_all_gpus(node: Watched) -> None:
    assert only(Activate, node.on(activate("b", 2))).epoch == E3


def test_a_request_goes_to_the_replica_that_control_chose(node: Watched) -> None:
    node.on(routed("x", ReplicaId("a", 1)))
    assert node.on(finished("x", "a", E2, index=1)) == []
    assert words(node.on(routed("y", A))) == ["Admit y"]


def test_a_request_without_a_choice_goes_to_the_least_loaded_replica(node: Watched) -> None:
    assert [len(node.on(arrived(request_id))) for request_id in "xyz"] == [1, 1, 0]


def test_a_request_that_is_here_already_is_not_taken_twice(node: Watched) -> None:
    node.on(routed("x", A))
    assert node.on(routed("x", ReplicaId("a", 1))) == [], "a control that restarted may choose otherwise"


def test_a_request_for_a_replica_that_is_nowhere_goes_back(node: Watched) -> None:
    assert only(Requeue, node.on(routed("x", B))).reason == "b/0 is not on agent north"


def test_a_client_that_leaves_is_found_on_whatever_gpu(node: Watched) -> None:
    node.on(routed("x", ReplicaId("a", 1)))
    assert only(Abort, node.on(RequestCancelled(request_id="x"))).replica == ReplicaId("a", 1)
    assert node.on(RequestCancelled(request_id="unheard of")) == []


def test_a_gang_lives_with_its_first_gpu(node: Watched) -> None:
    node.on(activate("b", 2, 0))
    node.on(ready("b", E3))
    state = {gpu.gpu_id: [tenant.seat.replica for tenant in gpu.tenants] for gpu in node.scheduler.state().gpus}
    assert state == {0: [A], 1: [ReplicaId("a", 1)], 2: [B]}
    assert words(node.on(routed("x", B))) == ["Admit x"]


def test_gpus_of_another_agent_are_refused_before_anything_changes(node: Watched) -> None:
    before = node.scheduler.state()
    with pytest.raises(ProtocolError, match=r"agent north, which does not have GPUs \[9\]"):
        node.on(activate("b", 2, 9))
    assert node.scheduler.state() == before


def test_a_replica_that_moves_leaves_its_old_gpu_first(node: Watched) -> None:
    assert only(Deactivate, node.on(activate("a", 2))).epoch == E1
    assert node.on(activate("a", 2)) == [], "it is still leaving"
    node.on(ReplicaStopped(replica=A, epoch=E1, reason="drained"))
    assert only(Activate, node.on(activate("a", 2))).epoch == E3


def test_a_dead_replica_that_moves_sends_its_queue_back(node: Watched) -> None:
    node.on(routed("served", A))
    node.on(routed("waiting", A))
    node.on(worker_lost("a", E1))
    assert words(node.on(activate("a", 2))) == ["Requeue waiting", "Activate a/0"]


def test_what_serves_can_be_told_to_a_new_control(node: Watched) -> None:
    node.on(activate("b", 2))
    assert {told.epoch for told in node.scheduler.living()} == {E1, E2}
    node.on(worker_lost("a", E1))
    assert {told.epoch for told in node.scheduler.living()} == {E2}
    assert {tenant.state for tenant in node.scheduler.tenants()} == {
        ReplicaState.STOPPED,
        ReplicaState.SERVING,
        ReplicaState.LOADING,
    }


def test_what_is_not_for_a_node_is_passed_over(node: Watched) -> None:
    assert node.on(ModelRemoved(model="a")) == []

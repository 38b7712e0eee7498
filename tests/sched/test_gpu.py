"""One GPU's order and admission, told in events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Abort, Action, Activate, Deactivate, Reject, Requeue
from chimera.msg.events import ActivationFailed, Outcome, ReplicaStopped, RequestCancelled, Woke
from chimera.sched.gpu import GpuInput, GpuScheduler, Mint

from tests.sched.builders import activate, finished, of, only, ready, routed, words, worker_lost

A = ReplicaId("a")


class Watched:
    """A scheduler whose invariants are looked at after every event."""

    def __init__(self) -> None:
        self.scheduler = GpuScheduler(0, Mint(agent_start=7))

    def on(self, event: GpuInput, now: float = 0.0) -> list[Action]:
        actions = self.scheduler.on(event, now)
        self.scheduler.check()
        assert all(action.reason for action in actions), actions
        return actions

    def serving(self, name: str = "a", *, credits: int = 2) -> Epoch:
        """Brings a replica up, and says in which life it is."""
        epoch = only(Activate, self.on(activate(name))).epoch
        assert epoch is not None
        self.on(ready(name, epoch, credits=credits))
        return epoch


@pytest.fixture
def gpu() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    assert GpuScheduler.from_state(watched.scheduler.state(), Mint(7, 99)).state() == watched.scheduler.state()


def test_an_activation_gets_an_epoch_of_this_agent(gpu: Watched) -> None:
    assert only(Activate, gpu.on(activate("a"))).epoch == Epoch(7, 1)
    assert only(Activate, gpu.on(activate("b"))).epoch == Epoch(7, 2)


def test_a_repeated_activation_changes_nothing(gpu: Watched) -> None:
    gpu.on(activate("a"))
    assert gpu.on(activate("a")) == []
    gpu.on(ready("a", Epoch(7, 1)))
    assert gpu.on(activate("a")) == []


def test_requests_wait_while_the_replica_loads_and_go_in_the_order_of_their_arrival(gpu: Watched) -> None:
    gpu.on(activate("a"))
    assert gpu.on(routed("late", A, at=2.0)) == []
    assert gpu.on(routed("early", A, at=1.0)) == []
    assert words(gpu.on(ready("a", Epoch(7, 1)))) == ["Admit early", "Admit late"]


def test_admission_stops_at_the_credits_and_goes_on_when_one_comes_back(gpu: Watched) -> None:
    epoch = gpu.serving(credits=2)
    assert [words(gpu.on(routed(i, A, at=float(n)))) for n, i in enumerate("xyz")] == [["Admit x"], ["Admit y"], []]
    assert words(gpu.on(finished("x", "a", epoch))) == ["Admit z"]
    assert gpu.on(finished("y", "a", epoch)) == []


def test_a_finish_told_twice_gives_one_credit(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    for n, request_id in enumerate("xyz"):
        gpu.on(routed(request_id, A, at=float(n)))
    assert words(gpu.on(finished("x", "a", epoch))) == ["Admit y"]
    assert gpu.on(finished("x", "a", epoch)) == []


def test_a_queued_request_whose_client_leaves_is_dropped_without_a_word(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    gpu.on(routed("x", A))
    gpu.on(routed("y", A))
    assert gpu.on(RequestCancelled(request_id="y")) == []
    assert gpu.on(finished("x", "a", epoch)) == []


def test_an_admitted_request_whose_client_leaves_is_stopped_once_and_keeps_its_credit_until_it_ends(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    gpu.on(routed("x", A))
    gpu.on(routed("y", A))
    assert only(Abort, gpu.on(RequestCancelled(request_id="x"))).epoch == epoch
    assert gpu.on(RequestCancelled(request_id="x")) == []
    assert words(gpu.on(finished("x", "a", epoch, outcome=Outcome.CANCELLED))) == ["Admit y"]


def test_a_lost_worker_sends_back_what_it_served_and_keeps_what_waits_for_its_next_life(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    gpu.on(routed("served", A))
    gpu.on(routed("waiting", A))
    lost = only(Requeue, gpu.on(worker_lost("a", epoch)))
    assert (lost.request_id, lost.fault, lost.lost) == ("served", True, True)
    assert "the engine serving this request was lost" in lost.reason
    again = only(Activate, gpu.on(activate("a")))
    assert again.epoch == Epoch(7, 2)
    assert words(gpu.on(ready("a", Epoch(7, 2)))) == ["Admit waiting"]


def test_a_lost_worker_says_nothing_to_a_client_that_has_left(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    gpu.on(routed("x", A))
    gpu.on(RequestCancelled(request_id="x"))
    assert gpu.on(worker_lost("a", epoch)) == []


@pytest.mark.parametrize("late", [worker_lost("a", Epoch(7, 1)), ready("a", Epoch(7, 1)), finished("x", "a", Epoch(7, 1))])
def test_news_of_an_earlier_life_is_ignored(gpu: Watched, late: GpuInput) -> None:
    gpu.on(worker_lost("a", gpu.serving()))
    gpu.on(activate("a"))
    gpu.on(ready("a", Epoch(7, 2)))
    gpu.on(routed("x", A))
    before = gpu.scheduler.state()
    assert gpu.on(late) == []
    assert gpu.scheduler.state() == before


def test_deactivation_sends_the_queue_back_and_lets_the_engine_drain(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    gpu.on(routed("served", A))
    gpu.on(routed("waiting", A))
    order = Deactivate(replica=A, epoch=epoch, drain_s=3.0, reason="nobody wants it")
    assert words(gpu.on(order)) == ["Requeue waiting", "Deactivate a/0"]
    assert gpu.on(order) == []
    assert words(gpu.on(routed("new", A))) == ["Requeue new"]
    assert gpu.on(finished("served", "a", epoch)) == []
    assert gpu.on(ReplicaStopped(replica=A, epoch=epoch, reason="drained")) == []
    assert not gpu.scheduler.knows(A)


def test_a_replica_that_leaves_with_requests_in_its_engine_sends_them_back(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    gpu.on(routed("served", A))
    gpu.on(routed("waiting", A))
    assert words(gpu.on(ReplicaStopped(replica=A, epoch=epoch, reason="left"))) == ["Requeue served", "Requeue waiting"]


def test_a_deactivation_that_crosses_the_death_of_the_worker_still_frees_the_queue(gpu: Watched) -> None:
    epoch = gpu.serving(credits=1)
    gpu.on(routed("served", A))
    gpu.on(routed("waiting", A))
    gpu.on(worker_lost("a", epoch))
    assert words(gpu.on(Deactivate(replica=A, epoch=epoch, reason="unwanted"))) == ["Requeue waiting"]
    assert not gpu.scheduler.knows(A)


def test_a_failed_activation_keeps_the_queue(gpu: Watched) -> None:
    gpu.on(activate("a"))
    gpu.on(routed("x", A))
    assert gpu.on(ActivationFailed(replica=A, epoch=Epoch(7, 1), reason="no memory")) == []
    gpu.on(activate("a"))
    assert words(gpu.on(ready("a", Epoch(7, 2)))) == ["Admit x"]


def test_a_model_that_cannot_be_served_keeps_nobody_waiting(gpu: Watched) -> None:
    gpu.on(activate("a"))
    gpu.on(routed("x", A))
    failed = ActivationFailed(replica=A, epoch=Epoch(7, 1), reason="no such architecture", permanent=True)
    assert words(gpu.on(failed)) == ["Requeue x"]
    assert not gpu.scheduler.knows(A)


def test_a_request_told_twice_is_served_once(gpu: Watched) -> None:
    gpu.serving(credits=2)
    assert words(gpu.on(routed("x", A))) == ["Admit x"]
    assert gpu.on(routed("x", A)) == []


def test_a_request_for_a_replica_that_is_not_here_goes_back(gpu: Watched) -> None:
    assert words(gpu.on(routed("x", A))) == ["Requeue x"]


def test_a_changed_seat_first_leaves_the_old_one(gpu: Watched) -> None:
    gpu.serving()
    left = only(Deactivate, gpu.on(activate("a", 0, 1)))
    assert "GPUs 0 to 0+1" in left.reason


def test_waking_decides_nothing_under_fcfs(gpu: Watched) -> None:
    assert gpu.on(Woke()) == []


def test_every_reason_gives_its_figures(gpu: Watched) -> None:
    gpu.serving(credits=2)
    (admitted,) = gpu.on(routed("x", A, at=1.0), now=1.25)
    assert admitted.reason == "its turn after 0.250 s: 1 of 2 credits in use, 0 wait"


def test_the_right_kinds_come_out_of_a_crowd(gpu: Watched) -> None:
    epoch = gpu.serving(credits=3)
    for request_id in "xyz":
        gpu.on(routed(request_id, A))
    assert {r.request_id for r in of(Requeue, gpu.on(worker_lost("a", epoch)))} == set("xyz")


def test_a_request_that_was_in_a_lost_engine_before_may_be_what_ends_them(gpu: Watched) -> None:
    epoch = gpu.serving(credits=2)
    gpu.on(routed("once", A))
    gpu.on(routed("twice", A, losses=1))
    first, second = gpu.on(worker_lost("a", epoch))
    assert words([first, second]) == ["Requeue once", "Reject twice worker_lost"]
    assert isinstance(second, Reject) and second.retry_after_s == 0.5
    assert "it is the second engine lost with this request in it" in second.reason

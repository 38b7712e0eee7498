"""`keep_alive` of a request: after the last one its model stays so long, whoever decides, and no longer."""

from __future__ import annotations

import pytest
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Deactivate, WakeAt
from chimera.msg.events import ModelRegistered, ReplicaStopped, RequestArrived, UnloadWanted, Woke
from chimera.sched.control import ControlScheduler
from msgspec.structs import replace

from tests.sched.builders import arrived, costs, finished, joined, model, of, placement, ready, request, seat, words
from tests.sched.test_orders import System

E1, E2 = Epoch(100, 1), Epoch(100, 2)


def keeping(request_id: str, keep_alive_s: float | None, at: float = 0.0) -> RequestArrived:
    return RequestArrived(request=request(request_id, "a", at=at, keep_alive_s=keep_alive_s))


def served(keep_alive_s: float | None, *, pin: bool = False) -> System:
    """Under `static`; the request has ended at 2 s."""
    system = System(placement(seat("a")), gpus=(0,))
    system.on(ModelRegistered(model=replace(model("a"), pin=pin)))
    system.on(ready("a", E1))
    system.on(keeping("x", keep_alive_s), 1.0)
    system.on(finished("x", "a", E1), 2.0)
    return system


def stopped() -> ReplicaStopped:
    return ReplicaStopped(replica=ReplicaId("a"), epoch=E1, reason="drained")


def test_a_model_stays_so_long_after_its_last_request_and_then_leaves() -> None:
    system = served(5.0)
    assert system.on(Woke(), 6.9) == []
    [order] = of(Deactivate, system.on(Woke(), 7.0))
    assert order.reason == "nobody has used it for 5 s, as its last request asked"


def test_it_is_woken_when_the_stay_is_over() -> None:
    scheduler = ControlScheduler(placement(seat("a")))
    for event in (ModelRegistered(model=model("a")), joined(), ready("a", E1), keeping("x", 5.0)):
        scheduler.on(event, 1.0)
    assert [wake.at_s for wake in of(WakeAt, scheduler.on(finished("x", "a", E1), 2.0))] == [7.0]


def test_nought_lets_it_go_as_soon_as_the_request_has_ended() -> None:
    assert words(served(0.0).on(Woke(), 2.0)) == ["Deactivate a/0"]


def test_one_that_still_runs_keeps_it() -> None:
    system = System(placement(seat("a")), "a", gpus=(0,))
    system.on(ready("a", E1))
    system.on(keeping("x", 1.0))
    system.on(keeping("y", 1.0))
    system.on(finished("x", "a", E1), 1.0)
    assert system.on(Woke(), 9.0) == []
    system.on(finished("y", "a", E1), 10.0)
    assert words(system.on(Woke(), 11.0)) == ["Deactivate a/0"]


@pytest.mark.parametrize("last", [None, -1.0, 60.0])
def test_the_last_word_counts(last: float | None) -> None:
    system = served(1.0)
    system.on(keeping("y", last, 2.5), 2.5)
    system.on(finished("y", "a", E1), 3.0)
    assert system.on(Woke(), 50.0) == []


def test_a_pinned_model_stays_whatever_is_asked() -> None:
    assert served(0.0, pin=True).on(Woke(), 2.0) == []


def test_the_next_request_brings_it_back_to_where_it_stood() -> None:
    system = served(0.0)
    system.on(Woke(), 2.0)
    system.on(stopped(), 2.5)
    assert words(system.on(arrived("y", "a"), 3.0)) == ["Activate a/0"]
    assert words(system.on(ready("a", E2), 4.0)) == ["Route y a/0"]
    assert system.on(finished("y", "a", E2), 5.0) == [] and system.on(Woke(), 60.0) == []


def test_one_that_comes_while_it_leaves_waits_for_it_to_return() -> None:
    system = served(0.0)
    system.on(Woke(), 2.0)
    assert system.on(arrived("y", "a"), 2.1) == []
    assert words(system.on(stopped(), 2.5)) == ["Activate a/0"]


def test_what_the_operator_took_down_stays_down() -> None:
    system = served(0.0)
    system.on(Woke(), 2.0)
    system.on(stopped(), 2.5)
    system.on(UnloadWanted(order="o", front="front-0", model="a"), 3.0)
    assert words(system.on(arrived("y", "a"), 4.0)) == ["Reject y model_not_loaded"]


def test_a_policy_that_places_on_demand_hears_of_it_too() -> None:
    scheduler = ControlScheduler(placement(seat("a")), policy="space-sharing", costs=costs())
    for event in (ModelRegistered(model=model("a")), joined(pages=1024), ready("a", E1), keeping("x", 5.0)):
        scheduler.on(event, 1.0)
    scheduler.on(finished("x", "a", E1), 2.0)
    let_go = of(Deactivate, scheduler.on(Woke(), 7.0))
    assert [order.replica for order in let_go] == [ReplicaId("a")]
    scheduler.on(stopped(), 7.5)
    assert words(of(Deactivate, scheduler.on(Woke(), 9.0))) == []
    assert not scheduler.snapshot(9.0).replicas, "it is not brought back only because there is room"
    scheduler.on(arrived("y", "a"), 10.0)
    assert scheduler.snapshot(10.0).replicas
    scheduler.check()

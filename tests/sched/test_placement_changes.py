"""What the operator files anew while the system runs: only what is different happens, and nobody's request is lost."""

from __future__ import annotations

from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Activate, Deactivate
from chimera.msg.events import ActivationFailed, ModelRemoved, PlacementChanged, ReplicaStopped
from msgspec.structs import replace

from tests.sched.builders import arrived, model, of, only, placement, ready, seat, words
from tests.sched.test_orders import System

E1, E2, E3 = Epoch(100, 1), Epoch(100, 2), Epoch(100, 3)
WHY = "the placement file has changed"


def running() -> System:
    system = System(placement(seat("a", 0), seat("b", 1)), "a", "b")
    system.on(ready("a", E1))
    system.on(ready("b", E2))
    return system


def stopped(name: str, epoch: Epoch) -> ReplicaStopped:
    return ReplicaStopped(replica=ReplicaId(name), epoch=epoch, reason="drained")


def test_a_new_model_comes_up_and_the_others_are_left_alone() -> None:
    system = running()
    order = only(Activate, system.on(PlacementChanged(models=(model("c"),), seats=(seat("c", 1),), reason=WHY)))
    assert (order.seat, order.reason) == (seat("c", 1), WHY)
    assert words(system.on(arrived("x", "a"))) == ["Route x a/0"]


def test_a_model_that_is_gone_drains_and_its_name_is_gone_at_once() -> None:
    system = running()
    system.on(arrived("x", "b"))
    change = PlacementChanged(removed=("b",), unseated=(ReplicaId("b"),), reason=WHY)
    assert words(system.on(change)) == ["Deactivate b/0"]
    assert [spec.name for spec in system.scheduler.snapshot(0.0).models] == ["a"]
    assert words(system.on(arrived("y", "b"))) == ["Reject y model_not_found"]
    system.on(stopped("b", E2))
    assert system.scheduler.filed == placement(seat("a", 0))


def test_a_model_on_another_gpu_leaves_the_one_and_comes_up_on_the_other_while_requests_wait() -> None:
    system = running()
    assert words(system.on(PlacementChanged(seats=(seat("a", 1),), reason=WHY))) == ["Deactivate a/0"]
    assert system.on(arrived("x", "a")) == []
    order = only(Activate, system.on(stopped("a", E1)))
    assert order.seat.gpu_ids == (1,)
    assert words(system.on(ready("a", E3))) == ["Route x a/0"]


def test_a_changed_promise_disturbs_no_engine() -> None:
    system = running()
    assert system.on(PlacementChanged(models=(replace(model("a"), pin=True, priority=3, aliases=("z",)),), reason=WHY)) == []
    assert system.scheduler.snapshot(0.0).models[0].pin


def test_a_model_with_other_files_is_loaded_anew_from_them() -> None:
    system = running()
    other = replace(model("a"), path="/models/other")
    [order] = of(Deactivate, system.on(PlacementChanged(models=(other,), reason=WHY)))
    assert (order.replica, order.epoch) == (ReplicaId("a"), E1)
    assert only(Activate, system.on(stopped("a", E1))).model.path == "/models/other"


def test_a_model_that_could_not_be_brought_up_is_tried_again_when_its_entry_is_mended() -> None:
    system = System(placement(seat("a", 0)), "a")
    system.on(ActivationFailed(replica=ReplicaId("a"), epoch=E1, reason="no such option", permanent=True))
    mended = replace(model("a"), engine_args={"option": 1})
    assert only(Activate, system.on(PlacementChanged(models=(mended,), reason=WHY))).model == mended


def test_what_the_operator_loaded_by_hand_stays_as_it_is() -> None:
    system = running()
    system.on(PlacementChanged(models=(model("c"),), seats=(seat("c", 0),), reason=WHY))
    system.on(ready("c", E3))
    assert system.on(PlacementChanged(models=(model("d"),), reason=WHY)) == []
    assert len(system.scheduler.snapshot(0.0).replicas) == 3


def test_a_removed_model_that_is_registered_again_starts_without_its_old_seats() -> None:
    system = running()
    system.on(ModelRemoved(model="a"))
    system.on(stopped("a", E1))
    assert system.on(PlacementChanged(models=(model("a"),), reason=WHY)) == []
    assert only(Activate, system.on(PlacementChanged(seats=(seat("a", 1),), reason=WHY))).seat.gpu_ids == (1,)

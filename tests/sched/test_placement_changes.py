"""What the operator files anew while the system runs: only what is different happens, and nobody's request is lost."""

from __future__ import annotations

from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Activate, Deactivate, Reject, Resize
from chimera.msg.events import ActivationFailed, AgentLost, ModelRemoved, PlacementChanged, ReplicaStopped, ResizeWanted
from msgspec.structs import replace

from tests.sched.builders import arrived, joined, model, of, only, placement, ready, seat, words
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


# KV memory with another limit.


def resize(name: str, limit: int, index: int | None = None) -> ResizeWanted:
    return ResizeWanted(order="o", front="front-0", model=name, index=index, kv_limit_bytes=limit)


def limited(name: str, limit: int | None, index: int = 0) -> Seat:
    return replace(seat(name, index, index=index), kv_limit_bytes=limit)


def test_a_lower_limit_is_told_to_the_engine_that_serves() -> None:
    system = running()
    order = only(Resize, system.on(resize("a", 1 << 20)))
    assert (order.replica, order.epoch, order.kv_limit_bytes) == (ReplicaId("a"), E1, 1 << 20)
    assert system.scheduler.snapshot(0.0).replicas[0].kv_limit_bytes == 1 << 20
    assert system.scheduler.filed.seats[0].kv_limit_bytes == 1 << 20, "who brings it up again does not forget it"
    assert only(Resize, system.on(resize("a", 1 << 30))).kv_limit_bytes == 1 << 30, "it came up with all that was free"


def test_more_than_it_came_up_with_takes_a_new_life() -> None:
    system = System(placement(limited("a", 1 << 20)), "a")
    assert system.on(ready("a", E1)) == []
    assert words(system.on(resize("a", 1 << 21))) == ["Deactivate a/0"]
    assert only(Activate, system.on(stopped("a", E1))).seat.kv_limit_bytes == 1 << 21


def test_pools_of_fixed_size_take_a_new_life_for_any_other() -> None:
    system = System(placement(limited("a", 1 << 20)), "a", elastic=False)
    system.on(ready("a", E1))
    assert words(system.on(resize("a", 1 << 19))) == ["Deactivate a/0"]


def test_an_agent_that_comes_back_is_told_the_limit_again() -> None:
    system = System(placement(limited("a", 1 << 30)), "a", gpus=(0,))
    system.on(ready("a", E1))
    assert len(system.on(resize("a", 1 << 20))) == 1
    system.on(AgentLost(agent="local", reason="killed"))
    system.on(joined(start=200, gpus=(0,), earlier=(100,)))
    assert only(Resize, system.on(ready("a", E1))).kv_limit_bytes == 1 << 20


def test_one_copy_may_have_a_limit_of_its_own_and_one_that_comes_up_hears_of_it_when_it_serves() -> None:
    system = System(placement(limited("a", None), limited("a", None, index=1)), "a")
    system.on(ready("a", E1))
    assert system.on(resize("a", 1 << 20, index=1)) == []
    assert only(Resize, system.on(ready("a", E2, index=1))).replica == ReplicaId("a", 1)


def test_a_model_that_is_wanted_nowhere_has_no_limit() -> None:
    refusal = only(Reject, System(placement(), "a").on(resize("a", 1)))
    assert (refusal.request_id, refusal.code) == ("o", "model_not_loaded")

"""The operator's word: load this, unload that, whatever the policy thought of it."""

from __future__ import annotations

import pytest
from chimera.core.placement import Placement
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Action, Activate, Deactivate, Reject, WakeAt
from chimera.msg.events import ActivationFailed, LoadWanted, ModelRegistered, ReplicaStopped, UnloadWanted
from chimera.sched.control import ControlInput, ControlScheduler

from tests.sched.builders import arrived, joined, model, only, placement, ready, seat, words

E1, E2 = Epoch(100, 1), Epoch(100, 2)


class System:
    """A scheduler whose invariants are looked at after every event."""

    def __init__(self, filed: Placement, *names: str, gpus: tuple[int, ...] = (0, 1), elastic: bool = True) -> None:
        self.scheduler = ControlScheduler(filed)
        for name in names:
            self.on(ModelRegistered(model=model(name)))
        self.on(joined(gpus=gpus, elastic=elastic))

    def on(self, event: ControlInput, now: float = 0.0) -> list[Action]:
        actions = self.scheduler.on(event, now)
        self.scheduler.check()
        assert ControlScheduler.from_state(self.scheduler.state()).state() == self.scheduler.state()
        return [action for action in actions if not isinstance(action, WakeAt)]


def load(name: str, *gpu_ids: int, index: int = 0, kv: int | None = None) -> LoadWanted:
    return LoadWanted(order="o", front="front-0", replica=ReplicaId(name, index), gpu_ids=gpu_ids, kv_limit_bytes=kv)


def unload(name: str, index: int | None = None, drain_s: float | None = None) -> UnloadWanted:
    return UnloadWanted(order="o", front="front-0", model=name, index=index, drain_s=drain_s)


def test_a_model_without_a_place_is_loaded_on_the_emptiest_gpu() -> None:
    system = System(placement(seat("a", 0)), "a", "b")
    order = only(Activate, system.on(load("b")))
    assert (order.seat.replica, order.seat.gpu_ids, order.reason) == (ReplicaId("b"), (1,), "the operator wants it loaded")
    system.on(ready("b", E1))
    assert words(system.on(arrived("x", "b"))) == ["Route x b/0"]


def test_the_operator_may_choose_gpu_copy_and_pool() -> None:
    system = System(placement(seat("a", 0)), "a")
    order = only(Activate, system.on(load("a", 1, index=1, kv=5 << 20)))
    assert (order.seat.replica, order.seat.gpu_ids, order.seat.kv_limit_bytes) == (ReplicaId("a", 1), (1,), 5 << 20)


def test_what_is_up_already_stays_as_it_is() -> None:
    system = System(placement(seat("a", 0)), "a")
    system.on(ready("a", E1))
    assert system.on(load("a")) == []


def test_unloading_drains_and_new_requests_hear_that_it_is_down() -> None:
    system = System(placement(seat("a", 0)), "a")
    system.on(ready("a", E1))
    order = only(Deactivate, system.on(unload("a")))
    assert (order.epoch, order.drain_s, order.reason) == (E1, 5.0, "the operator wants it unloaded")
    system.on(ReplicaStopped(replica=ReplicaId("a"), epoch=E1, reason="drained"))
    assert only(Reject, system.on(arrived("x", "a"))).code == "model_not_loaded"


def test_the_operator_may_shorten_the_drain_and_unload_one_copy() -> None:
    system = System(placement(seat("a", 0), seat("a", 1, index=1)), "a")
    system.on(ready("a", E1))
    system.on(ready("a", E2, index=1))
    order = only(Deactivate, system.on(unload("a", index=1, drain_s=0.0)))
    assert (order.replica, order.drain_s) == (ReplicaId("a", 1), 0.0)


def test_loading_while_it_still_drains_brings_it_back_after() -> None:
    system = System(placement(seat("a", 0)), "a")
    system.on(ready("a", E1))
    system.on(unload("a"))
    assert system.on(load("a")) == []
    order = only(Activate, system.on(ReplicaStopped(replica=ReplicaId("a"), epoch=E1, reason="drained")))
    assert order.seat.replica == ReplicaId("a")


def test_a_model_that_failed_for_good_is_tried_again_when_told_to() -> None:
    system = System(placement(seat("a", 0)), "a")
    system.on(ActivationFailed(replica=ReplicaId("a"), epoch=E1, reason="no such file", permanent=True))
    assert only(Activate, system.on(load("a"))).seat.replica == ReplicaId("a")


@pytest.mark.parametrize(
    ("order", "code", "named"),
    [
        (load("absent"), "model_not_found", "absent"),
        (unload("absent"), "model_not_found", "absent"),
        (load("a", 7), "model_unavailable", "[7]"),
        (load("a", 0, 1), "model_unavailable", "[0, 1]"),
    ],
)
def test_an_order_that_cannot_be_is_answered(order: LoadWanted | UnloadWanted, code: str, named: str) -> None:
    system = System(placement(), "a")
    refusal = only(Reject, system.on(order))
    assert (refusal.request_id, refusal.front, refusal.code) == ("o", "front-0", code) and named in refusal.reason


def test_without_any_agent_there_is_nowhere_to_load() -> None:
    scheduler = ControlScheduler(placement())
    scheduler.on(ModelRegistered(model=model("a")), 0.0)
    assert only(Reject, scheduler.on(load("a"), 0.0)).code == "model_unavailable"


def test_unloading_what_is_down_changes_nothing() -> None:
    system = System(placement(), "a")
    assert system.on(unload("a")) == []

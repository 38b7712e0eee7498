"""The policy of a running system is changed: what stands goes on, and what waits is served or told."""

from __future__ import annotations

from chimera.msg.actions import Activate, Deactivate, Reject, RejectCode, Route
from chimera.msg.events import ModelRegistered, PolicyChosen, Woke
from chimera.sched.control import ControlScheduler

from tests.sched.builders import Epoch, arrived, costs, joined, model, of, placement, ready, seat, words

E1 = Epoch(100, 1)


def running(policy: str = "static") -> ControlScheduler:
    """`a` serves on GPU 0 where the file has it; `b` is registered and has no place."""
    control = ControlScheduler(placement(seat("a")), policy=policy, costs=costs())
    for name in "ab":
        control.on(ModelRegistered(model=model(name)), 0.0)
    control.on(joined(pages=2000), 0.0)
    control.on(ready("a", E1), 1.0)
    return control


def test_what_serves_goes_on_under_the_next_policy() -> None:
    control = running()
    assert of(Deactivate, control.on(PolicyChosen(policy="flexible"), 2.0)) == []
    assert control.snapshot(2.0).policy == "flexible"
    assert "Route x a/0" in words(control.on(arrived("x", "a", at=2.0), 2.0))


def test_a_model_without_a_place_gets_one_when_it_is_asked_for() -> None:
    control = running("space-sharing")
    starts = of(Activate, [*control.on(arrived("x", "b", at=2.0), 2.0), *control.on(Woke(), 3.0)])
    assert {start.seat.replica.model for start in starts} <= {"b"}
    assert control.holds("x")
    served = control.on(ready("b", Epoch(100, 2)), 4.0)
    assert [route.request.request_id for route in of(Route, served)] == ["x"]


def test_a_request_that_the_next_policy_has_no_place_for_is_told_at_once() -> None:
    control = running("time-sharing")
    control.on(arrived("w", "a", at=1.5), 1.5)
    control.on(arrived("x", "b", at=1.5), 1.5)
    assert control.holds("x")
    told = of(Reject, control.on(PolicyChosen(policy="static"), 2.0))
    assert [(reject.request_id, reject.code) for reject in told] == [("x", RejectCode.MODEL_NOT_LOADED)]
    control.check()


def test_a_state_written_under_a_policy_goes_on_under_it() -> None:
    control = running("flexible")
    control.on(arrived("x", "b", at=2.0), 2.0)
    again = ControlScheduler.from_state(control.state())
    assert again.policy == "flexible"
    assert again.on(Woke(), 9.0) == control.on(Woke(), 9.0)

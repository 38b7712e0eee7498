"""The dispatcher and the placement, told in events."""

from __future__ import annotations

import pytest
from chimera.core.placement import Placement
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.msg.actions import Abort, Action, Activate, Deactivate, QueueBy, Reject, RejectCode, Requeue, Route, WakeAt
from chimera.msg.events import (
    ActivationFailed,
    AgentLost,
    ModelRegistered,
    ModelRemoved,
    PlacementChanged,
    ReplicaStopped,
    RequestCancelled,
    Woke,
)
from chimera.sched.control import ControlInput, ControlScheduler
from chimera.sched.fleet import Limits

from tests.sched.builders import (
    arrived,
    finished,
    joined,
    model,
    of,
    only,
    placement,
    ready,
    seat,
    words,
    worker_lost,
)

E1, E2, E3 = (Epoch(100, counter) for counter in (1, 2, 3))


class Watched:
    """A scheduler whose invariants are looked at after every event, and whose timer is kept aside."""

    def __init__(self, wanted: Placement, limits: Limits | None = None) -> None:
        self.scheduler = ControlScheduler(wanted, limits)
        self.wake_s: float | None = None

    def on(self, event: ControlInput, now: float = 0.0) -> list[Action]:
        actions = self.scheduler.on(event, now)
        self.scheduler.check()
        assert all(action.reason for action in actions), actions
        assert ControlScheduler.from_state(self.scheduler.state()).state() == self.scheduler.state()
        for wake in of(WakeAt, actions):
            self.wake_s = wake.at_s
        return [action for action in actions if not isinstance(action, WakeAt | QueueBy)]

    def wake(self) -> tuple[float, list[Action]]:
        """Time passes to the next appointment."""
        assert self.wake_s is not None
        now, self.wake_s = self.wake_s, None
        return now, self.on(Woke(), now)


@pytest.fixture
def control() -> Watched:
    """One wanted replica of `a` on the GPU of an agent that is here; nothing serves yet."""
    watched = Watched(placement(seat("a")), Limits(queue_per_model=4))
    watched.on(ModelRegistered(model=model("a")))
    watched.on(joined())
    return watched


@pytest.fixture
def serving(control: Watched) -> Watched:
    control.on(ready("a", E1, credits=2))
    return control


def fail(control: Watched, epoch: Epoch, now: float = 0.0, *, permanent: bool = False) -> list[Action]:
    event = ActivationFailed(replica=ReplicaId("a"), epoch=epoch, reason="no memory", permanent=permanent)
    return control.on(event, now)


def quarantine(control: Watched) -> list[Action]:
    fail(control, E1)
    fail(control, E2)
    return fail(control, E3)


def test_a_wanted_replica_is_activated_when_model_and_agent_are_known() -> None:
    control = Watched(placement(seat("a")))
    assert control.on(ModelRegistered(model=model("a"))) == []
    order = only(Activate, control.on(joined()))
    assert order.epoch is None
    assert control.scheduler.agent_of(order) == "local"


def test_a_model_registered_after_the_agent_came_is_activated_at_once() -> None:
    control = Watched(placement(seat("a")))
    assert control.on(joined()) == []
    assert words(control.on(ModelRegistered(model=model("a")))) == ["Activate a/0"]
    assert control.on(ModelRegistered(model=model("a"))) == []


def test_a_request_is_held_until_its_replica_serves(control: Watched) -> None:
    assert control.on(arrived("x", at=1.0)) == []
    assert control.on(arrived("y", at=0.5)) == []
    assert control.scheduler.snapshot(0.0).waiting == {"a": 2}
    assert words(control.on(ready("a", E1))) == ["Route y a/0", "Route x a/0"]
    assert words(control.on(arrived("z"))) == ["Route z a/0"]


def test_requests_go_to_the_replica_with_the_fewest_outstanding() -> None:
    control = Watched(placement(seat("a", 0), seat("a", 1, index=1)))
    control.on(ModelRegistered(model=model("a")))
    control.on(joined(gpus=(0, 1)))
    control.on(ready("a", E1))
    control.on(ready("a", E2, index=1))
    routes = [words(control.on(arrived(request_id)))[0] for request_id in "wxyz"]
    assert routes == ["Route w a/0", "Route x a/1", "Route y a/0", "Route z a/1"]
    control.on(finished("x", "a", E2, index=1))
    assert words(control.on(arrived("v"))) == ["Route v a/1"]


def test_an_unknown_model_is_refused(control: Watched) -> None:
    assert words(control.on(arrived("x", "nope"))) == ["Reject x model_not_found"]


def test_a_model_without_a_seat_is_refused_at_once_with_the_reason(control: Watched) -> None:
    control.on(ModelRegistered(model=model("b")))
    refused = only(Reject, control.on(arrived("x", "b")))
    assert refused.code == RejectCode.MODEL_NOT_LOADED
    assert refused.retry_after_s is None
    assert refused.reason.startswith("b is registered, and the placement gives it no GPU")


def test_a_full_queue_refuses_and_says_when_to_come_back(control: Watched) -> None:
    for request_id in "wxyz":
        assert control.on(arrived(request_id)) == []
    refused = only(Reject, control.on(arrived("v")))
    assert refused.code == RejectCode.QUEUE_FULL
    assert refused.queue_position is not None and refused.queue_position > 1
    assert refused.retry_after_s == 5.0
    assert words(control.on(arrived("u", tries=1))) == [], "one that was accepted before is not turned away now"


def test_the_bound_counts_what_waits_before_the_replica_too(serving: Watched) -> None:
    for request_id in "abcdef":
        assert words(serving.on(arrived(request_id))) == [f"Route {request_id} a/0"]
    assert words(serving.on(arrived("g"))) == ["Reject g queue_full"]
    serving.on(finished("a", "a", E1))
    assert words(serving.on(arrived("h"))) == ["Route h a/0"]


def test_retry_after_follows_the_measured_pace(serving: Watched) -> None:
    for n in range(200):
        serving.on(arrived(f"r{n}"), now=n * 0.1)
        serving.on(finished(f"r{n}", "a", E1), now=n * 0.1 + 0.05)
    for request_id in "abcdef":
        serving.on(arrived(request_id), now=30.0)
    refused = only(Reject, serving.on(arrived("g"), now=30.0))
    assert refused.retry_after_s == pytest.approx(5 * 0.05, rel=0.01), "four ahead and itself, 50 ms each"


def test_a_held_request_whose_client_leaves_is_forgotten(control: Watched) -> None:
    control.on(arrived("x"))
    assert control.on(RequestCancelled(request_id="x")) == []
    assert control.on(ready("a", E1)) == []


def test_a_routed_request_whose_client_leaves_is_aborted_where_it_is(serving: Watched) -> None:
    serving.on(arrived("x"))
    abort = only(Abort, serving.on(RequestCancelled(request_id="x")))
    assert serving.scheduler.agent_of(abort) == "local"
    assert serving.on(RequestCancelled(request_id="x")) == []


def test_a_request_told_twice_is_routed_once(serving: Watched) -> None:
    serving.on(arrived("x"))
    assert serving.on(arrived("x")) == []


def test_a_verdict_of_an_agent_passes_through_and_is_the_end_here(serving: Watched) -> None:
    serving.on(arrived("x"))
    verdict = Requeue(request_id="x", front="front-0", reason="its replica leaves")
    assert serving.on(verdict) == [verdict]
    assert serving.scheduler.requests_of("front-0") == []


def test_a_verdict_on_a_request_of_an_earlier_control_still_reaches_its_front_end(serving: Watched) -> None:
    verdict = Reject(request_id="old", front="front-0", code=RejectCode.WORKER_LOST, reason="its worker was lost")
    assert serving.on(verdict) == [verdict]


def test_the_requests_of_a_front_end_that_is_gone_can_be_named(control: Watched) -> None:
    control.on(arrived("x", front="front-1"))
    control.on(arrived("y", front="front-2"))
    assert control.scheduler.requests_of("front-1") == ["x"]


# Failures.


def test_a_lost_worker_is_replaced_at_once_and_new_requests_wait_for_the_next_life(serving: Watched) -> None:
    assert words(serving.on(worker_lost("a", E1))) == ["Activate a/0"]
    assert serving.on(arrived("x")) == []
    assert words(serving.on(ready("a", E2))) == ["Route x a/0"]


def test_a_replica_that_stopped_unasked_is_started_again(serving: Watched) -> None:
    event = ReplicaStopped(replica=ReplicaId("a"), epoch=E1, reason="it left")
    assert words(serving.on(event)) == ["Activate a/0"]


@pytest.mark.parametrize("stale", [worker_lost("a", E1), ready("a", E1), worker_lost("a", Epoch(99, 9))])
def test_news_of_a_life_that_is_over_changes_nothing(serving: Watched, stale: ControlInput) -> None:
    serving.on(worker_lost("a", E1))
    serving.on(ready("a", E2))
    before = serving.scheduler.state()
    assert serving.on(stale) == []
    assert serving.scheduler.state() == before


def test_a_control_that_knows_only_the_newest_life_ignores_the_end_of_an_older_one(control: Watched) -> None:
    control.on(ready("a", E2))
    assert control.on(worker_lost("a", E1)) == []
    assert words(control.on(arrived("x"))) == ["Route x a/0"]


def test_two_failed_activations_are_tried_again_and_the_third_quarantines(control: Watched) -> None:
    control.on(arrived("x"))
    assert words(fail(control, E1)) == ["Activate a/0"]
    assert words(fail(control, E2)) == ["Activate a/0"]
    refused = only(Reject, fail(control, E3))
    assert (refused.request_id, refused.code) == ("x", RejectCode.MODEL_UNAVAILABLE)
    assert refused.reason == "a/0 failed 3 times in a row, the last time because no memory"


def test_a_quarantined_model_refuses_at_once_and_says_for_how_long(control: Watched) -> None:
    quarantine(control)
    refused = only(Reject, control.on(arrived("x"), now=0.25))
    assert refused.retry_after_s == pytest.approx(0.75 + 1.0), "the rest of the quarantine, and a load"


def test_the_quarantine_doubles_from_one_second_to_a_minute(control: Watched) -> None:
    quarantine(control)
    times, now = [], 0.0
    for counter in range(4, 14):
        now, actions = control.wake()
        assert words(actions) == ["Activate a/0"]
        times.append(now)
        fail(control, Epoch(100, counter), now)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_a_quarantined_replica_that_serves_again_takes_requests_again(control: Watched) -> None:
    quarantine(control)
    now, _ = control.wake()
    assert control.on(arrived("x"), now) == []
    assert words(control.on(ready("a", Epoch(100, 4)), now)) == ["Route x a/0"]
    control.on(finished("x", "a", Epoch(100, 4)), now)
    assert words(control.on(worker_lost("a", Epoch(100, 4)), now)) == ["Activate a/0"], "a life that served was no failure"


def test_a_replica_that_dies_before_it_has_served_anyone_is_quarantined_too(control: Watched) -> None:
    for epoch in (E1, E2):
        control.on(ready("a", epoch))
        assert words(control.on(worker_lost("a", epoch))) == ["Activate a/0"]
    control.on(ready("a", E3))
    assert control.on(worker_lost("a", E3)) == []
    assert words(control.on(arrived("x"))) == ["Reject x model_unavailable"]


def test_a_life_of_ten_seconds_is_no_failure(control: Watched) -> None:
    for counter in range(1, 6):
        control.on(ready("a", Epoch(100, counter)), now=counter * 20.0)
        assert words(control.on(worker_lost("a", Epoch(100, counter)), now=counter * 20.0 + 10)) == ["Activate a/0"]


def test_a_permanent_failure_is_not_tried_again(control: Watched) -> None:
    control.on(arrived("x"))
    refused = only(Reject, fail(control, E1, permanent=True))
    assert refused.retry_after_s is None
    assert words(control.on(arrived("y"))) == ["Reject y model_unavailable"]
    assert words(control.wake()[1]) == []


def test_a_model_registered_anew_is_tried_again_after_a_permanent_failure(control: Watched) -> None:
    fail(control, E1, permanent=True)
    assert words(control.on(ModelRegistered(model=model("a", drain_s=9.0)))) == ["Activate a/0"]


def test_requests_that_wait_before_a_quarantined_replica_are_called_back(control: Watched) -> None:
    control.on(ready("a", E1, credits=0))
    control.on(arrived("x"))
    control.on(worker_lost("a", E1))
    fail(control, E2)
    assert words(fail(control, E3)) == ["Abort x", "Reject x model_unavailable"]


def test_requests_that_wait_before_a_quarantined_replica_go_to_another_if_there_is_one() -> None:
    control = Watched(placement(seat("a", 0), seat("a", 1, index=1)))
    control.on(ModelRegistered(model=model("a")))
    control.on(joined(gpus=(0, 1)))
    control.on(ready("a", E1))
    control.on(arrived("x"))
    control.on(worker_lost("a", E1))
    fail(control, Epoch(100, 5))
    assert words(fail(control, Epoch(100, 6))) == ["Abort x", "Requeue x"]


# Agents.


def test_a_lost_agents_requests_go_back_and_wait_for_it(serving: Watched) -> None:
    serving.on(arrived("x"))
    assert serving.on(AgentLost(agent="local", reason="killed"), now=5.0) == []
    assert serving.on(arrived("y"), now=5.0) == []
    assert words(serving.on(joined(start=200), now=6.0)) == ["Requeue x", "Activate a/0"]
    assert serving.on(arrived("x.1", tries=1), now=6.0) == []
    assert words(serving.on(ready("a", Epoch(200, 1)), now=7.0)) == ["Route y a/0", "Route x.1 a/0"]


def test_requests_that_outlive_their_agent_stay_with_the_next_one(serving: Watched) -> None:
    serving.on(arrived("x"))
    serving.on(arrived("y"))
    serving.on(AgentLost(agent="local", reason="killed"), now=5.0)
    returned = joined(start=200, earlier=[100], requests=["x"])
    assert words(serving.on(returned, now=6.0)) == ["Requeue y", "Activate a/0"]
    assert serving.on(ready("a", E1), now=6.0) == [], "the replica lived on, in the same life"
    abort = only(Abort, serving.on(RequestCancelled(request_id="x"), now=7.0))
    assert (abort.epoch, serving.scheduler.agent_of(abort)) == (E1, "local")
    assert words(serving.on(arrived("z"), now=8.0)) == ["Route z a/0"]
    assert serving.on(finished("z", "a", E1), now=9.0) == []
    assert words(serving.on(worker_lost("a", E1), now=9.0)) == ["Activate a/0"]


def test_requests_wait_for_a_lost_agent_only_so_long(serving: Watched) -> None:
    serving.on(arrived("x"))
    serving.on(AgentLost(agent="local", reason="killed"), now=5.0)
    now, actions = serving.wake()
    assert (now, words(actions)) == (8.0, ["Requeue x"])
    assert words(serving.on(joined(start=200, earlier=[100], requests=["x"]), now=9.0)) == ["Abort x", "Activate a/0"]


def test_nobody_waits_for_an_agent_longer_than_its_term(serving: Watched) -> None:
    serving.on(AgentLost(agent="local", reason="killed"), now=5.0)
    serving.on(arrived("x"), now=6.0)
    now, actions = serving.wake()
    while not actions:
        now, actions = serving.wake()
    assert (now, words(actions)) == (35.0, ["Reject x agent_lost"])
    assert words(serving.on(arrived("y"), now=36.0)) == ["Reject y agent_lost"]
    serving.on(joined(start=200), now=40.0)
    assert serving.on(arrived("z"), now=41.0) == []


def test_an_agent_that_comes_back_as_a_new_process_was_lost_in_between(serving: Watched) -> None:
    serving.on(arrived("x"))
    assert words(serving.on(joined(start=200))) == ["Requeue x", "Activate a/0"]
    assert serving.on(worker_lost("a", E1)) == []
    assert serving.on(joined(start=100)) == [], "an older process says nothing any more"


def test_an_agent_that_only_lost_its_connection_drops_what_was_sent_elsewhere_meanwhile(serving: Watched) -> None:
    serving.on(arrived("x"))
    serving.on(AgentLost(agent="local", reason="connection lost"), now=5.0)
    assert words(serving.wake()[1]) == ["Requeue x"]
    assert words(serving.on(joined(requests=["x"]), now=9.0)) == ["Abort x", "Activate a/0"]
    serving.on(arrived("x.1", tries=1))
    assert words(serving.on(ready("a", E1))) == ["Route x.1 a/0"], "the replica lived on, in the same life"


def test_a_replica_that_lives_and_is_not_wanted_is_taken_down(control: Watched) -> None:
    order = only(Deactivate, control.on(ready("b", E2)))
    assert (order.replica, order.epoch) == (ReplicaId("b"), E2)
    assert control.scheduler.agent_of(order) == "local"


def test_a_gang_waits_for_an_agent_that_has_all_of_its_gpus() -> None:
    control = Watched(placement(seat("a", 0, 1)))
    control.on(ModelRegistered(model=model("a", tp_size=2)))
    assert control.on(joined("one", start=1, gpus=(0,))) == []
    assert words(control.on(joined("two", start=2, gpus=(0, 1)))) == ["Activate a/0"]


# Models.


def test_a_removed_model_drains_and_its_waiting_requests_are_told(serving: Watched) -> None:
    serving.on(arrived("x"))
    order = only(Deactivate, serving.on(ModelRemoved(model="a")))
    assert order.drain_s == 5.0
    assert words(serving.on(arrived("y"))) == ["Reject y model_not_found"]
    serving.on(finished("x", "a", E1))
    assert serving.on(ReplicaStopped(replica=ReplicaId("a"), epoch=E1, reason="drained")) == []
    assert serving.scheduler.snapshot(0.0).replicas == ()


def test_a_model_removed_while_it_loads_is_taken_down_as_soon_as_it_has_a_name(control: Watched) -> None:
    control.on(arrived("x"))
    assert words(control.on(ModelRemoved(model="a"))) == ["Reject x model_not_found"]
    assert only(Deactivate, control.on(ready("a", E1))).epoch == E1


def test_a_model_removed_between_two_lives_takes_back_what_waits_for_the_next(control: Watched) -> None:
    control.on(ready("a", E1, credits=0))
    control.on(arrived("x"))
    control.on(worker_lost("a", E1))
    assert control.on(ModelRemoved(model="a")) == []
    assert words(fail(control, E2)) == ["Abort x", "Reject x model_not_found"]


def test_a_model_that_returns_while_it_drains_is_started_again_afterwards(serving: Watched) -> None:
    serving.on(ModelRemoved(model="a"))
    back = PlacementChanged(models=(model("a"),), seats=(seat("a"),), reason="the operator has it back")
    assert serving.on(back) == []
    assert serving.on(arrived("x")) == []
    assert words(serving.on(ReplicaStopped(replica=ReplicaId("a"), epoch=E1, reason="drained"))) == ["Activate a/0"]
    assert words(serving.on(ready("a", E2))) == ["Route x a/0"]


# Time.


def test_nobody_is_held_longer_than_the_limit_whatever_the_hope() -> None:
    control = Watched(placement(seat("a")), Limits(hold_s=60.0))
    control.on(ModelRegistered(model=model("a")))
    control.on(joined())
    control.on(arrived("x"), now=10.0)
    times = [control.wake() for _ in range(2)]
    assert [(now, words(actions)) for now, actions in times] == [(30.0, []), (70.0, ["Reject x queue_timeout"])]


def test_waking_too_early_only_sets_the_timer_again(serving: Watched) -> None:
    serving.on(AgentLost(agent="local", reason="killed"), now=5.0)
    serving.wake_s = None
    assert serving.on(Woke(), now=6.0) == []
    assert serving.wake_s == 8.0


def test_the_snapshot_says_what_runs_and_what_waits(serving: Watched) -> None:
    for request_id in "xyz":
        serving.on(arrived(request_id))
    (view,) = serving.scheduler.snapshot(1.0).replicas
    assert (view.state, view.epoch, view.running, view.queued) == (ReplicaState.SERVING, E1, 2, 1)


def test_a_route_says_whom_it_is_for(serving: Watched) -> None:
    route = only(Route, serving.on(arrived("x")))
    assert serving.scheduler.agent_of(route) == "local"
    assert route.reason == "0 requests before it on a/0, which takes 2 at a time"


def test_a_control_that_begins_keeps_what_an_earlier_one_had_put_where_no_file_names_it() -> None:
    control = Watched(placement(seat("filed"), seat("moved", 0)))
    for name in ("filed", "moved", "loaded"):
        control.on(ModelRegistered(model=model(name)))
    standing = (seat("filed"), seat("moved", 1), seat("loaded", 1), seat("removed", 1))
    control.on(joined(gpus=(0, 1), standing=standing))
    for number, one in enumerate(standing[:-1], 1):
        assert not of(Deactivate, control.on(ready(one.replica.model, Epoch(100, number))))
    assert {(one.replica.model, one.gpu_ids) for one in control.scheduler.fleet.wanted.seats} == {
        ("filed", (0,)),
        ("moved", (1,)),
        ("loaded", (1,)),
    }
    (gone,) = of(Deactivate, control.on(ready("removed", Epoch(100, 4))))
    assert gone.replica == ReplicaId("removed")


def test_a_control_that_has_met_the_agent_before_goes_by_its_own_word(serving: Watched) -> None:
    serving.on(AgentLost(agent="local", reason="away"))
    serving.on(PlacementChanged(unseated=(ReplicaId("a"),), reason="the operator"))
    serving.on(joined(standing=[seat("a")]))
    (gone,) = of(Deactivate, serving.on(ready("a", E1)))
    assert gone.replica == ReplicaId("a")

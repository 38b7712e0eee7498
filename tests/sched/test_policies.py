"""Policies: what every one of them honours, and what each is known for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from chimera.core.model import ModelSpec, Slo
from chimera.core.placement import Placement, Seat
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.snapshot import POLICY_NAMES, Demand, ReplicaView, Snapshot
from chimera.errors import ConfigError
from chimera.sched.policies import POLICIES, policy_named
from chimera.sched.policies.board import Board
from chimera.sched.policies.flexible import Flexible
from chimera.sched.policies.forecast import Forecast
from chimera.sched.policies.outlook import Outlook
from chimera.sched.policies.policy import Decision, Question, WarmRules
from chimera.units import GIB

from tests.sched.builders import costs, gpu, model, seat

COSTS = costs()
ON_DEMAND = sorted(set(POLICIES) - {"static"})
PAGES = 1800  # 3.5 GiB: three models of 1 GiB and some cache


def spec(name: str, **changed: Any) -> ModelSpec:
    return msgspec.structs.replace(model(name), slo=Slo(ttft_s=0.5, tpot_s=0.05), **changed)


def asked(
    models: list[ModelSpec],
    standing: list[Seat],
    demands: dict[str, Demand] | None = None,
    *,
    gpus: int = 1,
    running: dict[str, int] | None = None,
    since_s: float = 0.0,
    warm: WarmRules | None = None,
    pages: int = PAGES,
) -> Question:
    """At second 1000; every seat serves since `since_s`, and models without a demand were idle for 100 s."""
    views = tuple(
        ReplicaView(
            replica=s.replica,
            epoch=Epoch(1, n),
            state=ReplicaState.SERVING,
            gpu_ids=s.gpu_ids,
            running=(running or {}).get(s.replica.model, 0),
            since_s=since_s,
        )
        for n, s in enumerate(standing, start=1)
    )
    idle = {m.name: Demand(idle_s=100.0, total=1) for m in models}
    snapshot = Snapshot(
        now_s=1000.0,
        policy="",
        gpus=tuple(gpu(n, pages=pages) for n in range(gpus)),
        models=tuple(models),
        replicas=views,
        demands=idle | (demands or {}),
    )
    placement = Placement(tuple(standing))
    return Question(snapshot=snapshot, filed=placement, wanted=placement, costs=COSTS, warm=warm or WarmRules())


WAITED_FOR = Demand(requests_per_s=0.1, requests_per_s_minute=0.1, prompt_tokens=10, output_tokens=10, waiting=1, total=5)


def models_of(decision: Decision) -> set[str]:
    return {s.replica.model for s in decision.placement.seats}


def test_operators_and_schedulers_know_the_same_policies() -> None:
    assert tuple(POLICIES) == POLICY_NAMES
    with pytest.raises(ConfigError, match="there are flexible, static"):
        policy_named("random")


@pytest.mark.parametrize("name", ON_DEMAND)
def test_a_model_that_is_waited_for_gets_the_room_of_an_idle_one(name: str) -> None:
    models = [spec(n) for n in "abcd"]
    question = asked(models, [seat("a"), seat("b"), seat("c")], {"d": WAITED_FOR})
    assert "d" in models_of(policy_named(name).decide(question))


@pytest.mark.parametrize("name", ON_DEMAND)
def test_a_pinned_model_never_makes_room(name: str) -> None:
    models = [spec(n, pin=True) for n in "abc"] + [spec("d")]
    question = asked(models, [seat("a"), seat("b"), seat("c")], {"d": WAITED_FOR})
    assert models_of(policy_named(name).decide(question)) == {"a", "b", "c"}


@pytest.mark.parametrize("name", sorted({*ON_DEMAND} - {"simple-global"}))
def test_a_model_within_its_keep_alive_makes_no_room(name: str) -> None:
    models = [spec(n, keep_alive_s=300.0) for n in "abc"] + [spec("d")]
    question = asked(models, [seat("a"), seat("b"), seat("c")], {"d": WAITED_FOR})
    assert {"a", "b", "c"} <= models_of(policy_named(name).decide(question))


@pytest.mark.parametrize("name", ON_DEMAND)
def test_a_model_idle_beyond_its_keep_alive_leaves(name: str) -> None:
    question = asked([spec("a", keep_alive_s=50.0), spec("b", pin=True)], [seat("a"), seat("b")])
    assert models_of(policy_named(name).decide(question)) == {"b"}


@pytest.mark.parametrize("name", ON_DEMAND)
def test_a_model_to_preload_is_placed_before_anybody_asks(name: str) -> None:
    assert "a" in models_of(policy_named(name).decide(asked([spec("a", preload=True)], [])))


@pytest.mark.parametrize("name", ON_DEMAND)
def test_no_more_models_stay_warm_than_the_operator_allows(name: str) -> None:
    models = [spec(n) for n in "abc"]
    rates = {n: Demand(idle_s=30.0 + 5 * i, requests_per_s_minute=0.1 * i, total=9) for i, n in enumerate("abc")}
    for order, stays in (("lru", "a"), ("lfu", "c")):
        warm = WarmRules(order=order, most_models=1)  # type: ignore[arg-type]
        question = asked(models, [seat(n) for n in "abc"], rates, warm=warm)
        assert models_of(policy_named(name).decide(question)) == {stays}


@pytest.mark.parametrize("name", ON_DEMAND)
def test_what_is_placed_fits(name: str) -> None:
    models = [spec(f"m{n}", weight_bytes=GIB + n * 100_000_000) for n in range(9)]
    demands = {m.name: WAITED_FOR for m in models}
    decision = policy_named(name).decide(asked(models, [], demands, gpus=2))
    assert decision.placement.seats
    sizes = {m.name: m.weight_bytes for m in models}
    for gpu_id in (0, 1):
        assert sum(sizes[s.replica.model] for s in decision.placement.on_gpu(gpu_id)) <= gpu(pages=PAGES).capacity_bytes


@pytest.mark.parametrize("name", ON_DEMAND)
def test_a_quiet_system_is_left_as_it_is(name: str) -> None:
    models = [spec("a", pin=True), spec("b", pin=True)]
    question = asked(models, [seat("a", 0), seat("b", 1)], gpus=2)
    assert policy_named(name).decide(question).placement == question.wanted


@pytest.mark.parametrize("name", ON_DEMAND)
def test_a_seat_on_a_gpu_that_is_away_stays_wanted(name: str) -> None:
    question = asked([spec("a")], [seat("a", 7)])
    assert seat("a", 7) in policy_named(name).decide(question).placement.seats


def busy(rate: float) -> Demand:
    return Demand(
        requests_per_s=rate, requests_per_s_minute=rate, prompt_tokens=20, output_tokens=50, open=8, total=1000, idle_s=0.0
    )


def test_flexible_gives_a_model_under_pressure_another_gpu_and_says_why() -> None:
    some = Demand(requests_per_s=0.3, requests_per_s_minute=0.3, prompt_tokens=20, output_tokens=50, total=99, idle_s=0.0)
    demands = {"a": busy(15.0), "b": some, "c": some}
    decision = policy_named("flexible").decide(
        asked([spec("a"), spec("b"), spec("c")], [seat("a", 0), seat("b", 0), seat("c", 1)], demands, gpus=2)
    )
    (new,) = [s for s in decision.placement.seats if s.replica == ReplicaId("a", 1)]
    assert new.gpu_ids == (1,)
    assert "keep their SLO" in decision.reasons[new.replica]


@pytest.mark.parametrize(
    ("lost_per_s", "attained_per_s", "pressed"), [(0.5, 99.5, False), (2.0, 98.0, True), (0.015, 0.1, False)]
)
def test_flexible_is_pressed_by_what_is_much_and_a_part_worth_a_look(
    lost_per_s: float, attained_per_s: float, pressed: bool
) -> None:
    now = Forecast(attained_per_s=attained_per_s, lost_per_s=lost_per_s, attainment={}, busy=0.5)
    assert Flexible()._loses(now) is pressed


def test_what_one_more_replica_gains_is_within_what_it_could_at_the_most() -> None:
    models, standing = [spec(n) for n in "abcd"], [seat("a", 0), seat("b", 0), seat("c", 0), seat("d", 1)]
    for rate in (0.5, 2.0, 5.0, 15.0):
        demands = {"a": busy(rate), "b": busy(5.0), "c": busy(rate), "d": busy(1.0)}
        outlook = Outlook(Board(asked(models, standing, demands, gpus=2)))
        for brought in models[:3]:
            assert outlook.gain(((brought, (1,)),)) <= outlook.relief(brought.name, [0]) + 1e-9


def test_flexible_puts_a_gpu_to_use_on_which_nobody_is_asked_for() -> None:
    models, standing = [spec("a"), spec("b")], [seat("a", 0), seat("b", 1)]
    alone = policy_named("flexible").decide(asked(models, standing, {"a": busy(2.0)}, gpus=2)).placement
    assert [s.gpu_ids for s in alone.seats if s.replica == ReplicaId("a", 1)] == [(1,)]
    together = policy_named("flexible").decide(asked(models, standing, {"a": busy(2.0), "b": busy(2.0)}, gpus=2)).placement
    assert not [s for s in together.seats if s.replica.index == 1], "each has its own"


def test_flexible_does_not_act_on_what_chance_explains() -> None:
    few = Demand(requests_per_s=0.3, requests_per_s_minute=0.1, prompt_tokens=20, output_tokens=50, open=1, total=9, idle_s=0.0)
    question = asked([spec("a"), spec("b")], [seat("a", 0), seat("b", 0)], {"a": few, "b": few}, gpus=2)
    assert policy_named("flexible").decide(question).placement == question.wanted


def test_flexible_lets_a_model_wait_that_would_spoil_more_than_it_brings_but_not_for_ever() -> None:
    models = [spec(n) for n in "abcd"]
    crowded = {n: busy(4.0) for n in "abc"}
    for waited_s, comes in ((1.0, False), (60.0, True)):
        demands = crowded | {"d": msgspec.structs.replace(WAITED_FOR, waited_s=waited_s)}
        question = asked(models, [seat("a"), seat("b"), seat("c")], demands, pages=4 * PAGES)
        assert ("d" in models_of(policy_named("flexible").decide(question))) is comes
    calm = asked(models, [seat("a"), seat("b"), seat("c")], {"d": WAITED_FOR}, pages=4 * PAGES)
    assert "d" in models_of(policy_named("flexible").decide(calm)), "where nobody is disturbed it comes at once"


def test_flexible_makes_room_for_a_replica_by_sending_away_whom_nobody_asks_for() -> None:
    models = [spec(n) for n in "abcde"]
    standing = [seat("a", 0), seat("b", 0), seat("c", 1), seat("d", 1), seat("e", 1)]
    some = Demand(requests_per_s=0.3, requests_per_s_minute=0.3, prompt_tokens=20, output_tokens=50, total=99, idle_s=9.0)
    demands = {"a": busy(15.0), "b": busy(5.0), "c": some, "e": some}
    decision = policy_named("flexible").decide(asked(models, standing, demands, gpus=2))
    assert [s.replica.model for s in decision.placement.on_gpu(1)] == ["c", "e", "a"]


def test_kvpr_moves_a_model_by_making_before_breaking() -> None:
    rates = {n: busy(5.0) for n in "ab"}
    first = policy_named("kvpr").decide(asked([spec("a"), spec("b")], [seat("a", 0), seat("b", 0)], rates, gpus=2))
    assert len(first.placement.seats) == 3, "the source still serves"
    second = asked([spec("a"), spec("b")], list(first.placement.seats), rates, gpus=2, since_s=999.0)
    then = policy_named("kvpr").decide(second)
    assert len(then.placement.seats) == 2


def test_time_sharing_gives_a_gpu_to_one_model_at_a_time_and_not_before_its_turn_is_over() -> None:
    models, waiting = [spec("a"), spec("b")], {"a": busy(1.0), "b": WAITED_FOR}
    early = asked(models, [seat("a")], waiting, running={"a": 1}, since_s=999.0)
    assert models_of(policy_named("time-sharing").decide(early)) == {"a"}
    later = asked(models, [seat("a")], waiting, running={"a": 1}, since_s=900.0)
    assert models_of(policy_named("time-sharing").decide(later)) == {"b"}

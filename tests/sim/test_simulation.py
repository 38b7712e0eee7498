"""The cluster on paper: what it costs, what it holds, and that nothing is lost whatever happens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import msgspec
import pytest
from chimera.core.metrics import Story
from chimera.core.model import ModelSpec, Slo
from chimera.core.placement import Placement, Seat
from chimera.core.replica import ReplicaId
from chimera.errors import ConfigError
from chimera.sched.policies import POLICIES
from chimera.sim.chronicle import Chronicle
from chimera.sim.cluster import Cluster
from chimera.sim.placing import evenly, gpus_of, promises
from chimera.sim.run import Outcome, Scenario, play, simulate
from chimera.trace.trace import Row, Trace
from chimera.units import GIB
from pytest import approx

from tests.sched.builders import costs, model

COSTS = costs(running=8, activation_s=0.5, gpu_bytes=4 * GIB)
MODELS = tuple(msgspec.structs.replace(model(name), slo=Slo(ttft_s=0.5, tpot_s=0.05)) for name in "abcd")


def trace(*rows: Row) -> Trace:
    return Trace("told", rows)


def burst(count: int, name: str = "a", *, at: float = 0.0, every: float = 0.05) -> list[Row]:
    return [Row(at + n * every, name, 20, 10) for n in range(count)]


def mixed(count: int = 200) -> Trace:
    rows = [Row(n * 0.05, "abcd"[n * n % 7 % 4], 10 + n % 50, 1 + n % 30) for n in range(count)]
    return trace(*rows)


def scenario(policy: str = "static", *, gpus: int = 2, models: tuple[ModelSpec, ...] = MODELS, **words: object) -> Scenario:
    return Scenario(models=models, gpus=gpus_of(gpus, COSTS.gpu_bytes), costs=COSTS, policy=policy, **words)  # type: ignore[arg-type]


def stories(made: Scenario, rows: Trace, script: list[tuple[float, Callable[[Cluster], None]]] | None = None) -> list[Story]:
    told: list[Story] = []
    simulate(made, rows, keep=told.extend, script=script or [])
    return told


def test_a_lone_request_takes_what_the_table_says() -> None:
    (story,) = stories(scenario(), trace(Row(1.0, "a", 100, 11)))
    cost = COSTS.of(MODELS[0])
    assert story.ttft_s == approx(cost.prompt_s(100))
    assert story.tpot_s == approx(0.01)
    assert story.sent_s == approx(1.0)


def test_two_engines_at_work_on_one_gpu_take_turns() -> None:
    together = stories(scenario(gpus=1), trace(Row(0.0, "a", 10, 101), Row(0.0, "b", 10, 101)))
    assert [story.tpot_s for story in together] == [approx(0.02, rel=0.05)] * 2


def test_two_requests_of_one_engine_share_its_steps() -> None:
    together = stories(scenario(gpus=1), trace(Row(0.0, "a", 10, 101), Row(0.0, "a", 10, 101)))
    assert [story.tpot_s for story in together] == [approx(0.01, rel=0.05)] * 2


def test_a_newcomer_is_prefilled_after_the_step_under_way() -> None:
    first, second = stories(scenario(gpus=1), trace(Row(0.0, "a", 10, 101), Row(0.5, "a", 10, 1)))[::-1]
    assert second.request_id == "2" or first.request_id == "2"
    newcomer = first if first.request_id == "2" else second
    assert newcomer.ttft_s is not None and newcomer.ttft_s <= 0.01 + COSTS.of(MODELS[0]).prompt_s(10) + 1e-9


def test_a_cache_that_is_full_makes_requests_wait_and_loses_none() -> None:
    small = msgspec.structs.replace(MODELS[0], kv_bytes_per_token=GIB // 20)
    told = stories(scenario(gpus=1, models=(small,)), trace(*burst(40)))
    assert all(story.answered for story in told)
    assert max(story.ttft_s or 0 for story in told) > 0.5


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_request_ends_exactly_once_under_every_policy(policy: str) -> None:
    told = stories(scenario(policy), mixed())
    assert sorted(story.request_id for story in told) == sorted(str(n) for n in range(1, 201))
    assert all(story.answered for story in told)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"static"}))
def test_more_models_than_fit_are_all_served(policy: str) -> None:
    """Two GPUs hold three models each, and there are eight."""
    many = tuple(msgspec.structs.replace(model(f"m{n}"), slo=Slo(ttft_s=5.0)) for n in range(8))
    rows = trace(*(Row(n * 4.0, f"m{n * 3 % 8}", 20, 5) for n in range(40)))
    told = stories(scenario(policy, models=many, filed=Placement()), rows)
    assert [story.refusal for story in told if not story.answered] == []


@pytest.mark.parametrize("policy", ["static", "flexible"])
def test_the_same_seed_gives_the_same_bytes(policy: str) -> None:
    def written() -> bytes:
        chronicle, told = Chronicle(), list[Story]()
        simulate(scenario(policy), mixed().rate_scaled(1.7, 3), chronicle=chronicle, keep=told.extend)
        return chronicle.lines() + chronicle.chrome_trace(told) + msgspec.json.encode(told)

    assert written() == written()


def test_rows_are_drawn_as_they_are_sent_and_come_to_the_same_figures() -> None:
    drawn: list[float] = []
    ended: list[Story] = []
    ahead: list[int] = []

    def rows() -> Iterator[Row]:
        for row in mixed().rows:
            drawn.append(row.at_s)
            yield row

    def told(story: Story) -> None:
        ended.append(story)
        ahead.append(len(drawn))

    assert play(scenario("flexible"), rows(), told=told) == simulate(scenario("flexible"), mixed())
    assert len(ended) == len(drawn) == 200
    assert ahead[0] < 20, "the whole trace was drawn before the first answer"


def test_policies_change_under_load_and_no_request_is_lost() -> None:
    names = ["time-sharing", "space-sharing", "flexible", "kvpr", "static"]
    script = [(1.0 + 2 * n, lambda cluster, name=name: cluster.choose_policy(name)) for n, name in enumerate(names)]
    told = stories(scenario("static"), mixed(300), script)  # type: ignore[arg-type]
    assert len(told) == 300 and all(story.answered for story in told)


def test_what_ran_on_a_gpu_that_fails_goes_on_elsewhere() -> None:
    seen: list[Cluster] = []

    def fail(cluster: Cluster) -> None:
        seen.append(cluster)
        assert cluster.gpus[0].engines, "nothing runs there"
        cluster.lose_gpu(0)

    told = stories(scenario("flexible"), mixed(300), [(5.0, fail)])
    assert len(told) == 300 and all(story.answered for story in told)
    assert seen[0].requeues > 0 and not seen[0].gpus[0].engines


def test_a_request_that_is_in_two_lost_engines_ends_in_one_clear_error() -> None:
    def kill(cluster: Cluster) -> None:
        for replica in [replica for agent in cluster.agents.values() for replica in agent.engines]:
            cluster.lose_worker(replica)

    long = trace(Row(0.0, "a", 100, 2000))
    told = stories(scenario("static"), long, [(0.5, kill), (4.0, kill)])
    assert [story.refusal for story in told] == ["worker_lost"]
    assert [story.answered for story in stories(scenario("static"), long, [(0.5, kill)])] == [True]


def test_the_schedulers_invariants_hold_at_every_moment_on_paper() -> None:
    gpus = gpus_of(2, COSTS.gpu_bytes)
    cluster = Cluster(
        models=MODELS,
        gpus=gpus,
        filed=evenly(MODELS, gpus, COSTS, reserved=False),
        costs=COSTS,
        policy="flexible",
        local="goodput",
        told=lambda story: None,
    )
    for row in mixed().rows:
        cluster.clock.at(5.0 + row.at_s, lambda row=row: cluster.send(row))  # type: ignore[misc]
    while cluster.clock.now < 60 and cluster.clock.step():
        cluster.check()
    assert cluster.open == 0


def test_a_model_asked_for_beyond_its_gpu_gets_another_under_flexible() -> None:
    heavy = trace(*burst(1200, every=0.02))
    alone, shared = (outcome(policy, heavy) for policy in ("static", "flexible"))
    assert shared.switches >= 1
    assert shared.metrics.joint_attainment > alone.metrics.joint_attainment + 0.1


def outcome(policy: str, rows: Trace) -> Outcome:
    return simulate(scenario(policy, models=tuple(msgspec.structs.replace(m, drain_s=5.0) for m in MODELS)), rows)


def test_a_request_longer_than_its_model_reads_is_refused_and_counts_as_sent() -> None:
    made = simulate(scenario(), trace(Row(0.0, "a", 5000, 10), Row(1.0, "a", 10, 10)))
    assert made.metrics.refusals == {"context_length_exceeded": 1}
    assert made.metrics.joint_attainment == 0.5


def test_no_gpus_a_model_too_big_and_a_promise_of_nothing_are_errors_that_name_them() -> None:
    with pytest.raises(ConfigError, match="gpus: there are none"):
        simulate(scenario(gpus=0), mixed())
    with pytest.raises(ConfigError, match="huge fits on none of the 2 GPUs"):
        simulate(scenario(models=(msgspec.structs.replace(model("huge"), weight_bytes=9 * GIB),)), mixed())
    with pytest.raises(ConfigError, match="the ttft SLO of a is 0 s"):
        simulate(scenario(models=(msgspec.structs.replace(model("a"), slo=Slo(ttft_s=0.0)),)), mixed())
    with pytest.raises(ConfigError, match="slo-scale"):
        promises(MODELS, mixed(), COSTS, 0.0)


def test_a_gang_stands_on_neighbours_and_steps_with_both() -> None:
    gang = msgspec.structs.replace(model("wide", tp_size=2), slo=Slo())
    (story,) = stories(scenario("flexible", models=(gang,)), trace(Row(0.0, "wide", 10, 10)))
    assert story.answered
    assert evenly([gang], gpus_of(2, COSTS.gpu_bytes), COSTS, reserved=False).seats == (
        Seat(replica=ReplicaId("wide"), gpu_ids=(0, 1)),
    )


def test_loads_over_one_link_come_one_after_the_other() -> None:
    chronicle = Chronicle()
    simulate(scenario(gpus=1), mixed(), chronicle=chronicle)
    served = [entry.at_s for entry in chronicle.entries if entry.what == "serves"][:3]
    assert [b - a for a, b in itertools.pairwise(served)] == [approx(1.0), approx(1.0)]
    assert math.isclose(served[0], 1.5)


def test_who_asks_whether_few_are_missed_is_told_no_early_and_yes_as_ever() -> None:
    made = scenario(gpus=1, models=tuple(msgspec.structs.replace(m, slo=Slo(ttft_s=0.001)) for m in MODELS))
    few = simulate(made, mixed(), most_missed=20)
    assert few.metrics.sent < 100 < simulate(made, mixed()).metrics.sent
    assert few.metrics.sent * (1 - few.metrics.joint_attainment) > 20
    easy = scenario(gpus=2)
    assert simulate(easy, mixed(), most_missed=200) == simulate(easy, mixed())

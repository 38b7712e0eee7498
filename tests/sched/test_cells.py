"""Many GPUs are decided in cells: each by itself, and models go from one to another without a gap."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from chimera.core.metrics import Story
from chimera.core.model import ModelSpec, Slo
from chimera.core.placement import Placement, Seat
from chimera.core.replica import ReplicaId
from chimera.core.snapshot import Snapshot
from chimera.msg.actions import Action
from chimera.msg.events import LoadWanted, ModelRegistered, Woke
from chimera.sched.control import ControlInput, ControlScheduler
from chimera.sched.policies import POLICIES
from chimera.sched.policies.policy import Decision, Question
from chimera.sim.chronicle import Chronicle
from chimera.sim.cluster import Cluster
from chimera.sim.placing import gpus_of
from chimera.sim.run import WARM_UP_S, Scenario, play
from chimera.trace.trace import Row
from chimera.units import GIB

from tests.sched.builders import costs, joined, model, seat

COSTS = costs(running=8, activation_s=0.5, gpu_bytes=4 * GIB)
FIRST = 16
"""GPUs of the first cell."""


class Listening(msgspec.Struct, frozen=True):
    """Flexible, and what it was asked."""

    heard: list[Question]
    name: str = "flexible"
    on_demand: bool = True

    def decide(self, question: Question) -> Decision:
        self.heard.append(question)
        return FLEXIBLE.decide(question)


FLEXIBLE = POLICIES["flexible"]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    listening = Listening([])
    monkeypatch.setitem(POLICIES, "flexible", listening)
    return listening.heard


def models(count: int) -> tuple[ModelSpec, ...]:
    return tuple(msgspec.structs.replace(model(f"m{n}"), slo=Slo(ttft_s=0.5, tpot_s=0.05)) for n in range(count))


def filed(count: int, gpus: int) -> Placement:
    return Placement(tuple(Seat(replica=ReplicaId(f"m{n}"), gpu_ids=(n % gpus,)) for n in range(count)))


def scenario(count: int, *, gpus: int = 40, on: int | None = None) -> Scenario:
    """So many models, one each on the first GPUs in turn."""
    return Scenario(
        models=models(count), gpus=gpus_of(gpus, COSTS.gpu_bytes), costs=COSTS, filed=filed(count, gpus if on is None else on)
    )


def asked(count: int, seconds: float, *, every: float = 0.02, among: int) -> list[Row]:
    return [Row(n * every, f"m{n * 7 % among}", 20, 10) for n in range(int(seconds / every))][: count or None]


def test_up_to_32_gpus_are_decided_as_one(heard: list[Question]) -> None:
    play(scenario(8, gpus=32), asked(0, 2.0, among=8))
    assert {len(question.snapshot.gpus) for question in heard if question.snapshot.now_s > 1} == {32}
    assert {len(question.snapshot.models) for question in heard} == {8}


def test_beyond_each_question_is_about_one_cell_of_whole_nodes(heard: list[Question]) -> None:
    play(scenario(40), asked(0, 6.0, among=40))
    later = [question.snapshot for question in heard if question.snapshot.now_s > 1]
    assert {len(snapshot.gpus) for snapshot in later} == {16, 8}
    for snapshot in later:
        assert {sum(gpu.node == node for gpu in snapshot.gpus) for node in {gpu.node for gpu in snapshot.gpus}} == {8}
    assert _together(later) == {f"m{n}" for n in range(40)}


def test_a_crowd_is_no_reason_to_ask_a_cell_among_others_at_once(heard: list[Question]) -> None:
    """One model is asked for in bursts that never find it idle; nobody can have another place."""
    full = tuple(msgspec.structs.replace(m, pin=True, slo=Slo(), weight_bytes=3 * GIB) for m in models(40))
    rows = [Row(n * 0.5 + burst * 1e-3, "m0", 5, 10) for n in range(50) for burst in range(9)]
    play(msgspec.structs.replace(scenario(40), models=full), rows)
    times = [question.snapshot.now_s for question in heard if WARM_UP_S + 2 < question.snapshot.now_s < WARM_UP_S + 20]
    assert 24 <= len(times) <= 30, "three cells, each every two seconds"


def _together(snapshots: Sequence[Snapshot]) -> set[str]:
    """All models that somebody decided about; none is in two cells at one time."""
    newest = {min(gpu.gpu_id for gpu in snapshot.gpus): {m.name for m in snapshot.models} for snapshot in snapshots}
    assert sum(len(names) for names in newest.values()) == len(set().union(*newest.values()))
    return set().union(*newest.values())


def test_a_model_leaves_a_busy_cell_only_when_it_serves_in_the_other() -> None:
    chronicle, told = Chronicle(), list[Story]()
    rows = asked(0, 40.0, every=0.01, among=12)
    play(scenario(12, on=FIRST), rows, chronicle=chronicle, told=told.append)
    assert len(told) == len(rows) and all(story.answered for story in told)
    left = [e for e in chronicle.entries if e.what == "deactivate" and "is served in cell" in e.reason]
    assert left, "nobody moved out of the busy cell"
    for entry in left:
        name = entry.replica.partition("/")[0]
        serves = [
            e.at_s for e in chronicle.entries if e.what == "serves" and e.replica.startswith(f"{name}/") and e.gpus[0] >= FIRST
        ]
        assert entry.gpus[0] < FIRST and min(serves) <= entry.at_s


def test_a_model_that_finds_no_room_at_home_is_brought_up_in_another_cell() -> None:
    """The first cell is full of pinned models, and all GPUs of its own are lost."""
    pinned = tuple(msgspec.structs.replace(m, pin=True) for m in models(3 * FIRST))
    late = msgspec.structs.replace(model("late"), slo=Slo(), weight_bytes=2 * GIB)
    seats = (*filed(3 * FIRST, FIRST).seats,)
    made = msgspec.structs.replace(scenario(0), models=(*pinned, late), filed=Placement((*seats, seat("late", FIRST + 1))))
    told: list[Story] = []
    script = [(2.0, lambda cluster: [cluster.lose_gpu(n) for n in range(FIRST, 2 * FIRST)])]
    play(made, [Row(1.0, "late", 10, 5), Row(20.0, "late", 10, 5)], told=told.append, script=script)  # type: ignore[arg-type]
    assert [story.refusal for story in told] == ["", ""]


def test_where_the_operator_loads_a_model_it_is_at_home() -> None:
    seen: list[Cluster] = []

    def load(cluster: Cluster) -> None:
        seen.append(cluster)
        cluster.tell(None, LoadWanted(order="o", front="f", replica=ReplicaId("m0", 1), gpu_ids=(20,)))

    play(scenario(4, on=4), asked(0, 30.0, every=0.1, among=4), script=[(5.0, load)])
    gpus = [place.seat.gpu_ids[0] for place in seen[0].control.fleet.places_of("m0")]
    assert 20 in gpus and all(FIRST <= gpu_id < 2 * FIRST for gpu_id in gpus)


def test_a_model_whose_move_came_to_nothing_is_at_home_where_it_stands() -> None:
    control = of_forty()
    cells = control._plan.cells
    cells.house("m0", 1)
    for n in range(400):
        control.on(Woke(), 1.0 + n * 0.01)
    assert cells.of_model("m0") == 0
    assert [place.seat.gpu_ids for place in control.fleet.places_of("m0")] == [(0,)]


def test_a_control_in_cells_that_is_revived_decides_as_the_first_would() -> None:
    steps: list[tuple[ControlInput, Sequence[Action], float]] = []
    states = []

    def witness(event: ControlInput, decided: Sequence[Action], now: float) -> None:
        steps.append((event, list(decided), now))

    def remember(cluster: Cluster) -> None:
        states.append((len(steps), cluster.control.state()))

    play(scenario(12, on=FIRST), asked(0, 20.0, every=0.01, among=12), witness=witness, script=[(8.0, remember)])
    ((number, state),) = states
    assert state.cells.models and steps[number][2] >= WARM_UP_S + 8
    revived = ControlScheduler.from_state(state)
    for event, decided, now in steps[number:]:
        assert revived.on(event, now) == decided


def of_forty() -> ControlScheduler:
    """Five agents come one after the other, with a model on each of their GPUs."""
    control = ControlScheduler(filed(40, 40), policy="flexible", costs=COSTS)
    for one in models(40):
        control.on(ModelRegistered(model=one), 0.0)
    for number in range(5):
        control.on(joined(f"a{number}", start=number + 1, gpus=range(8 * number, 8 * number + 8), pages=2048), number / 10)
    return control


def test_an_agent_that_comes_late_brings_its_models_home() -> None:
    cells = of_forty()._plan.cells
    assert [cells.of_model(f"m{n}") for n in (0, 15, 16, 31, 32, 39)] == [0, 0, 1, 1, 2, 2]
    assert [len(cells.cell(n).gpus) for n in range(cells.count)] == [16, 16, 8]

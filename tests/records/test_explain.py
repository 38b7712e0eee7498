"""Five minutes on paper under the real schedulers, and then the question why, for everything that was done."""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
from chimera.cli.explain import account_lines, request_lines
from chimera.core.metrics import Story
from chimera.core.model import ModelSpec, Slo
from chimera.core.record import RequestRecord
from chimera.errors import RequestError
from chimera.records import questions, store
from chimera.records.keeper import Keeper
from chimera.records.scribe import Scribe
from chimera.sched.fleet import Limits
from chimera.sim.chronicle import Chronicle
from chimera.sim.placing import gpus_of
from chimera.sim.run import Scenario, simulate
from chimera.trace.trace import Row, Trace
from chimera.units import GIB

from tests.sched.builders import costs, model

COSTS = costs(running=8, activation_s=0.5, gpu_bytes=4 * GIB, step_s=0.06)
PROMISE = Slo(ttft_s=1.0, tpot_s=0.15)
WILD = '<img src=x onerror="alert(1)">\n\x1b[2J'
NAMES = ("a", "b", "c", "d", "e", WILD)


def asked() -> Trace:
    """Models take turns at being busy; now and then one is asked for more than the house can give."""
    rows = []
    for second in range(300):
        busy = NAMES[second // 60 % len(NAMES)]
        rows += [Row(second + n / 8, busy, 40, 20) for n in range(8)]
        if second % 7 == 0:
            rows.append(Row(second + 0.5, NAMES[second // 7 % len(NAMES)], 20, 10))
        if second % 100 == 50:
            rows += [Row(second + n / 500, busy, 200, 40) for n in range(45)]
    return Trace("told", tuple(sorted(rows, key=lambda row: row.at_s)))


class Told:
    def __init__(self, chronicle: Chronicle, stories: list[Story], reader: sqlite3.Connection) -> None:
        self.chronicle = chronicle
        self.stories = stories
        self.store = reader
        self.all = [msgspec.structs.replace(h) for h in questions.house(reader, 0.0, 1e9).happenings]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    path = tmp_path_factory.mktemp("told") / "records"
    keeper = Keeper(path, wall=lambda: 1000.0)
    scribe = Scribe(keeper.keep)
    chronicle = Chronicle()
    stories: list[Story] = []
    models: tuple[ModelSpec, ...] = tuple(msgspec.structs.replace(model(name), slo=PROMISE) for name in NAMES)
    scenario = Scenario(
        models=models, gpus=gpus_of(3, COSTS.gpu_bytes), costs=COSTS, policy="flexible", limits=Limits(queue_per_model=30)
    )
    simulate(scenario, asked(), chronicle=chronicle, keep=stories.extend, witness=scribe.step)
    for story in stories:
        scribe.told(_record(story))
    keeper.close()
    with closing(store.open_to_read(path)) as reader:
        yield Told(chronicle, stories, reader)


def _record(story: Story) -> RequestRecord:
    return RequestRecord(
        request_id=story.request_id,
        model=story.model,
        arrived_s=story.sent_s,
        first_token_s=story.first_token_s,
        ended_s=story.last_token_s or story.sent_s,
        prompt_tokens=story.prompt_tokens,
        output_tokens=story.output_tokens,
        outcome="length" if story.answered else story.refusal,
        slo=story.slo,
    )


def test_the_replay_evicts_rejects_and_moves(told: Told) -> None:
    happened = Counter(entry.what for entry in told.chronicle.entries)
    assert happened["deactivate"] >= 10 and happened["reject"] >= 5
    assert sum(one.move for one in told.all if one.what == "activate") >= 3


@pytest.mark.parametrize("what", ["activate", "deactivate", "reject"])
def test_everything_that_was_done_is_there_with_its_reason_and_its_cost(told: Told, what: str) -> None:
    """The simulator's own chronicle is the other witness."""
    key = "request" if what == "reject" else "replica"
    done = [entry for entry in told.chronicle.entries if entry.what == what]
    rows = told.store.execute("SELECT * FROM entries WHERE what = ? ORDER BY id", (what,)).fetchall()
    explained = questions._told(told.store, rows)
    assert [getattr(one, key) for one in explained] == [getattr(entry, key).partition(".")[0] for entry in done]
    for one, entry in zip(explained, done, strict=True):
        assert one.why and entry.reason.startswith(one.why)  # the agent may have more to say
        assert one.cost


def test_what_the_policy_weighed_is_there_and_what_it_chose_is_marked(told: Told) -> None:
    moves = [one for one in told.all if one.move and one.what in ("activate", "deactivate")]
    assert moves
    for one in moves:
        assert len(one.alternatives) >= 2, one.why
        assert sum(other.chosen for other in one.alternatives) == 1
        assert [o.score for o in one.alternatives] == sorted((o.score for o in one.alternatives), reverse=True)
        assert all(other.what and other.unit for other in one.alternatives)


def test_a_move_is_told_as_one_at_both_its_ends(told: Told) -> None:
    """As the other lines have it: another replica of the model stood while this one came, or went."""
    standing: dict[str, str] = {}
    moved: Counter[str] = Counter()
    for one in told.all:
        if one.what in ("activate", "deactivate"):
            another = any(model == one.model and replica != one.replica for replica, model in standing.items())
            assert one.move is another, one
            moved[one.what] += another
        if one.what == "activate":
            standing[one.replica] = one.model
        elif one.what in ("stopped", "failed", "lost"):
            standing.pop(one.replica, None)
    assert moved["activate"] > 2 and moved["deactivate"] > 2


def test_every_rejected_request_is_explained_by_its_name(told: Told) -> None:
    refused = [story for story in told.stories if story.refusal not in ("", "open")]
    assert refused
    for story in refused:
        account = questions.request(told.store, story.request_id)
        assert account.outcome == story.refusal
        verdict = [one for one in account.happenings if one.what == "reject" and one.request == story.request_id]
        assert [one.code for one in verdict] == [story.refusal] and verdict[0].why
        assert any("reject" in line for line in request_lines(account))


def test_a_requests_time_is_told_without_gaps(told: Told) -> None:
    answered = [story for story in told.stories if story.answered][::50]
    for story in answered:
        account = questions.request(told.store, story.request_id)
        assert account.tries and account.tries[-1].why
        spans = account.spans
        assert spans[0][1] == account.arrived_s
        assert all(before[2] == after[1] for before, after in itertools.pairwise(spans))


def test_a_models_account_has_its_figures_and_its_own_happenings_only(told: Told) -> None:
    account = questions.model(told.store, "a", 0.0, 1e9)
    assert {one.model for one in account.happenings} == {"a"}
    (figures,) = account.statistics
    mine = [story for story in told.stories if story.model == "a"]
    assert figures.sent == len(mine)
    assert figures.joint_attainment == pytest.approx(sum(s.keeps_both for s in mine) / len(mine))
    assert sum(figures.refused.values()) == sum(not s.answered for s in mine)


def test_a_moment_is_what_happened_around_it(told: Told) -> None:
    eviction = next(one for one in told.all if one.what == "deactivate")
    around = questions.moment(told.store, eviction.at_s)
    assert eviction.id in [one.id for one in around.happenings]
    assert all(abs(one.at_s - eviction.at_s) <= questions.AROUND_S for one in around.happenings)


def test_no_name_reaches_a_terminal_as_it_is(told: Told) -> None:
    lines = list(account_lines(questions.model(told.store, WILD, 0.0, 1e9), leases=True))
    assert len(lines) > 3
    assert all(line.isprintable() for line in lines)


def test_a_request_nobody_knows_is_said_to_be_so(told: Told) -> None:
    with pytest.raises(RequestError, match="no request nonsense"):
        questions.request(told.store, "nonsense")

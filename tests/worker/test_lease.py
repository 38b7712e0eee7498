"""A worker's side of its lease: what orders mean to the engine, and when there is something to say."""

from collections.abc import Iterator

import msgspec
import pytest
from chimera.core.replica import Epoch, ReplicaId
from chimera.engine.api import Holding, Limit
from chimera.msg import actions, events
from chimera.msg.events import Outcome, PagesReturned, PagesWanted
from chimera.units import MIB
from chimera.worker.lease import LeaseDesk

from tests.worker.stage import Hired, Stage, model, payload

NAME = ReplicaId("a")
EPOCH = Epoch(1, 1)


def desk(level: int = 10) -> LeaseDesk:
    return LeaseDesk(NAME, EPOCH, {0: first(level)})


def first(level: int) -> actions.FirstLease:
    return actions.FirstLease(page_bytes=2 * MIB, revision=1, level=level, ceiling=100)


def grant(revision: int, level: int) -> actions.Grant:
    return actions.Grant(replica=NAME, epoch=EPOCH, gpu_id=0, revision=revision, level=level, reason="")


def recall(revision: int, level: int, deadline_s: float) -> actions.Recall:
    return actions.Recall(replica=NAME, epoch=EPOCH, gpu_id=0, revision=revision, level=level, deadline_s=deadline_s, reason="")


def holding(pages: int, wanted: int = 0) -> Holding:
    return Holding(held_bytes=pages * 2 * MIB - 1, wanted_bytes=wanted * 2 * MIB)


def answers(desk: LeaseDesk, pages: int, now: float = 0.0) -> list[tuple[int, int]]:
    return [(n.revision, n.level) for n in desk.report(holding(pages), now) if isinstance(n, PagesReturned)]


def test_a_grant_is_a_limit_in_bytes_without_a_hurry() -> None:
    assert desk().obey(grant(2, 20), now=5.0) == Limit(40 * MIB)


def test_a_recall_lets_requests_end_by_themselves_for_half_of_its_time() -> None:
    assert desk().obey(recall(2, 5, deadline_s=6.0), now=5.0) == Limit(10 * MIB, 5.5)


def test_an_older_order_changes_nothing() -> None:
    kept = desk()
    kept.obey(grant(3, 20), now=0.0)
    assert kept.obey(recall(2, 1, deadline_s=1.0), now=0.0) is None


def test_a_replica_below_its_level_answers_with_the_level_it_may_still_take() -> None:
    assert answers(desk(10), pages=3) == [(1, 10)]


def test_a_recall_is_answered_on_the_way_down_and_at_the_end() -> None:
    kept = desk(10)
    assert answers(kept, 10) == [(1, 10)]
    kept.obey(recall(2, 4, deadline_s=1.0), now=0.0)
    assert [answers(kept, pages) for pages in (9, 9, 6, 2)] == [[(2, 9)], [], [(2, 6)], [(2, 4)]]


def test_an_order_told_again_is_answered_again() -> None:
    kept = desk(10)
    answers(kept, 3)
    kept.obey(grant(1, 10), now=0.0)
    assert answers(kept, 3) == [(1, 10)]


def test_what_is_wanted_is_said_when_it_changes() -> None:
    kept = desk()
    said = [n.level for at in (0, 7, 7, 3) for n in kept.report(holding(1, at), 0.0) if isinstance(n, PagesWanted)]
    assert said == [0, 7, 3]


def test_an_engine_with_nothing_to_say_is_not_asked_in_every_step() -> None:
    kept = desk(10)
    kept.report(holding(3), now=1.0)
    assert not kept.is_due(1.001) and kept.is_due(2.0)
    kept.obey(recall(2, 1, deadline_s=9.0), now=1.001)
    assert kept.is_due(1.001)


# On two GPUs.


def on_two(first_level: int, second_level: int) -> LeaseDesk:
    return LeaseDesk(NAME, EPOCH, {0: first(first_level), 1: first(second_level)})


def at_gpu(gpu_id: int, order: actions.Grant | actions.Recall) -> actions.Grant | actions.Recall:
    return msgspec.structs.replace(order, gpu_id=gpu_id)


def test_what_the_tightest_gpu_allows_is_the_limit() -> None:
    kept = on_two(10, 10)
    assert kept.obey(at_gpu(0, grant(2, 20)), now=0.0) is None
    assert kept.obey(at_gpu(1, grant(2, 15)), now=0.0) == Limit(30 * MIB)


def test_a_grant_on_one_gpu_does_not_call_off_the_hurry_on_another() -> None:
    kept = on_two(10, 10)
    assert kept.obey(at_gpu(0, recall(2, 5, deadline_s=2.0)), now=0.0) == Limit(10 * MIB, 1.0)
    assert kept.obey(at_gpu(1, grant(2, 20)), now=0.0) is None


def test_every_gpu_is_answered_with_its_own_revision_and_level() -> None:
    kept = on_two(10, 10)
    kept.obey(at_gpu(1, recall(2, 4, deadline_s=2.0)), now=0.0)
    said = {(n.gpu_id, n.revision, n.level) for n in kept.report(holding(6), 0.0) if isinstance(n, PagesReturned)}
    assert said == {(0, 1, 10), (1, 2, 6)}


# The same over real sockets, with the simulated engine.

SLOW = model("a", engine_args={"step_s": 0.005}, kv_bytes_per_token=MIB)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("d"), "simulated")
    yield stage
    stage.close()


@pytest.fixture
def worker(stage: Stage) -> Iterator[Hired]:
    stage.new_act()
    hired = stage.hire()
    yield hired
    hired.dismiss()


def test_an_idle_worker_answers_a_recall_at_once(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW, lease=first(40))
    worker.settles(1, 40)
    worker.recall(SLOW, epoch, 2, 3, within_s=10.0)
    assert worker.settles(2, 3)[-1].level == 3


def test_a_request_that_must_yield_comes_back_with_what_it_has(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW, lease=first(40))
    worker.submit("r", epoch, payload([1], 70))
    stage.read_front(lambda: "r" in stage.answers)
    worker.recall(SLOW, epoch, 2, 3, within_s=0.1)
    (answer,) = stage.finished("r")
    assert answer.failed is not None and answer.failed.requeue and answer.tokens
    worker.settles(2, 3)


def test_a_request_waits_for_a_lease_that_has_room_for_it(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW, lease=first(3))
    worker.submit("r", epoch, payload([1], 30))
    while worker.inbox.next(events.PagesWanted, past=(events.PagesReturned,)).level < 16:
        pass
    assert "r" not in stage.answers
    worker.grant(SLOW, epoch, 2, 16)
    (answer,) = stage.finished("r")
    assert answer.outcome is Outcome.LENGTH

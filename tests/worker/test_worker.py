"""A worker's life over real sockets, with the simulated engine."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chimera.core.replica import Epoch, ReplicaId
from chimera.engine.simulated import token_after
from chimera.msg import actions, events, stream
from chimera.msg.events import Outcome

from tests.worker.stage import Hired, Stage, model, payload

SLOW = model("a", engine_args={"step_s": 0.005})
ENDLESS = 1_000_000


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


def test_a_worker_becomes_one_model_after_another(stage: Stage, worker: Hired) -> None:
    for name in ("a", "b"):
        epoch, ready = worker.become(model(name))
        assert (ready.replica, ready.epoch) == (ReplicaId(name), epoch)
        worker.submit(f"r-{name}", epoch, payload([1, 2, 3], 5))
        (answer,) = stage.finished(f"r-{name}")
        assert answer.tokens == [token_after(name, [1, 2, 3], made, 256) for made in range(5)]
        assert answer.outcome is Outcome.LENGTH
        finished = worker.inbox.next(events.RequestFinished)
        assert (finished.request_id, finished.epoch, finished.output_tokens) == (f"r-{name}", epoch, 5)
        worker.leave(name, epoch)
        assert worker.inbox.next(events.ReplicaStopped).reason == "a test is done"


def test_its_steps_are_timed_for_whoever_plans(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(model("a", engine_args={"step_s": 0.02}))
    worker.submit("timed", epoch, payload([1, 2, 3], 150))
    seen = [worker.inbox.next(events.StepsTimed) for _ in range(2)]
    stage.finished("timed")
    assert (seen[0].replica, seen[0].epoch) == (ReplicaId("a"), epoch)
    assert (sum(told.prompts for told in seen), sum(told.prompt_tokens for told in seen)) == (1, 3)
    steps = seen[1].decode_steps
    assert steps >= 5 and seen[1].decode_tokens == steps and seen[1].context_tokens > 3 * steps
    assert seen[1].decode_s / steps >= 0.02


KEPT = {"kept_bytes": 300 << 20}
PAGE_BYTES = 2 << 20
LEASE = actions.FirstLease(page_bytes=PAGE_BYTES, revision=1, level=8, ceiling=8)


def keep(worker: Hired, name: str) -> events.ReplicaStopped:
    """Have it leave something there."""
    epoch, _ = worker.become(model(name, engine_args=KEPT), lease=LEASE)
    worker.leave(name, epoch)
    return worker.inbox.next(events.ReplicaStopped, past=(events.PagesReturned, events.PagesWanted))


def let_go(worker: Hired, pages: int) -> events.Kept:
    worker.channel.send(stream.LetGo(gpu_id=0, pages=pages, page_bytes=PAGE_BYTES, reason="a test wants it"))
    told = worker.inbox.next(events.PagesKept, past=(events.PagesReturned, events.PagesWanted))
    assert (told.worker, told.gpu_id) == ("w0", 0)
    return told.kept


def test_a_worker_says_what_it_keeps_when_a_model_has_left(worker: Hired) -> None:
    assert keep(worker, "a").kept == events.Kept(models=("a",), pages=150)
    assert keep(worker, "b").kept == events.Kept(models=("a", "b"), pages=300)


def test_an_empty_worker_lets_go_of_what_it_keeps(worker: Hired) -> None:
    keep(worker, "a")
    keep(worker, "b")
    assert let_go(worker, 299) == events.Kept(models=("b",), pages=150)
    assert let_go(worker, 0) == events.Kept()


def test_a_worker_that_serves_lets_go_of_all_but_what_it_serves(stage: Stage, worker: Hired) -> None:
    keep(worker, "a")
    keep(worker, "b")
    epoch, _ = worker.become(model("b", engine_args=KEPT), lease=LEASE)
    assert let_go(worker, 0) == events.Kept(pages=150), "what belongs to the one that is up cannot go"
    worker.submit("r", epoch, payload([1, 2, 3], 2))
    (answer,) = stage.finished("r")
    assert answer.outcome is Outcome.LENGTH


def test_a_request_for_another_epoch_goes_back_to_its_front_end(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(model("a"))
    worker.submit("late", Epoch(1, epoch.counter - 1), payload([1], 5))
    (answer,) = stage.finished("late")
    assert answer.failed is not None and answer.failed.requeue


def test_a_request_for_an_empty_worker_goes_back_to_its_front_end(stage: Stage, worker: Hired) -> None:
    worker.submit("early", Epoch(1, 1), payload([1], 5))
    (answer,) = stage.finished("early")
    assert answer.failed is not None and answer.failed.requeue


def test_draining_finishes_what_runs(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW)
    worker.submit("r", epoch, payload([1], 20))
    worker.leave("a", epoch)
    (answer,) = stage.finished("r")
    assert (len(answer.tokens), answer.outcome) == (20, Outcome.LENGTH)
    assert worker.inbox.next(events.RequestFinished).outcome is Outcome.LENGTH
    worker.inbox.next(events.ReplicaStopped)


def test_what_does_not_drain_in_time_is_handed_back(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW)
    worker.submit("r", epoch, payload([1], ENDLESS))
    stage.read_front(lambda: "r" in stage.answers)
    worker.leave("a", epoch, drain_s=0.05)
    (answer,) = stage.finished("r")
    assert answer.failed is not None and answer.failed.requeue and answer.tokens
    assert worker.inbox.next(events.RequestFinished).outcome is Outcome.REQUEUED
    worker.inbox.next(events.ReplicaStopped)


def test_a_draining_worker_takes_no_new_request(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW)
    worker.submit("first", epoch, payload([1], 40))
    worker.leave("a", epoch)
    worker.submit("second", epoch, payload([1], 1))
    first, second = stage.finished("first", "second")
    assert second.failed is not None and second.failed.requeue
    assert first.outcome is Outcome.LENGTH


def test_an_aborted_request_falls_silent_and_gives_its_credit_back(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW)
    worker.submit("r", epoch, payload([1], ENDLESS))
    stage.read_front(lambda: "r" in stage.answers)
    worker.channel.send(actions.Abort(request_id="r", replica=ReplicaId("a"), epoch=epoch, reason="the client left"))
    assert worker.inbox.next(events.RequestFinished).outcome is Outcome.CANCELLED
    worker.submit("next", epoch, payload([1], 1))
    stage.finished("next")
    assert not stage.answers["r"].over


def test_a_paused_worker_takes_no_step_and_goes_on_when_resumed(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW)
    worker.channel.send(actions.Pause(replica=ReplicaId("a"), epoch=epoch, reason="another model's turn"))
    worker.submit("r", epoch, payload([1], 3))
    # It still reads its orders, each answer a look at the post. Between two looks an engine that is not held takes a step.
    for probe in ("probe-1", "probe-2"):
        worker.submit(probe, Epoch(1, epoch.counter - 1), payload([1], 1))
        stage.finished(probe)
    assert "r" not in stage.answers
    worker.channel.send(actions.Resume(replica=ReplicaId("a"), epoch=epoch, reason="its turn again"))
    (answer,) = stage.finished("r")
    assert len(answer.tokens) == 3


def test_a_payload_that_cannot_be_read_ends_in_a_clear_error(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(model("a"))
    worker.submit("r", epoch, b"\xc1 not msgpack")
    (answer,) = stage.finished("r")
    assert answer.failed is not None and answer.failed.code == "bad_request" and not answer.failed.requeue
    assert worker.inbox.next(events.RequestFinished).outcome is Outcome.FAILED


def test_engine_arguments_that_mean_nothing_are_refused_and_the_worker_stays_usable(worker: Hired) -> None:
    worker.activate(model("a", engine_args={"step_z": 1}))
    failed = worker.inbox.next(events.ActivationFailed)
    assert failed.permanent and "step_z" in failed.reason
    worker.become(model("b"))


def test_requests_share_steps(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(SLOW)
    for i in range(8):
        worker.submit(f"r{i}", epoch, payload([i], 10))
    answers = stage.finished(*(f"r{i}" for i in range(8)))
    assert [len(a.tokens) for a in answers] == [10] * 8


def test_a_front_end_that_is_gone_does_not_hold_up_the_worker(stage: Stage, worker: Hired) -> None:
    epoch, _ = worker.become(model("a"))
    worker.submit("lost", epoch, payload([1], 5), front="front-9")
    assert worker.inbox.next(events.RequestFinished).request_id == "lost"
    worker.submit("r", epoch, payload([1], 5))
    assert stage.finished("r")[0].outcome is Outcome.LENGTH


def test_what_comes_right_behind_an_activation_is_not_lost(stage: Stage, worker: Hired) -> None:
    epoch = worker.activate(model("a"))
    worker.leave("a", epoch)
    worker.inbox.next(events.ReplicaReady)
    assert worker.inbox.next(events.ReplicaStopped).epoch == epoch


def test_a_worker_told_to_stop_says_so_for_its_replica_and_ends(worker: Hired) -> None:
    epoch, _ = worker.become(model("a"))
    worker.channel.send(stream.Stop())
    assert worker.inbox.next(events.ReplicaStopped).epoch == epoch
    assert worker.gone()


def test_a_worker_outlives_its_parent(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "simulated")
    worker = stage.hire()
    epoch, _ = worker.become(model("a"))
    stage.parent.send_signal(signal.SIGKILL)
    stage.parent.wait()
    worker.submit("r", epoch, payload([1], 3))
    assert len(stage.finished("r")[0].tokens) == 3
    worker.dismiss()
    stage.close()

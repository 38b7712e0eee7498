"""Control, an agent and real workers together: a request's way, and what becomes of it when something on the way dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chimera.agent import pool
from chimera.core.lease import LeaseClass
from chimera.core.replica import ReplicaState
from chimera.engine.simulated import token_after
from chimera.msg import actions, events, stream
from chimera.msg.actions import RejectCode
from chimera.msg.events import Outcome
from chimera.sched.control import ControlInput
from chimera.wire.channel import connect
from chimera.wire.vigil import Vigil
from chimera.worker import ties

from tests.agent.rig import Answer, Front, System, alive, enqueue, kill, model, on_gpu, parent, system

PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def parent_socket() -> Iterator[Path]:
    with parent() as socket:
        yield socket


async def end_of(answer: Answer) -> Answer:
    await asyncio.wait_for(answer.ended.wait(), PATIENCE_S)
    return answer


async def begin_of(answer: Answer) -> None:
    await asyncio.wait_for(answer.began.wait(), PATIENCE_S)


async def test_a_request_goes_all_the_way_and_its_tokens_come_straight_back(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a")]) as (_, front):
        assert await front.models.get() == "a"
        answer = await end_of(front.ask("r", of="a", prompt=[7, 8], tokens=5))
        assert answer.outcome is Outcome.LENGTH
        assert answer.token_ids == [token_after("a", [7, 8], made, 256) for made in range(5)]


async def test_a_request_is_held_until_its_model_is_there(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", load_s=0.2)]) as (_, front):
        answer = front.ask("r", of="a")
        assert (await front.snapshot()).waiting == {"a": 1}
        assert (await end_of(answer)).outcome is Outcome.LENGTH
        assert (await front.snapshot()).waiting == {}


async def test_many_requests_of_two_models_all_end_and_nothing_is_kept(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", max_running=3), model("b")]) as (made, front):
        answers = [front.ask(f"r{i}", of="ab"[i % 2], tokens=1 + i % 7) for i in range(200)]
        for i, answer in enumerate(answers):
            await end_of(answer)
            assert answer.outcome is Outcome.LENGTH
            assert len(answer.token_ids) == 1 + i % 7
        await front.snapshot()
        await settled(made.control._payloads, made.agent._held)


async def settled(*tables: dict[str, object]) -> None:
    """What ends a request at its front-end reaches the agent a moment earlier or later."""
    deadline_s = time.monotonic() + PATIENCE_S
    while any(tables):
        assert time.monotonic() < deadline_s, f"something is kept: {tables}"
        await asyncio.sleep(0)


async def test_a_model_that_no_one_has_heard_of_is_refused(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a")]) as (_, front):
        answer = await end_of(front.ask("r", of="nobody"))
        assert isinstance(answer.verdict, actions.Reject)
        assert answer.verdict.code == RejectCode.MODEL_NOT_FOUND


async def test_a_model_without_a_seat_is_refused_at_once(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a"), model("b")], wanted=[on_gpu("a")]) as (_, front):
        answer = await end_of(front.ask("r", of="b"))
        assert isinstance(answer.verdict, actions.Reject)
        assert answer.verdict.code == RejectCode.MODEL_NOT_LOADED


async def test_a_client_that_leaves_stops_its_request_wherever_it_is(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.005, max_running=1)]) as (made, front):
        running = front.ask("running", of="a", tokens=100_000)
        waiting = front.ask("waiting", of="a", tokens=1)
        await begin_of(running)
        front.send(stream.Cancel(request_id="running"))
        assert (await end_of(waiting)).outcome is Outcome.LENGTH, "the credit came back"
        front.ask("other", of="a", tokens=100_000)
        gone = front.ask("gone", of="a", tokens=1)
        front.send(stream.Cancel(request_id="gone"))
        front.send(stream.Cancel(request_id="other"))
        assert (await end_of(front.ask("last", of="a"))).outcome is Outcome.LENGTH
        assert not gone.began.is_set()
        await settled(made.control._payloads, made.agent._held)


async def test_a_killed_worker_sends_its_streams_back_at_once_and_its_model_comes_back(parent_socket: Path) -> None:
    models = [model("a", step_s=0.005, max_running=1), model("b", step_s=0.005)]
    async with system(parent_socket, models) as (made, front):
        await made.until(events.ReplicaReady, 2)
        broken = front.ask("broken", of="a", tokens=100_000)
        queued = front.ask("queued", of="a", tokens=3)
        other = front.ask("other", of="b", tokens=100)
        await begin_of(broken)
        await begin_of(other)
        victim = next(w for w in made.agent._pool if w.replica is not None and w.replica.model == "a")
        assert victim.vigil is not None
        killed_s = time.monotonic()
        kill(victim.vigil.pid)
        await end_of(broken)
        assert time.monotonic() - killed_s < 1.0
        assert isinstance(broken.verdict, actions.Requeue)
        assert broken.verdict.lost and broken.verdict.fault
        await made.until(events.ReplicaReady)
        assert time.monotonic() - killed_s < 2.0
        assert (await end_of(queued)).outcome is Outcome.LENGTH, "who only waited is served by the next life"
        assert (await end_of(other)).outcome is Outcome.LENGTH, "others are untouched"


async def test_a_worker_that_hangs_is_replaced_and_one_that_only_waits_is_not(parent_socket: Path) -> None:
    models = [model(name, step_s=0.002) for name in ("hangs", "paused", "idle")]
    async with system(parent_socket, models, silent_s=2.0) as (made, front):
        ready = await made.until(events.ReplicaReady, 3)
        epoch = next(r.epoch for r in ready if isinstance(r, events.ReplicaReady) and r.replica.model == "paused")
        by_name = {w.replica.model: w.vigil.pid for w in made.agent.workers if w.replica is not None and w.vigil is not None}
        hanging, held = front.ask("hanging", of="hangs", tokens=100_000), front.ask("held", of="paused", tokens=300)
        await begin_of(hanging)
        await begin_of(held)
        made.agent._perform(actions.Pause(replica=on_gpu("paused").replica, epoch=epoch, reason="a test"))
        os.kill(by_name["hangs"], signal.SIGSTOP)
        await end_of(hanging)
        assert isinstance(hanging.verdict, actions.Requeue)
        assert hanging.verdict.lost and "it made no step for 2 s" in hanging.verdict.reason
        assert (await end_of(front.ask("again", of="hangs", tries=1))).outcome is Outcome.LENGTH
        made.agent._perform(actions.Resume(replica=on_gpu("paused").replica, epoch=epoch, reason="a test"))
        assert (await end_of(held)).outcome is Outcome.LENGTH
        assert not alive(by_name.pop("hangs"))
        assert set(by_name.values()) <= set(made.workers())


async def test_a_worker_that_cannot_serve_is_given_up_and_says_why(parent_socket: Path) -> None:
    broken = model("broken", no_such_setting=1)
    async with system(parent_socket, [broken, model("a")]) as (_, front):
        answer = await end_of(front.ask("r", of="broken"))
        assert isinstance(answer.verdict, actions.Reject)
        assert answer.verdict.code == RejectCode.MODEL_UNAVAILABLE
        assert (await end_of(front.ask("s", of="a"))).outcome is Outcome.LENGTH


async def test_control_dies_and_streams_go_on_and_models_are_learnt_again(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002)]) as (made, front):
        await made.until(events.ReplicaReady)
        pids = made.workers()
        streaming = front.ask("streaming", of="a", tokens=300)
        await begin_of(streaming)
        await made.control.stop()
        await made.start_control()
        await made.until(events.ReplicaReady)
        await front.meet_control()
        assert (await end_of(streaming)).outcome is Outcome.LENGTH
        assert len(streaming.token_ids) == 300
        assert (await end_of(front.ask("new", of="a"))).outcome is Outcome.LENGTH
        assert made.workers() == pids, "no worker was started for what lives"


async def test_what_was_loaded_by_hand_outlives_control(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a"), model("b")], wanted=[on_gpu("a")]) as (made, front):
        await made.until(events.ReplicaReady)
        front.send(events.LoadWanted(replica=on_gpu("b").replica, front=front.name, order="o"))
        await made.until(events.ReplicaReady)
        pids = made.workers()
        await made.control.stop()
        await made.start_control()
        await made.until(events.ReplicaReady, 2)
        await front.meet_control()
        assert (await end_of(front.ask("r", of="b"))).outcome is Outcome.LENGTH
        assert made.workers() == pids


async def test_a_cancel_reaches_a_request_that_an_earlier_control_routed(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        old = front.ask("old", of="a", tokens=1_000_000)
        await begin_of(old)
        await made.control.stop()
        await made.start_control()
        await made.until(events.ReplicaReady)
        await front.meet_control()
        front.send(stream.Cancel(request_id="old"))
        assert (await end_of(front.ask("new", of="a"))).outcome is Outcome.LENGTH


async def test_a_cancel_that_comes_before_the_agent_does_reaches_it(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        await begin_of(front.ask("old", of="a", tokens=1_000_000))
        await made.agent._control.close()
        await made.control.stop()
        await made.start_control()
        await front.meet_control()
        front.send(stream.Cancel(request_id="old"))
        await front.snapshot()
        made.agent._control.start()
        assert (await end_of(front.ask("new", of="a"))).outcome is Outcome.LENGTH


@pytest.mark.parametrize("elastic", [False, True])
async def test_the_agent_dies_and_the_next_one_goes_on_with_its_workers(parent_socket: Path, elastic: bool) -> None:
    models = [model("a", step_s=0.002, max_running=1), model("b", step_s=0.002)]
    async with system(parent_socket, models, elastic=elastic) as (made, front):
        for name in ("a", "b"):  # both are up before the clock of the stream runs
            await end_of(front.ask(f"{name} is up", of=name, tokens=1))
        streaming = front.ask("streaming", of="a", tokens=400)
        waiting = front.ask("waiting", of="a", tokens=3)
        ending = front.ask("ending", of="b", tokens=20)
        await begin_of(streaming)
        await begin_of(ending)
        await front.snapshot()
        pids = made.workers()
        await made.kill_agent()
        assert (await end_of(ending)).outcome is Outcome.LENGTH, "it ends without an agent"
        held = front.ask("held", of="b", tokens=3)
        await made.start_agent()
        assert isinstance((await end_of(waiting)).verdict, actions.Requeue), "what had not begun is brought again"
        assert (await end_of(held)).outcome is Outcome.LENGTH
        again = front.ask("again", of="a", tokens=3, tries=1)
        assert (await end_of(streaming)).outcome is Outcome.LENGTH
        assert len(streaming.token_ids) == 400
        assert (await end_of(again)).outcome is Outcome.LENGTH, "the credit came back"
        assert made.workers() == pids, "no worker was started for what lives"
        await settled(made.control._payloads, made.agent._held)
        if elastic:
            check_ledgers(made)


def check_ledgers(made: System) -> None:
    """The book holds what an agent from the start would have in it."""
    assert made.agent.memory is not None
    for ledger in made.agent.memory.ledger:
        ledger.check()
        assert not ledger.learning
        classes = ledger.view(time.monotonic()).by_class()
        assert classes[LeaseClass.WEIGHTS] == 2 and classes[LeaseClass.KV] > 0, classes


async def test_a_request_is_cancelled_under_the_next_agent(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        for index, late in enumerate((False, True)):
            await begin_of(front.ask(f"old{index}", of="a", tokens=1_000_000))
            await front.snapshot()
            await made.kill_agent()
            if not late:
                front.send(stream.Cancel(request_id=f"old{index}"))
            await made.start_agent()
            if late:
                await made.until(events.ReplicaReady)
                front.send(stream.Cancel(request_id=f"old{index}"))
            assert (await end_of(front.ask(f"new{index}", of="a"))).outcome is Outcome.LENGTH
        await settled(made.agent._held)


async def test_a_worker_that_becomes_a_model_when_its_agent_dies_is_replaced(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", load_s=0.5)]) as (made, front):
        while not made.workers():  # noqa: ASYNC110 - a fork tells nobody here
            await asyncio.sleep(0)
        (half_way,) = made.workers()
        answer = front.ask("r", of="a")
        await front.snapshot()
        await made.kill_agent()
        await made.start_agent()
        assert (await end_of(answer)).outcome is Outcome.LENGTH
        assert half_way not in made.workers()
        assert not alive(half_way)


async def test_a_worker_that_is_silent_after_its_agents_death_is_replaced(
    parent_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SPEAK_WITHIN_S", 0.3)
    async with system(parent_socket, [model("a", step_s=0.002)]) as (made, front):
        await made.until(events.ReplicaReady)
        (stuck,) = made.workers()
        os.kill(stuck, signal.SIGSTOP)
        await made.kill_agent()
        await made.start_agent()
        assert (await end_of(front.ask("r", of="a"))).outcome is Outcome.LENGTH
        assert stuck not in made.workers()


@pytest.mark.slow
async def test_a_worker_leaves_when_no_agent_comes(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a")]) as (made, _):
        await made.until(events.ReplicaReady)
        (worker,) = made.workers()
        await made.kill_agent()
        vigil_over = asyncio.Event()
        Vigil(worker, vigil_over.set)
        await asyncio.wait_for(vigil_over.wait(), ties.AGENT_AWAITED_S + 2)
        await made.start_agent()


async def test_a_dead_front_ends_request_ends_though_nobody_is_there_to_say_so(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        stand_in = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])  # noqa: ASYNC220
        dying = Front(made.run_dir, "front-1")
        await dying.start(stand_in.pid)
        await begin_of(dying.ask("running", of="a", tokens=1_000_000))
        await made.agent._control.close()
        await made.control.stop()
        await dying.stop()
        kill(stand_in.pid)
        stand_in.wait()
        await settled(made.agent._held)
        await made.start_control()
        made.agent._control.start()
        await made.until(events.ReplicaReady)
        await front.meet_control()
        assert (await end_of(front.ask("mine", of="a"))).outcome is Outcome.LENGTH


async def test_a_front_end_dies_and_its_requests_are_called_off(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        stand_in = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])  # noqa: ASYNC220
        dying = Front(made.run_dir, "front-1")
        await dying.start(stand_in.pid)
        running = dying.ask("running", of="a", tokens=1_000_000)
        dying.ask("waiting", of="a", tokens=1_000_000)
        await begin_of(running)
        mine = front.ask("mine", of="a")
        kill(stand_in.pid)
        stand_in.wait()
        assert (await end_of(mine)).outcome is Outcome.LENGTH
        await settled(made.agent._held)
        await dying.stop()


async def test_a_front_end_that_dies_under_a_younger_control_leaves_nothing_running(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        stand_in = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])  # noqa: ASYNC220
        dying = Front(made.run_dir, "front-1")
        await dying.start(stand_in.pid)
        await begin_of(dying.ask("running", of="a", tokens=50_000))
        await made.control.stop()
        await made.start_control()
        await made.until(events.ReplicaReady)
        await front.meet_control()
        await dying.meet_control(stand_in.pid)
        assert [await dying.models.get() for _ in range(2)] == ["a", "a"], "both controls have told it"
        kill(stand_in.pid)
        stand_in.wait()
        assert (await end_of(front.ask("mine", of="a"))).outcome is Outcome.LENGTH
        await settled(made.agent._held)
        await dying.stop()


async def test_a_request_told_twice_is_answered_once(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        first = front.ask("first", of="a", tokens=20)
        await begin_of(first)
        waiting = enqueue("twice", "a", front.name, [1], 3, 0)
        answer = front.answers["twice"] = Answer()
        front.send(waiting)
        front.send(waiting)
        assert (await end_of(answer)).outcome is Outcome.LENGTH
        await settled(made.control._payloads, made.agent._held)


async def test_a_request_that_a_younger_control_brings_again_is_answered_once(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002, max_running=1)]) as (made, front):
        first = front.ask("first", of="a", tokens=400)
        await begin_of(first)
        answer = front.ask("waiting", of="a", tokens=3)
        await front.snapshot()
        await made.control.stop()
        await made.start_control()
        await made.until(events.ReplicaReady)
        await front.meet_control()
        front.send(enqueue("first", "a", front.name, [1, 2, 3], 400, 0))
        front.send(enqueue("waiting", "a", front.name, [1, 2, 3], 3, 0))
        await front.snapshot()
        assert (await end_of(first)).outcome is Outcome.LENGTH
        assert (await end_of(answer)).token_ids == [token_after("a", [1, 2, 3], made, 256) for made in range(3)]
        await settled(made.agent._held)


async def test_what_a_dead_front_end_has_waiting_is_forgotten(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", load_s=0.5)]) as (made, front):
        stand_in = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])  # noqa: ASYNC220
        dying = Front(made.run_dir, "front-1")
        await dying.start(stand_in.pid)
        dying.ask("r", of="a")
        assert (await dying.snapshot()).waiting == {"a": 1}
        kill(stand_in.pid)
        stand_in.wait()
        await settled(made.control._payloads)
        assert (await front.snapshot()).waiting == {}
        await dying.stop()


async def test_a_worker_whose_model_has_left_becomes_the_next_one(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a")]) as (made, front):
        (ready,) = await made.until(events.ReplicaReady)
        assert isinstance(ready, events.ReplicaReady)
        pids = made.workers()
        made.agent._control_says(actions.Deactivate(replica=ready.replica, epoch=ready.epoch, reason="a test wants it"))
        await made.until(events.ReplicaStopped)
        (again,) = await made.until(events.ReplicaReady)
        assert isinstance(again, events.ReplicaReady)
        assert again.epoch > ready.epoch
        assert made.workers() == pids
        assert (await end_of(front.ask("r", of="a"))).outcome is Outcome.LENGTH


async def test_control_hears_of_a_lost_request_before_it_hears_of_the_lost_worker(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002)]) as (made, front):
        heard: list[str] = []
        decide = made.control.scheduler.on

        def listen(event: ControlInput, now: float) -> list[actions.Action]:
            heard.append(type(event).__name__)
            return decide(event, now)

        made.control.scheduler.on = listen  # type: ignore[method-assign]
        broken = front.ask("r", of="a", tokens=10_000)
        await begin_of(broken)
        kill(made.workers()[0])
        await end_of(broken)
        await made.until(events.WorkerLost)
        assert heard.index("Requeue") < heard.index("WorkerLost")


@pytest.mark.parametrize("socket", ["control.sock", "agent-local.sock"])
async def test_a_stranger_is_sent_away_and_disturbs_nobody(parent_socket: Path, socket: str) -> None:
    async with system(parent_socket, [model("a")]) as (made, front):
        for greeting in (stream.Hello(role="worker", name="impostor", pid=1), stream.Stop(), None):
            stranger = await connect(made.run_dir / socket)
            if greeting is not None:
                stranger.send(greeting)
            else:
                assert stranger._transport is not None
                stranger._transport.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.wait_for(stranger.wait_closed(), PATIENCE_S)
        assert (await end_of(front.ask("r", of="a"))).outcome is Outcome.LENGTH


async def test_an_agent_that_stops_lets_its_requests_end(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002)]) as (made, front):
        answer = front.ask("r", of="a", tokens=100)
        await begin_of(answer)
        await made.agent.stop(drain_s=5.0)
        assert (await end_of(answer)).outcome is Outcome.LENGTH
        assert len(answer.token_ids) == 100
        await made.start_agent()
        await made.until(events.ReplicaReady, 2)


async def test_a_front_end_whose_connection_breaks_keeps_its_streams(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002)]) as (_, front):
        streaming = front.ask("streaming", of="a", tokens=200)
        await begin_of(streaming)
        assert front._control is not None
        front._control.abort()
        await front.meet_control(os.getpid())
        assert (await end_of(streaming)).outcome is Outcome.LENGTH
        assert (await end_of(front.ask("next", of="a"))).outcome is Outcome.LENGTH


async def test_the_snapshot_shows_what_runs(parent_socket: Path) -> None:
    async with system(parent_socket, [model("a", step_s=0.002)], gpu_count=2) as (made, front):
        await made.until(events.ReplicaReady)
        answers = [front.ask(f"r{i}", of="a", tokens=10_000) for i in range(3)]
        for answer in answers:
            await begin_of(answer)
        while (view := (await front.snapshot()).replicas[0]).kv_used_tokens == 0:
            pass  # a worker tells its counters a few times a second
        assert view.state is ReplicaState.SERVING
        assert (view.running, view.queued) == (3, 0)
        assert len((await front.snapshot()).gpus) == 2

"""Replicas over several GPUs: their workers come up together, answer as one, and go as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chimera.core.ledger_view import LedgerView
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import ReplicaId
from chimera.engine.simulated import token_after
from chimera.msg import actions, events
from chimera.msg.events import Outcome
from chimera.units import MIB

from tests.agent.rig import System, alive, kill, model, on_gpu, parent, system
from tests.agent.test_loops import begin_of, end_of

PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def parent_socket() -> Iterator[Path]:
    with parent() as socket:
        yield socket


def over_two(name: str, **costs: Any) -> ModelSpec:
    return msgspec.structs.replace(model(name, kv_bytes_per_token=MIB, **costs), tp_size=2)


def on_both(name: str) -> Seat:
    return Seat(replica=ReplicaId(name), gpu_ids=(0, 1))


def pids_of(made: System, name: str) -> list[int]:
    """By rank."""
    (gang,) = {w.gang for w in made.agent._pool if w.gang is not None and w.gang.replica.model == name}
    return [worker.vigil.pid for worker in gang.members if worker.vigil is not None]


def pages_of(view: LedgerView, gpu_id: int) -> int:
    return sum(view.gpus[gpu_id].by_class().values())


def ledgers(made: System) -> LedgerView:
    assert made.agent.memory is not None
    return made.agent.memory.view(time.monotonic())


async def until_empty(made: System) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while any(pages_of(ledgers(made), gpu_id) for gpu_id in (0, 1)):  # noqa: ASYNC110 - a ledger tells nobody here
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("elastic", [False, True])
async def test_a_gang_answers_as_one(parent_socket: Path, elastic: bool) -> None:
    async with system(parent_socket, [over_two("g")], [on_both("g")], gpu_count=2, elastic=elastic) as (made, front):
        answer = await end_of(front.ask("r", of="g", prompt=[7, 8], tokens=5))
        assert answer.token_ids == [token_after("g", [7, 8], made, 256) for made in range(5)]
        assert len(pids_of(made, "g")) == 2
        assert (await front.snapshot()).replicas[0].gpu_ids == (0, 1)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_gang_that_loses_a_rank_is_torn_down_whole_and_comes_back(parent_socket: Path, rank: int) -> None:
    models = [over_two("g", step_s=0.005), model("a", step_s=0.005)]
    async with system(parent_socket, models, [on_both("g"), on_gpu("a", 1)], gpu_count=2, elastic=True) as (made, front):
        await made.until(events.ReplicaReady, 2)
        broken = front.ask("broken", of="g", tokens=1500)
        other = front.ask("other", of="a", tokens=100)
        await begin_of(broken)
        before = pids_of(made, "g")
        killed_s = time.monotonic()
        kill(before[rank])
        await end_of(broken)
        assert isinstance(broken.verdict, actions.Requeue) and broken.verdict.lost
        assert not any(alive(pid) for pid in before), "what is told to be lost is gone, every rank of it"
        await made.until(events.ReplicaReady)
        assert time.monotonic() - killed_s < PATIENCE_S
        assert set(pids_of(made, "g")).isdisjoint(before)
        assert (await end_of(front.ask("again", of="g"))).outcome is Outcome.LENGTH
        assert (await end_of(other)).outcome is Outcome.LENGTH, "a neighbour of one rank is untouched"


async def test_a_gang_that_leaves_gives_back_all_its_gpus_and_its_workers_become_others(parent_socket: Path) -> None:
    models = [over_two("g"), over_two("h")]
    async with system(parent_socket, models, [on_both("g")], gpu_count=2, elastic=True) as (made, front):
        await made.until(events.ReplicaReady)
        before = pids_of(made, "g")
        front.send(events.UnloadWanted(order="1", front=front.name, model="g"))
        await made.until(events.ReplicaStopped)
        await until_empty(made)
        assert all(alive(pid) for pid in before)
        front.send(events.LoadWanted(order="2", front=front.name, replica=ReplicaId("h"), gpu_ids=(0, 1)))
        await made.until(events.ReplicaReady)
        assert set(pids_of(made, "h")) == set(before)
        assert (await end_of(front.ask("r", of="h"))).outcome is Outcome.LENGTH


async def test_a_gang_that_cannot_serve_is_given_up_once_and_leaves_nothing(parent_socket: Path) -> None:
    async with system(parent_socket, [over_two("g", no_such_setting=1)], [on_both("g")], 2, elastic=True) as (made, front):
        answer = await end_of(front.ask("r", of="g"))
        assert isinstance(answer.verdict, actions.Reject) and "no_such_setting" in answer.verdict.reason
        await until_empty(made)
        assert not any(worker.gang for worker in made.agent._pool)


async def test_a_gang_dies_with_its_agent_and_the_next_agent_brings_it_up_again(parent_socket: Path) -> None:
    async with system(parent_socket, [over_two("g", step_s=0.002)], [on_both("g")], 2, elastic=True) as (made, front):
        answer = front.ask("r", of="g", tokens=1500)
        await begin_of(answer)
        before = pids_of(made, "g")
        await made.kill_agent()
        await made.start_agent()
        await made.until(events.ReplicaReady, 2)
        assert not any(alive(pid) for pid in before)
        assert (await end_of(front.ask("again", of="g"))).outcome is Outcome.LENGTH


async def test_nothing_of_a_gang_is_left_in_the_run_directory(parent_socket: Path) -> None:
    async with system(parent_socket, [over_two("g")], [on_both("g")], gpu_count=2) as (made, _):
        await made.until(events.ReplicaReady)
        (gang,) = {worker.gang for worker in made.agent._pool}
        assert gang is not None
        gang._meeting.touch()  # as engines do that meet there
        await made.agent.stop(drain_s=1.0)
        assert not gang._meeting.exists()

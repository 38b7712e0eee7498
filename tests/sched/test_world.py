"""Both schedulers together, under every mishap that a system of processes knows: each request ends exactly once."""

from __future__ import annotations

import pytest
from chimera.core.model import Slo
from chimera.core.replica import ReplicaId
from chimera.core.snapshot import LOCAL_NAMES
from chimera.msg.events import GpuSampled, ModelRegistered, ModelRemoved, Outcome, PolicyChosen, StepsTimed
from chimera.sched import cells
from chimera.sched.log import replay
from chimera.sched.policies import POLICIES
from chimera.units import GIB
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.sched.builders import costs, placement, seat
from tests.sched.world import CREDITS, AgentSide, Worker, World

MODELS = ("a", "b", "c", "unplaced")
PROMISES = (
    Slo(),
    Slo(ttft_s=0.2),
    Slo(ttft_s=1.0, tpot_s=0.1),
    Slo(ttft_s=1.0, reject_late=True),
    Slo(ttft_s=20.0, reject_late=True),
)


def small_world() -> World:
    """`a` twice on one node, `b` once on each, `c` over two GPUs; `unplaced` has no seat."""
    wanted = placement(seat("a", 0), seat("a", 1, index=1), seat("b", 1), seat("b", 2, index=1), seat("c", 0, 1))
    return World(wanted, {"north": (0, 1), "south": (2,)}, MODELS)


def shared_world() -> World:
    """The same under a policy that moves models about: two of the four fit on a GPU at a time, beside their caches."""
    wanted = placement(seat("a", 0), seat("b", 1), seat("c", 0, 1))
    gpus = {"north": (0, 1), "south": (2,)}
    return World(wanted, gpus, MODELS, policy="flexible", local="goodput", costs=costs(running=CREDITS), pages=1400)


class Mishaps(RuleBasedStateMachine):
    begin = staticmethod(small_world)

    def __init__(self) -> None:
        super().__init__()
        self.world = self.begin()
        self.world.settle()  # Mishaps happen to a system that works.

    def worker(self, data: st.DataObject, *, loaded: bool) -> tuple[AgentSide, Worker]:
        return data.draw(st.sampled_from(self.workers(loaded=loaded)))

    def workers(self, *, loaded: bool) -> list[tuple[AgentSide, Worker]]:
        found = [(agent, worker) for agent in self.world.agents.values() for worker in agent.workers.values()]
        return [(agent, worker) for agent, worker in found if worker.loaded is loaded]

    # Clients.

    @rule(
        name=st.sampled_from([*MODELS, "a", "b", "c", "unknown"]),
        count=st.integers(1, 9),
        slo=st.sampled_from(PROMISES),
        heard=st.booleans(),
    )
    def clients_send(self, name: str, count: int, slo: Slo, heard: bool) -> None:
        for _ in range(count):
            self.world.front.send(name, slo)
        if heard:
            self.everything_arrives()

    @precondition(lambda self: self.world.front.open)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        self.world.front.leave(data.draw(st.sampled_from(sorted(self.world.front.open))))

    # Messages.

    @precondition(lambda self: self.world.front.up)
    @rule(again=st.booleans())
    def the_front_end_is_heard(self, again: bool) -> None:
        up = self.world.front.up
        self.world.tell_control(up[0] if again else up.popleft())

    @precondition(lambda self: self.world.links())
    @rule(data=st.data(), again=st.booleans(), many=st.integers(1, 5))
    def messages_arrive(self, data: st.DataObject, again: bool, many: int) -> None:
        agent, direction = data.draw(st.sampled_from(self.world.links()))
        for _ in range(min(many, len(getattr(agent, direction)))):
            self.world.deliver(agent, direction, again=again)

    @rule()
    def everything_arrives(self) -> None:
        while self.world.front.up:
            self.world.tell_control(self.world.front.up.popleft())
        while self.world.links():
            self.world.deliver(*self.world.links()[0])

    @precondition(lambda self: self.world.ghosts)
    @rule(data=st.data())
    def news_of_a_process_long_gone_arrives(self, data: st.DataObject) -> None:
        self.world.tell_control(data.draw(st.sampled_from(self.world.ghosts)))

    @precondition(lambda self: any(agent.told for agent in self.world.agents.values()))
    @rule(data=st.data(), count=st.integers(1, 5))
    def a_worker_is_heard_once_more_much_later(self, data: st.DataObject, count: int) -> None:
        agent = data.draw(st.sampled_from([agent for agent in self.world.agents.values() if agent.told]))
        for _ in range(count):
            agent.report(data.draw(st.sampled_from(agent.told)))

    @rule(seconds=st.sampled_from([0.1, 1.0, 11.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # Workers.

    @precondition(lambda self: self.workers(loaded=False))
    @rule(data=st.data(), how=st.sampled_from(["loads", "loads", "loads", "fails", "never", "dies"]))
    def an_activation_comes_to_something(self, data: st.DataObject, how: str) -> None:
        agent, worker = self.worker(data, loaded=False)
        match how:
            case "loads":
                agent.load(worker)
            case "dies":
                agent.kill(worker)
            case _:
                agent.fail(worker, permanent=how == "never")

    @precondition(lambda self: self.workers(loaded=True))
    @rule(data=st.data(), count=st.integers(1, 4), permanent=st.booleans())
    def a_worker_dies_and_its_model_will_not_load(self, data: st.DataObject, count: int, permanent: bool) -> None:
        agent, worker = self.worker(data, loaded=True)
        agent.kill(worker)
        for _ in range(count):
            self.everything_arrives()
            again = agent.workers.get(worker.replica)
            if again is not None:
                agent.fail(again, permanent=permanent)

    @precondition(lambda self: any(worker.running for _, worker in self.workers(loaded=True)))
    @rule(data=st.data())
    def a_request_ends(self, data: st.DataObject) -> None:
        busy = [(agent, worker) for agent, worker in self.workers(loaded=True) if worker.running]
        agent, worker = data.draw(st.sampled_from(busy))
        outcome = data.draw(st.sampled_from([Outcome.STOP, Outcome.LENGTH, Outcome.REQUEUED]))
        agent.end(worker, data.draw(st.sampled_from(worker.running)), outcome)

    @precondition(lambda self: self.workers(loaded=True))
    @rule(data=st.data(), killed=st.booleans())
    def a_worker_goes(self, data: st.DataObject, killed: bool) -> None:
        agent, worker = self.worker(data, loaded=True)
        if killed:
            agent.kill(worker)
        elif worker.leaving:
            agent.leave(worker)

    # Processes and links.

    @precondition(lambda self: not all(agent.connected for agent in self.world.agents.values()))
    @rule(data=st.data())
    def an_agent_connects(self, data: st.DataObject) -> None:
        away = [agent for agent in self.world.agents.values() if not agent.connected]
        data.draw(st.sampled_from(away)).connect()

    @rule(data=st.data(), what=st.sampled_from(["link breaks", "agent dies", "agent dies alone", "control dies"]))
    def something_breaks(self, data: st.DataObject, what: str) -> None:
        agent = data.draw(st.sampled_from(list(self.world.agents.values())))
        match what:
            case "control dies":
                self.world.restart_control()
            case "agent dies":
                self.world.restart_agent(agent, outlived=False)
            case "agent dies alone":
                self.world.restart_agent(agent, outlived=True)
            case _ if agent.connected:
                self.world.cut(agent)

    @rule(name=st.sampled_from(["a", "c"]), there=st.booleans())
    def a_model_is_removed_or_comes_back(self, name: str, there: bool) -> None:
        self.world.tell_control(ModelRegistered(model=self.world.models[name]) if there else ModelRemoved(model=name))

    @rule(data=st.data())
    def a_gpu_fails(self, data: st.DataObject) -> None:
        agents = [agent for agent in self.world.agents.values() if len(agent.lost_gpus) < len(agent.gpu_ids)]
        if agents:
            agent = data.draw(st.sampled_from(agents))
            agent.lose_gpu(data.draw(st.sampled_from([g for g in agent.gpu_ids if g not in agent.lost_gpus])))

    @rule(gpu_id=st.integers(0, 2), gigabytes=st.integers(0, 3))
    def strangers_take_memory(self, gpu_id: int, gigabytes: int) -> None:
        agent = next(agent for agent in self.world.agents.values() if gpu_id in agent.gpu_ids)
        agent.heard.append(GpuSampled(gpu_id=gpu_id, strangers_bytes=gigabytes * GIB))

    @precondition(lambda self: self.workers(loaded=True))
    @rule(data=st.data(), seconds=st.floats(1e-6, 1e4))
    def an_engine_tells_its_times(self, data: st.DataObject, seconds: float) -> None:
        agent, worker = self.worker(data, loaded=True)
        seen = StepsTimed(
            replica=worker.replica,
            epoch=worker.epoch,
            decode_steps=10,
            decode_s=seconds,
            decode_tokens=10,
            prompts=1,
            prompt_tokens=8,
            prompt_s=seconds,
        )
        agent.heard.append(seen)

    @rule(local=st.sampled_from(LOCAL_NAMES))
    def the_operator_chooses_an_order(self, local: str) -> None:
        self.world.tell_control(PolicyChosen(local=local))

    @precondition(lambda self: self.world.costs is not None)
    @rule(name=st.sampled_from(sorted(POLICIES)))
    def the_operator_chooses_a_policy(self, name: str) -> None:
        self.world.tell_control(PolicyChosen(policy=name))

    def teardown(self) -> None:
        world = self.world
        world.settle()
        assert set(world.front.ends) == {f"r{n}" for n in range(1, world.front.sent + 1)}
        assert set(world.front.ends.values()) <= {1}, "a request ended twice"
        assert world.control.requests_of("front-0") == [], "control remembers a request that has ended"
        for log in (world.log, *(agent.log for agent in world.agents.values())):
            assert replay(log).differences == (), "a log does not lead to the same actions again"


class MishapsWhileModelsMove(Mishaps):
    begin = staticmethod(shared_world)


def run(examples: int, steps: int, machine: type[Mishaps] = Mishaps) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_every_request_ends_exactly_once_whatever_happens() -> None:
    run(examples=30, steps=30)


def test_every_request_ends_exactly_once_while_policies_move_models() -> None:
    run(examples=20, steps=30, machine=MishapsWhileModelsMove)


def test_every_request_ends_exactly_once_while_models_move_between_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two agents is a cell."""
    monkeypatch.setattr(cells, "TOGETHER", 1)
    monkeypatch.setattr(cells, "CELL_GPUS", 2)
    run(examples=20, steps=30, machine=MishapsWhileModelsMove)


@pytest.mark.slow
def test_every_request_ends_exactly_once_while_policies_move_models_for_long() -> None:
    run(examples=800, steps=80, machine=MishapsWhileModelsMove)


@pytest.mark.slow
def test_every_request_ends_exactly_once_whatever_happens_for_long() -> None:
    run(examples=1500, steps=80)


def test_a_quiet_world_serves_everyone() -> None:
    world = small_world()
    world.settle()
    for n in range(20):
        world.front.send("abc"[n % 3])
        world.settle()
    assert world.front.ends == {f"r{n}": 1 for n in range(1, 21)}
    assert not world.ghosts
    serving = {tenant.replica for agent in world.agents.values() for tenant in agent.node.tenants()}
    assert serving == {ReplicaId("a"), ReplicaId("a", 1), ReplicaId("b"), ReplicaId("b", 1), ReplicaId("c")}

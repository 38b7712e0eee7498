"""One engine on paper, and whoever hears from it in the middle of its work."""

from __future__ import annotations

import pytest
from chimera.core.model import Slo
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.sim.clock import Clock
from chimera.sim.engine import Sequence, SimEngine
from chimera.sim.gpu import SimGpu
from chimera.sim.placing import gpus_of
from chimera.units import GIB

from tests.sched.builders import costs, model

COSTS = costs(running=8, activation_s=0.0, gpu_bytes=4 * GIB)


class Meddler:
    """Takes a sequence out of the engine, by whichever way, at the very moment at which another one ends."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.victim: str | None = None
        self.ended: list[str] = []
        self.left: list[str] = []

    def engine_ready(self, engine: SimEngine) -> None: ...

    def engine_empty(self, engine: SimEngine) -> None: ...

    def first_token(self, request: Request) -> None: ...

    def sequence_ended(self, engine: SimEngine, sequence: Sequence) -> None:
        self.ended.append(sequence.request.request_id)
        victim, self.victim = self.victim, None
        if victim is not None:
            engine.submit(request("late", 5))
            getattr(engine, self.way)(victim)

    def sequence_left(self, engine: SimEngine, sequence: Sequence, *, aborted: bool, preempted: bool = False) -> None:
        self.left.append(sequence.request.request_id)


def request(name: str, tokens: int) -> Request:
    return Request(request_id=name, model="a", front="f", prompt_tokens=20, max_tokens=tokens, arrived_s=0.0, slo=Slo())


@pytest.mark.parametrize("way", ["give_back", "abort"])
@pytest.mark.parametrize("first_tokens", [1, 10])
def test_a_sequence_taken_out_while_another_ends_takes_none_with_it(way: str, first_tokens: int) -> None:
    meddler, clock = Meddler(way), Clock()
    gpu = SimGpu(gpus_of(1, COSTS.gpu_bytes)[0], COSTS)
    engine = SimEngine(
        model=model("a"),
        seat=Seat(replica=ReplicaId("a"), gpu_ids=(0,)),
        epoch=Epoch(1, 1),
        gpus=[gpu],
        node_gpus=[gpu],
        costs=COSTS,
        clock=clock,
        listener=meddler,
    )
    engine.come_up()
    while not engine.serving:
        assert clock.step()
    for name, tokens in (("first", first_tokens), ("taken", 30), ("last", 30)):
        engine.submit(request(name, tokens))
    meddler.victim = "taken"
    while clock.step():
        pass
    assert meddler.ended == ["first", "late", "last"]
    assert meddler.left == ["taken"]
    assert gpu.kv_bytes == 0
    made = first_tokens + 5 + 30
    assert made <= engine.tokens_made <= made + first_tokens, "a step counts once"

"""What a life does by itself, without sockets: its messages are put before it, its engine only has to be there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.engine.api import Stats, Withdrawal
from chimera.msg import actions, events, stream
from chimera.worker.life import Life

from tests.worker.stage import model, payload

REPLICA, EPOCH = ReplicaId("m"), Epoch(1, 1)


class WouldWait(Exception):
    """Nothing more is there to be heard."""


class Ties:
    worker = "w"

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    def receive(self, patience_s: float | None) -> list[Any]:
        if not self.batches:
            raise WouldWait
        return self.batches.pop(0)

    def tell_agent(self, message: Any) -> None:
        """Nobody listens."""


def test_a_pause_ends_when_another_agent_takes_over() -> None:
    ties, engine = Ties(), SimpleNamespace(stats=Stats, holding=lambda: None)
    life = Life(REPLICA, EPOCH, cast(Any, engine), cast(Any, ties), cast(Any, None))
    submit = stream.Submit(request_id="r", epoch=EPOCH, front="f", payload=payload([1], 2))
    ties.batches = [[submit]]
    assert len(life.collect(0.0)) == 1
    pause = actions.Pause(replica=REPLICA, epoch=EPOCH, reason="a test")
    ties.batches = [[pause, actions.Abort(request_id="r", replica=REPLICA, reason="a test")]]
    with pytest.raises(WouldWait):
        life.collect(0.0)
    activation = actions.Activate(model=model("m"), seat=Seat(replica=REPLICA, gpu_ids=(0,)), epoch=EPOCH, reason="a test")
    ready = events.ReplicaReady(replica=REPLICA, epoch=EPOCH, credits=1, kv_tokens=1, context_length=1, load_s=0.0)
    life.standing(activation, ready)
    ties.batches = [[]]
    assert life.collect(0.0) == [Withdrawal("r")]

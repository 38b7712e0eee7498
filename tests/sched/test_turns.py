"""Turns under `goodput`: how many engines are at work at once, and for whom the others wait."""

from __future__ import annotations

import pytest
from chimera.core.model import Slo
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Activate, Admit
from chimera.sched.gpu import GpuScheduler, Mint
from chimera.sched.queues import deadline_s
from msgspec.structs import replace

from tests.sched.builders import activate, costs, finished, ready, request, routed

STEADY = Slo(ttft_s=5.0, tpot_s=0.025)
"""A step of 10 ms bears one neighbour that takes its turn, and not two."""


class Gpu:
    def __init__(self, slos: dict[str, Slo | None]) -> None:
        self.scheduler = GpuScheduler(0, Mint(1), "goodput", costs(running=8))
        self.slos = slos
        self.epochs = {name: Epoch(1, number) for number, name in enumerate(slos, start=1)}
        for name, slo in slos.items():
            order = activate(name)
            if slo is not None:
                order = replace(order, model=replace(order.model, slo=slo))
            assert any(isinstance(action, Activate) for action in self.scheduler.on(order, 0.0))
            self.scheduler.on(replace(ready(name, self.epochs[name], credits=8), kv_tokens=10**6), 0.0)

    def ask(self, request_id: str, name: str, now: float = 0.0) -> list[str]:
        return self._admitted(routed(request_id, ReplicaId(name), at=now, slo=self.slos[name] or Slo()), now)

    def end(self, request_id: str, name: str, now: float, output_tokens: int = 100) -> list[str]:
        told = replace(finished(request_id, name, self.epochs[name]), output_tokens=output_tokens)
        return self._admitted(told, now)

    def _admitted(self, event: object, now: float) -> list[str]:
        actions = self.scheduler.on(event, now)  # type: ignore[arg-type]
        self.scheduler.check()
        return [action.request_id for action in actions if isinstance(action, Admit)]


def test_no_more_engines_are_at_work_than_the_promises_bear() -> None:
    gpu = Gpu(dict.fromkeys("abc", STEADY))
    assert gpu.ask("1", "a") == ["1"]
    assert gpu.ask("2", "b") == ["2"]
    assert gpu.ask("3", "c") == [], "a step of a third engine in turn makes 30 ms of 25"
    assert gpu.ask("4", "a", now=0.5) == ["4"], "whose engine is at work makes it no more crowded"
    assert gpu.end("2", "b", now=1.0) == ["3"]


def test_who_waits_for_a_turn_is_given_it_though_it_is_late_by_then() -> None:
    gpu = Gpu(dict.fromkeys("abc", STEADY))
    for number, name in enumerate("abc", start=1):
        gpu.ask(str(number), name)
    late_s = deadline_s(request("3", "c", slo=STEADY)) + 1.0
    assert gpu.end("1", "a", now=late_s) == ["3"]


@pytest.mark.parametrize("slo", [None, Slo(ttft_s=5.0)], ids=["nothing", "a first token alone"])
def test_nobody_waits_for_those_to_whom_no_pace_is_promised(slo: Slo | None) -> None:
    gpu = Gpu({"a": slo, "b": slo, "c": STEADY})
    assert [gpu.ask(name, name) for name in "abc"] == [["a"], ["b"], ["c"]]


def test_neighbours_that_are_soon_done_take_little_from_a_long_answer() -> None:
    gpu = Gpu({"a": STEADY, "b": Slo(ttft_s=5.0), "c": STEADY})
    for name, tokens in (("a", 1000), ("b", 10), ("c", 10)):  # what their answers are like
        assert gpu.ask(f"first of {name}", name) == [f"first of {name}"]
        gpu.end(f"first of {name}", name, now=0.0, output_tokens=tokens)
    assert [gpu.ask(name, name, now=1.0) for name in "abc"] == [["a"], ["b"], ["c"]], "each for a hundredth of its life"

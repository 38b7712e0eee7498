"""The systems of the literature as this simulator can run them: which policy, which placement, which order of requests.

Two of them are no policy that an operator is offered. *MuxServe++-like*: models stand where the rates of the whole trace want
them, which no operator knows beforehand, each with a quota of the memory there by what it is asked for, and never move.
*QLM-like*: requests wait in groups of one model; a GPU holds one model, works its group off, and takes the group that is
pressed most; a group gives way when another would be late. Each stands for an idea, not for its system's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.sched.cost import CostTable
from chimera.sched.policies import POLICIES
from chimera.sched.policies.board import Board
from chimera.sched.policies.kvpr import Kvpr
from chimera.sched.policies.policy import Decision, Question
from chimera.sim.placing import gpus_of
from chimera.sim.run import Scenario
from chimera.sizing.layout import lay_out, work_of
from chimera.sizing.search import TOGETHER
from chimera.trace.trace import Trace

NO_PROMISE_S = 10.0
SWAPS = 5.0
"""A group runs at least so many times as long as bringing the next model up."""


class Qlm(msgspec.Struct, frozen=True):
    name: str = "qlm-like"
    on_demand: bool = True

    def decide(self, question: Question) -> Decision:
        board = Board(question)
        for model in sorted(board.seatless(), key=lambda m: (-self._pressure(board, m), m.name)):
            gang = self._place(board, model)
            if gang is None:
                continue
            for seat in {seat.replica: seat for gpu_id in gang for seat in board.on_gpu(gpu_id)}.values():
                board.remove(seat, f"its group has had its time; {model.name} is pressed more")
            if board.fits(model, gang):
                board.add(model, gang, f"its group is at the head of GPUs {list(gang)}")
        board.keep_house()
        return board.decision()

    def _pressure(self, board: Board, model: ModelSpec) -> float:
        return board.demand(model.name).waiting / (model.slo.ttft_s or NO_PROMISE_S)

    def _place(self, board: Board, model: ModelSpec) -> tuple[int, ...] | None:
        """Of the GPUs whose groups have ended, or must give way, the one with the least left to do."""
        least_s = max(model.slo.ttft_s or NO_PROMISE_S, SWAPS * board.costs.of(model).activation_s)
        best: tuple[float, tuple[int, ...]] | None = None
        for gang in board.gangs(model):
            seats = {seat.replica: seat for gpu_id in gang for seat in board.on_gpu(gpu_id)}.values()
            left = [board.demand(seat.replica.model) for seat in seats]
            done = all(d.open == 0 and d.waiting == 0 for d in left)
            over = done or all(board.since_s(seat.replica) >= least_s for seat in seats)
            if over and all(board.serves(seat) for seat in seats):
                work = float(sum(d.open for d in left))
                if best is None or work < best[0]:
                    best = work, gang
        return None if best is None else best[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    name: str
    theirs: str
    """What it stands for."""
    policy: str
    local: str
    start: Literal["even", "planned", "empty"] = "even"
    """Where models are at first: each once; where the whole trace wants them; nowhere."""


RIVALS = {
    rival.name: rival
    for rival in (
        Rival(name="s-partition", theirs="S-Partition", policy="static", local="fcfs"),
        Rival(name="muxserve-like", theirs="MuxServe++", policy="static", local="fcfs", start="planned"),
        Rival(name="serverless-like", theirs="ServerlessLLM", policy="time-sharing", local="fcfs", start="empty"),
        Rival(name="qlm-like", theirs="QLM", policy="qlm-like", local="slack", start="empty"),
        Rival(name="simple-global", theirs="Prism as released", policy="simple-global", local="slack"),
        Rival(name="kvpr", theirs="Prism", policy="kvpr-tuned", local="moore-hodgson"),
        Rival(name="flexible", theirs="ours", policy="flexible", local="goodput"),
    )
}
BASELINES = ("s-partition", "muxserve-like", "serverless-like", "qlm-like")
"""Those that Prism is compared with."""

TUNED = Kvpr(after=True, threshold=0.8)
"""The paper gives no τ. Of 0.1, 0.3, 0.5 and 0.8 in both readings of the argmin, this kept the most first tokens in time on six
loads of the first 300 s of both traces, from which the experiments are too; with 0.1, which `kvpr` has, models move so often
that it is behind static partitions."""


@contextmanager
def known() -> Iterator[None]:
    """For as long as it lasts, a scenario may name the policies that are here only."""
    POLICIES.update({"qlm-like": Qlm(), "kvpr-tuned": TUNED})
    try:
        yield
    finally:
        del POLICIES["qlm-like"], POLICIES["kvpr-tuned"]


def scenario(rival: Rival, models: tuple[ModelSpec, ...], trace: Trace, gpus: int, costs: CostTable) -> Scenario:
    """`trace` is what will be replayed, at its rate."""
    cluster = gpus_of(gpus, costs.gpu_bytes)
    filed: Placement | None = None
    if rival.start == "empty":
        filed = Placement()
    elif rival.start == "planned":
        work = work_of(models, trace, costs, TOGETHER)
        planned = lay_out(models, work, trace.span_s, cluster, costs, reserved=False, most_replicas=1)
        filed = _with_quotas(planned, models, trace, costs)
    return Scenario(models=models, gpus=cluster, costs=costs, policy=rival.policy, local=rival.local, filed=filed)


def _with_quotas(placement: Placement, models: tuple[ModelSpec, ...], trace: Trace, costs: CostTable) -> Placement:
    """What weights leave of a GPU, divided by the cache that each model's requests ask for in all; its longest has room."""
    specs = {model.name: model for model in models}
    asked, longest = dict.fromkeys(specs, 1), dict.fromkeys(specs, costs.stripe_bytes)
    for row in trace.rows:
        nbytes = specs[row.model].kv_bytes(row.prompt_tokens + row.output_tokens)
        asked[row.model] += nbytes
        longest[row.model] = max(longest[row.model], nbytes)

    def quota(model: str, gpu_id: int) -> int:
        there = [seat.replica.model for seat in placement.on_gpu(gpu_id)]
        free = costs.gpu_bytes - sum(costs.resident_bytes(specs[name]) for name in there)
        spare = max(0, free - sum(longest[name] for name in there))
        return longest[model] + spare * asked[model] // sum(asked[name] for name in there)

    return Placement(
        tuple(
            msgspec.structs.replace(seat, kv_limit_bytes=min(quota(seat.replica.model, gpu_id) for gpu_id in seat.gpu_ids))
            for seat in placement.seats
        )
    )

"""8. What two engines that decode at once do to each other, time-sliced by the driver; and with one of them paused.

Decides the interference term of the cost model, whether `Pause` must stop a neighbour's steps for a turn to be worth something
(time-sharing) or both may run on (space-sharing), and how much a neighbour's prefill delays a decode step.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmark.gpu import stock_engine
from benchmark.gpu.answer import Answer
from benchmark.gpu.device import Work, device
from benchmark.gpu.partner import Partner, PartnerLost, orders, reply
from benchmark.report import percentile

SECONDS = 3.0
HEAD_START_S = 0.2
"""So that both have read their order before the first begins."""


def answer(answer: Answer, *, rehearse: bool) -> None:
    synthetic(answer, rehearse=rehearse)
    if rehearse:
        answer.fact("two SGLang engines", "question 1 rehearses one")
        return
    try:
        sglang(answer)
    except PartnerLost as lost:
        answer.fact("two SGLang engines", lost)


def synthetic(answer: Answer, *, rehearse: bool) -> None:
    """Two processes that run the matrix products of an 8B's steps and nothing else: the device's share of the matter."""
    with tempfile.TemporaryDirectory() as name:
        mode, folder = "rehearse" if rehearse else "measure", Path(name)
        with Partner(__name__, mode, log=folder / "a") as first:
            first.told(60)
            seconds = 0.2 if rehearse else SECONDS
            alone = together(answer, "alone on the device", seconds, (first, "decode"))
            with Partner(__name__, mode, log=folder / "b") as second:
                second.told(60)
                for label, (mine, neighbours) in {
                    "decode, neighbour paused": ("decode", None),
                    "decode, neighbour decodes": ("decode", "decode"),
                    "decode, neighbour prefills": ("decode", "prefill"),
                    "prefill, neighbour paused": ("prefill", None),
                    "prefill, neighbour prefills": ("prefill", "prefill"),
                }.items():
                    pair = [(first, mine)] if neighbours is None else [(first, mine), (second, neighbours)]
                    step_s = together(answer, label, seconds, *pair)
                    if mine == "decode":
                        answer.figure(f"{label}: step against alone", step_s / alone, "×")


def together(answer: Answer, label: str, seconds: float, *pair: tuple[Partner, str]) -> float:
    """All of them at work over the same span; the mean step of the first."""
    begin = time.monotonic() + HEAD_START_S
    for process, work in pair:
        process.tell(work=work, begin=begin, seconds=seconds)
    told = [process.told(seconds + 30) for process, _ in pair]
    for who, steps in zip(("first", "second"), told, strict=False):
        answer.figure(f"{label}, {who}: step", steps["mean_s"] * 1e3, "ms", (steps["p10_s"] * 1e3, steps["p99_s"] * 1e3))
        answer.figure(f"{label}, {who}: steps", steps["steps"] / seconds, "1/s")
    return float(told[0]["mean_s"])


def sglang(answer: Answer) -> None:
    """The same between two stock engines, seen from outside: how long a batch takes."""
    with stock_engine.temporary_folder() as name:
        folder = Path(name)
        with (
            stock_engine.start(folder / "a", rehearse=False) as first,
            stock_engine.start(folder / "b", rehearse=False) as second,
        ):
            first.told(120)
            second.told(120)
            decode, prefill = {"batch": 16, "prompt": 64, "new": 128}, {"batch": 8, "prompt": 4096, "new": 1}
            for process in (first, second):  # compiles and warms what the figures must not hold
                process.ask(seed=1, **decode)
                process.ask(seed=2, **prefill)
            alone = [process.ask(seed=3, **decode)["s"] for process in (first, second)]
            answer.samples("SGLang: 16 × 128 tokens, neighbour idle", alone, "s")
            for label, order in {"decodes": decode, "prefills": prefill}.items():
                second.tell(seed=4, **order)
                mine = first.ask(seed=5, **decode)["s"]
                theirs = second.told(60)["s"]
                answer.figure(f"SGLang: 16 × 128 tokens, neighbour {label}", mine, "s")
                answer.figure(f"SGLang: 16 × 128 tokens, neighbour {label}, against idle", mine / alone[0], "×")
                answer.figure(f"SGLang: the neighbour that {label}", theirs, "s")


# The process that steps.


def steps_of(tokens: int, *, rehearse: bool) -> Work:
    """One step's matrix products over all layers, as a graph."""
    where = device(rehearse=rehearse)
    layers, wide, inner, out = (2, 64, 128, 96) if rehearse else (32, 4096, 14336, 6144)
    rows = torch.ones(tokens, wide, dtype=torch.bfloat16, device=where.torch)
    if not weights:
        for _ in range(layers):
            shapes = ((wide, out), (wide, wide), (wide, 2 * inner), (inner, wide))
            weights.append([torch.full(shape, 1e-3, dtype=torch.bfloat16, device=where.torch) for shape in shapes])

    def step() -> None:
        for attention, project, up, down in weights:
            hidden = (rows @ attention)[:, :wide] @ project
            gate, value = (hidden @ up).chunk(2, dim=1)
            torch.mul(gate.sigmoid(), value) @ down

    return where.captured(step)


weights: list[list[torch.Tensor]] = []


def main() -> None:
    rehearse = sys.argv[1] == "rehearse"
    where = device(rehearse=rehearse)
    works: dict[str, Work] = {}
    for order, answers in orders():
        if not order:
            works = {
                "decode": steps_of(16, rehearse=rehearse),
                "prefill": steps_of(32 if rehearse else 2048, rehearse=rehearse),
            }
            reply(answers)
            continue
        while time.monotonic() < order["begin"]:
            pass
        ends = [time.monotonic()]
        while ends[-1] < order["begin"] + order["seconds"]:
            works[order["work"]]()
            where.synchronize()  # a step's tokens are read before the next begins
            ends.append(time.monotonic())
        spent = [end - begin for begin, end in itertools.pairwise(ends)]
        reply(
            answers,
            steps=len(spent),
            mean_s=sum(spent) / len(spent),
            p10_s=percentile(spent, 10),
            p99_s=percentile(spent, 99),
        )


if __name__ == "__main__":
    main()

"""One page of plots for an answer: by GPUs, by load, what stands where at first, and who stood where on the first day.

Draws on any canvas. The points beside the answer are replays of the first day.
"""

from __future__ import annotations

from collections.abc import Iterator

from chimera.bench import chart
from chimera.bench.canvas import Canvas, Part
from chimera.bench.chart import Curve
from chimera.bench.watch import Stay, Switch
from chimera.core.metrics import Metrics
from chimera.sim.chronicle import Chronicle
from chimera.sim.run import WARM_UP_S, simulate
from chimera.sizing.answer import Answer
from chimera.sizing.search import Search

WIDTH, HEIGHT = 1180, 900
BESIDE = 2
"""Counts of GPUs that are shown to either side of the answer."""
LOADS = (0.5, 0.75, 1.0, 1.15, 1.3, 1.6)
"""Of the load that the answer carries at most."""
_HEAD, _LEGEND = 52, 60


def draw(canvas: Canvas, search: Search, answer: Answer) -> None:
    """On a canvas of `WIDTH` × `HEIGHT`."""
    goal = f"{100 * answer.target:.6g} % of requests keep both promises"
    enough = f"{answer.gpus} GPUs are enough" if answer.enough else f"{answer.gpus} GPUs are not enough"
    what = answer.what.replace("×", "x")  # which a PNG's font lacks
    canvas.text(12, 20, f"{enough}: {what}, {answer.policy}", size=17, color=chart.INK)
    canvas.text(12, 40, f"{goal} on each of {answer.days} days; {answer.machine}", size=11.5, color=chart.FAINT)
    hues = chart.colors([model.name for model in search.load.models])
    half, third = WIDTH // 2, (HEIGHT - _HEAD - _LEGEND) // 2
    parts = [Part(canvas, half * column, _HEAD + third * row, half, third) for row in (0, 1) for column in (0, 1)]
    goal_percent = 100 * answer.target
    chart.by_rate(parts[0], "By GPUs, first day", _by_gpus(search, answer), goal_percent, "GPUs")
    chart.by_rate(parts[1], f"By load, {answer.gpus} GPUs", _by_load(search, answer), goal_percent, "times the trace")
    chart.holdings(parts[2], "At first", _held(search, answer), search.costs.gpu_bytes, hues)
    stays, switches, end_s = _first_day(search, answer)
    chart.timeline(parts[3], "Who stood, first day", stays, switches, end_s, hues)
    chart.model_legend(Part(canvas, 0, HEIGHT - _LEGEND, WIDTH, _LEGEND), hues)


def _curves(points: Iterator[tuple[float, Metrics]]) -> list[Curve]:
    told = list(points)
    return [
        Curve("both", tuple((x, 100 * metrics.joint_attainment) for x, metrics in told)),
        Curve("TTFT", tuple((x, 100 * metrics.ttft_attainment) for x, metrics in told)),
        Curve("TPOT", tuple((x, 100 * metrics.tpot_attainment) for x, metrics in told)),
    ]


def _by_gpus(search: Search, answer: Answer) -> list[Curve]:
    counts = (count for count in range(answer.gpus - BESIDE, answer.gpus + BESIDE + 1) if search.possible(count))
    return _curves((float(count), search.outcome(count, answer.policy, 1).metrics) for count in counts)


def _by_load(search: Search, answer: Answer) -> list[Curve]:
    most = answer.carries or answer.rate
    scenario = search.scenario(answer.gpus, answer.policy)
    days = ((part * most, search.load.day(1, part * most)) for part in LOADS)
    return _curves((rate, simulate(scenario, day).metrics) for rate, day in days)


def _held(search: Search, answer: Answer) -> list[list[tuple[str, int]]]:
    resident = {model.name: search.costs.resident_bytes(model) for model in search.load.models}
    return [
        [(seat.replica.model, resident[seat.replica.model]) for seat in answer.placement.on_gpu(gpu_id)]
        for gpu_id in range(answer.gpus)
    ]


def _first_day(search: Search, answer: Answer) -> tuple[list[Stay], list[Switch], float]:
    chronicle = Chronicle()
    day = search.load.day(1)
    simulate(search.scenario(answer.gpus, answer.policy), day, chronicle=chronicle)
    return *stood(chronicle), day.rows[-1].at_s if day.rows else 1.0


def stood(chronicle: Chronicle) -> tuple[list[Stay], list[Switch]]:
    """Who stood when, and what came up, on the trace's own time."""
    stays, switches = [], []
    for span in chronicle.spans:
        if span.ready_s is None:
            continue
        model = span.replica.rpartition("/")[0]
        ready_s = span.ready_s - WARM_UP_S
        stays.append(Stay(model=model, gpu_ids=span.gpus, from_s=ready_s, to_s=span.gone_s - WARM_UP_S))
        if span.asked_s >= WARM_UP_S:
            switches.append(Switch(at_s=ready_s, model=model, gpu_ids=span.gpus, took_s=span.ready_s - span.asked_s))
    return stays, switches

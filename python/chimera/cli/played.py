"""One page of plots of a simulation: what each policy kept, and when; how soon first tokens came; who stood where at last.

Bars are means over the seeds, from the worst to the best of them; the rest is of the first seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec

from chimera.bench import chart
from chimera.bench.canvas import Canvas, Part
from chimera.bench.chart import Curve
from chimera.bench.paired import Interval
from chimera.core.metrics import Metrics, Story
from chimera.sim.chronicle import Chronicle
from chimera.sim.run import Outcome
from chimera.sizing.page import stood

WIDTH, HEIGHT = 1180, 900
_HEAD, _LEGEND = 52, 60
_PARTS_OF_TIME = 24


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's runs."""

    outcomes: tuple[Outcome, ...]
    """By seed."""
    stories: tuple[Story, ...]
    chronicle: Chronicle

    @property
    def policy(self) -> str:
        return self.outcomes[0].policy


def draw(canvas: Canvas, title: str, models: Sequence[str], span_s: float, runs: Sequence[Played]) -> None:
    """On a canvas of `WIDTH` × `HEIGHT`."""
    canvas.text(12, 20, title, size=17, color=chart.INK)
    seeds = len(runs[0].outcomes)
    canvas.text(
        12, 40, f"{seeds} seeds; all but the bars is of the first" if seeds > 1 else "one seed", 11.5, color=chart.FAINT
    )
    half, third = WIDTH // 2, (HEIGHT - _HEAD - _LEGEND) // 2
    parts = [Part(canvas, half * column, _HEAD + third * row, half, third) for row in (0, 1) for column in (0, 1)]
    promises = {
        "both": lambda m: m.joint_attainment,
        "TTFT": lambda m: m.ttft_attainment,
        "TPOT": lambda m: m.tpot_attainment,
    }
    kept = {name: [(run.policy, _over_seeds(run, share)) for run in runs] for name, share in promises.items()}
    chart.shares(parts[0], "Promises kept", kept)
    firsts = [(run.policy, sorted(1e3 * s.ttft_s for s in run.stories if s.ttft_s is not None)) for run in runs]
    chart.cumulative(parts[1], "Time to first token", firsts)
    curves = [Curve(run.policy, _by_time(run.stories, span_s)) for run in runs]
    chart.by_rate(parts[2], "Both kept, over time", curves, 100.0, "seconds")
    hues = chart.colors(models)
    stays, switches = stood(runs[-1].chronicle)
    chart.timeline(parts[3], f"Who stood, {runs[-1].policy}", stays, switches, span_s, hues)
    chart.model_legend(Part(canvas, 0, HEIGHT - _LEGEND, WIDTH, _LEGEND), hues)


def _over_seeds(run: Played, share: Callable[[Metrics], float]) -> Interval:
    values = [share(outcome.metrics) for outcome in run.outcomes]
    return Interval(value=statistics.fmean(values), low=min(values), high=max(values))


def _by_time(stories: Sequence[Story], span_s: float) -> tuple[tuple[float, float], ...]:
    """The share that was kept of those sent in each part of the time in which any were."""
    part_s = max(span_s, 1e-3) / _PARTS_OF_TIME
    sent: dict[int, list[bool]] = {}
    for story in stories:
        sent.setdefault(min(_PARTS_OF_TIME - 1, int(story.sent_s / part_s)), []).append(story.keeps_both)
    return tuple(((part + 0.5) * part_s, 100 * statistics.fmean(kept)) for part, kept in sorted(sent.items()))

"""The charts of a report, drawn on any canvas: shares with intervals, curves, stacked memory, who was up when."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence

import msgspec

from chimera.bench.canvas import Canvas, Point
from chimera.bench.paired import Interval
from chimera.bench.watch import Sample, Stay, Switch
from chimera.units import GB, MIB

INK, FAINT, GRID = "#2a2f3a", "#8a91a0", "#e6e8ee"
RUNS = ("#2f6fde", "#e2703a", "#2f9e6e", "#9159c9", "#c9a227", "#d1477a", "#3aa6b9", "#7a7f8c")
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 52, 44


class Curve(msgspec.Struct, frozen=True):
    name: str
    points: tuple[Point, ...]
    """In the units of the axes."""


class _Frame:
    """Axes: where a value is on the canvas."""

    def __init__(self, canvas: Canvas, x: tuple[float, float], y: tuple[float, float], *, log_x: bool = False) -> None:
        self.canvas = canvas
        self.left, self.right = _LEFT, canvas.width - _RIGHT
        self.top, self.bottom = _TOP, canvas.height - _BOTTOM
        self._x, self._y, self._log = x, y, log_x

    def x(self, value: float) -> float:
        low, high = self._x
        share = (math.log(value / low) / math.log(high / low)) if self._log else (value - low) / (high - low)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def draw(self, title: str, x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        canvas = self.canvas
        canvas.text(12, 16, title, size=13.5, color=INK)
        for value in y_ticks:
            canvas.line([(self.left, self.y(value)), (self.right, self.y(value))], GRID)
            canvas.text(self.left - 8, self.y(value), _number(value), size=10.5, anchor="end", color=FAINT)
        for value in x_ticks:
            canvas.line([(self.x(value), self.bottom), (self.x(value), self.bottom + 4)], FAINT)
            canvas.text(self.x(value), self.bottom + 14, _number(value), size=10.5, anchor="middle", color=FAINT)
        canvas.line([(self.left, self.bottom), (self.right, self.bottom)], FAINT)
        canvas.text((self.left + self.right) / 2, self.bottom + 33, x_label, size=11, anchor="middle", color=FAINT)
        canvas.text(12, 33, y_label, size=10.5, color=FAINT)


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each model, neighbours well apart."""
    found = {}
    for number, name in enumerate(names):
        hue = (number * 0.381966 + 0.58) % 1
        light = (0.56, 0.68, 0.46)[number % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, light, 0.58)
        found[name] = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    return found


def cumulative(canvas: Canvas, title: str, curves: Sequence[tuple[str, Sequence[float]]], promise: float | None = None) -> None:
    """Of each run's latencies in milliseconds, which share is not above; a logarithmic axis."""
    every = [value for _, values in curves for value in values if value > 0]
    low, high = (min(every), max(every)) if every else (1.0, 10.0)
    low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(max(high, low * 1.01)))
    frame = _Frame(canvas, (low, high), (0, 100), log_x=True)
    frame.draw(title, "milliseconds", "% of answered requests", _decades(low, high), (0, 25, 50, 75, 100))
    if promise is not None and low < promise < high:
        canvas.line([(frame.x(promise), frame.top), (frame.x(promise), frame.bottom)], INK, 1.0, dashed=True)
        canvas.text(frame.x(promise) + 5, frame.top + 8, "SLO", size=10.5, color=INK)
    for (_, values), color in zip(curves, RUNS * 9, strict=False):
        ranked = sorted(value for value in values if value > 0)
        if not ranked:
            continue
        points: list[Point] = [(frame.x(ranked[0]), frame.y(0))]
        for number, value in enumerate(_thinned(ranked), start=1):
            share = 100 * number / len(_thinned(ranked))
            points += [(frame.x(value), points[-1][1]), (frame.x(value), frame.y(share))]
        canvas.line([*points, (frame.right, frame.y(100))], color, 2.0)
    _legend(canvas, [name for name, _ in curves], RUNS)


def shares(canvas: Canvas, title: str, groups: Mapping[str, Sequence[tuple[str, Interval]]]) -> None:
    """Bars in groups, one for each run, with the interval on each."""
    frame = _Frame(canvas, (0, max(1, len(groups))), (0, 100))
    frame.draw(title, "", "% of requests sent", (), (0, 25, 50, 75, 100))
    names: list[str] = []
    for place, (group, bars) in enumerate(groups.items()):
        canvas.text(frame.x(place + 0.5), frame.bottom + 16, group, size=11.5, anchor="middle")
        width = (frame.x(1) - frame.x(0)) * 0.8 / max(1, len(bars))
        for number, (name, interval) in enumerate(bars):
            if name not in names:
                names.append(name)
            left = frame.x(place) + (frame.x(1) - frame.x(0)) * 0.1 + number * width
            top = frame.y(100 * interval.value)
            canvas.rect(left + 2, top, width - 4, frame.bottom - top, RUNS[number % len(RUNS)], f"{name} {interval.value:.1%}")
            middle = left + width / 2
            ends = [(middle, frame.y(100 * interval.low)), (middle, frame.y(100 * min(1.0, interval.high)))]
            canvas.line(ends, INK, 1.4)
            canvas.text(middle, min(top, ends[1][1]) - 9, f"{100 * interval.value:.1f}", size=10.5, anchor="middle", color=INK)
    _legend(canvas, names, RUNS)


def by_rate(
    canvas: Canvas, title: str, curves: Sequence[Curve], goal: float = 99.0, x_label: str = "requests per second"
) -> None:
    every = [x for curve in curves for x, _ in curve.points]
    high = _above(max(every, default=1.0))
    frame = _Frame(canvas, (0, high), (0, 100))
    frame.draw(title, x_label, "% of requests sent", _round_steps(high), (0, 25, 50, 75, 100))
    canvas.line([(frame.left, frame.y(goal)), (frame.right, frame.y(goal))], INK, 1.0, dashed=True)
    for curve, color in zip(curves, RUNS * 9, strict=False):
        points = [(frame.x(x), frame.y(y)) for x, y in sorted(curve.points)]
        canvas.line(points, color, 2.2)
        for (x, y), (rate, share) in zip(points, sorted(curve.points), strict=True):
            canvas.rect(x - 3, y - 3, 6, 6, color, f"{curve.name}: {share:.1f} % at {rate:.2f} {x_label}")
    _legend(canvas, [curve.name for curve in curves], RUNS)


def memory(
    canvas: Canvas, title: str, samples: Sequence[Sample], gpu_id: int, capacity_bytes: int, hues: Mapping[str, str]
) -> None:
    """What each model held of one GPU, one upon the other."""
    end_s = max((sample.at_s for sample in samples), default=1.0)
    frame = _Frame(canvas, (0, max(end_s, 1e-3)), (0, 1.06 * capacity_bytes / MIB))
    high = capacity_bytes / MIB
    frame.draw(title, "seconds", "MiB held", _round_steps(end_s), _round_steps(high))
    names = [name for name in hues if any(name in sample.held.get(gpu_id, {}) for sample in samples)]
    floor = [0.0] * len(samples)
    for name in names:
        ceiling = [low + sample.held.get(gpu_id, {}).get(name, 0) / MIB for low, sample in zip(floor, samples, strict=True)]
        upper = _steps(frame, samples, ceiling)
        lower = _steps(frame, samples, floor)
        canvas.area([*upper, *reversed(lower)], hues[name], name)
        floor = ceiling
    canvas.line([(frame.left, frame.y(high)), (frame.right, frame.y(high))], INK, 1.2, dashed=True)


def timeline(
    canvas: Canvas, title: str, stays: Sequence[Stay], switches: Sequence[Switch], end_s: float, hues: Mapping[str, str]
) -> None:
    """Who was up when: a row for each model, dark where it came up."""
    names = list(hues)
    frame = _Frame(canvas, (0, max(end_s, 1e-3)), (0, max(1, len(names))))
    frame.draw(title, "seconds", "", _round_steps(end_s), ())
    height = (frame.bottom - frame.top) / max(1, len(names))
    for row, name in enumerate(names):
        top = frame.top + row * height
        canvas.line([(frame.left, top + height), (frame.right, top + height)], GRID)
        canvas.text(frame.left - 6, top + height / 2, _short(name), size=min(10.0, height * 0.8), anchor="end", color=FAINT)
        for stay in stays:
            if stay.model == name:
                left, right = frame.x(max(0.0, stay.from_s)), frame.x(min(end_s, stay.to_s))
                tip = f"{name}: {stay.from_s:.1f} to {stay.to_s:.1f} s on GPU {', '.join(map(str, stay.gpu_ids))}"
                canvas.rect(left, top + height * 0.15, right - left, height * 0.7, hues[name], tip)
        for switch in switches:
            if switch.model == name and switch.at_s <= end_s:
                left = frame.x(max(0.0, switch.at_s - switch.took_s))
                width = max(1.5, frame.x(switch.at_s) - left)
                canvas.rect(left, top, width, height, INK, f"{name} in {switch.took_s:.2f} s: {switch.reason}")


def holdings(
    canvas: Canvas, title: str, held: Sequence[Sequence[tuple[str, int]]], capacity_bytes: int, hues: Mapping[str, str]
) -> None:
    """What stands on each GPU, one upon the other; what is white is left to caches."""
    high = capacity_bytes / GB
    frame = _Frame(canvas, (0, max(1, len(held))), (0, 1.06 * high))
    frame.draw(title, "GPU", "GB of weights and engines", (), _round_steps(high))
    width = frame.x(1) - frame.x(0)
    for gpu_id, models in enumerate(held):
        canvas.text(frame.x(gpu_id + 0.5), frame.bottom + 14, str(gpu_id), size=10.5, anchor="middle", color=FAINT)
        floor = 0.0
        for name, nbytes in models:
            ceiling = floor + nbytes / GB
            top = frame.y(ceiling)
            canvas.rect(frame.x(gpu_id) + 0.15 * width, top, 0.7 * width, frame.y(floor) - top - 1, hues[name], name)
            floor = ceiling
    canvas.line([(frame.left, frame.y(high)), (frame.right, frame.y(high))], INK, 1.2, dashed=True)


def model_legend(canvas: Canvas, hues: Mapping[str, str]) -> None:
    columns = max(1, canvas.width // 120)
    for number, (name, color) in enumerate(hues.items()):
        x, y = 12 + number % columns * 120, 12 + number // columns * 20
        canvas.rect(x, y - 5, 11, 11, color)
        canvas.text(x + 17, y + 0.5, name, size=11)


def _legend(canvas: Canvas, names: Sequence[str], palette: Sequence[str]) -> None:
    x = float(canvas.width - _RIGHT)
    for name, color in reversed(list(zip(names, list(palette) * 9, strict=False))):
        x -= 7.0 * len(name) + 26
        canvas.rect(x, 11, 11, 11, color)
        canvas.text(x + 16, 17, name, size=11)


def _steps(frame: _Frame, samples: Sequence[Sample], values: Sequence[float]) -> list[Point]:
    points: list[Point] = []
    for sample, value in zip(samples, values, strict=True):
        if points:
            points.append((frame.x(sample.at_s), points[-1][1]))
        points.append((frame.x(sample.at_s), frame.y(value)))
    return points


def _thinned(ranked: Sequence[float], most: int = 400) -> Sequence[float]:
    if len(ranked) <= most:
        return ranked
    return [ranked[round(n * (len(ranked) - 1) / (most - 1))] for n in range(most)]


def _decades(low: float, high: float) -> list[float]:
    ticks = []
    value = low
    while value <= high * 1.001:
        ticks.append(value)
        value *= 10
    return ticks


def _above(value: float) -> float:
    """A round number that is not below."""
    power: float = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)


def _round_steps(high: float) -> list[float]:
    step = _above(high / 6)
    return [step * n for n in range(int(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _short(name: str, most: int = 10) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]

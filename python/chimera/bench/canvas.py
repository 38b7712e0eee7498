"""Where a chart is drawn: as SVG inside a page, or as a PNG file. Knows lines, areas and words; not what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Protocol

Point = tuple[float, float]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Canvas(Protocol):
    width: int
    height: int

    def rect(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None: ...

    def line(self, points: Sequence[Point], color: str, width: float = 1.0, dashed: bool = False) -> None: ...

    def area(self, points: Sequence[Point], fill: str, tip: str = "") -> None: ...

    def text(self, x: float, y: float, words: str, size: float = 12, anchor: str = "start", color: str = "#3c4250") -> None:
        """`y` is the middle of the line; `anchor` is start, middle or end."""


class Svg:
    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None:
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}"'
        self._parts.append(f'<rect {box} fill="{fill}" rx="1.5">{_tip(tip)}</rect>')

    def line(self, points: Sequence[Point], color: str, width: float = 1.0, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        drawn = f'fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round"{dashes}'
        self._parts.append(f'<polyline points="{_spelled(points)}" {drawn}/>')

    def area(self, points: Sequence[Point], fill: str, tip: str = "") -> None:
        self._parts.append(f'<polygon points="{_spelled(points)}" fill="{fill}">{_tip(tip)}</polygon>')

    def text(self, x: float, y: float, words: str, size: float = 12, anchor: str = "start", color: str = "#3c4250") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" fill="{color}"'
        self._parts.append(f'<text {place} dominant-baseline="central">{escape(words)}</text>')

    def markup(self, label: str) -> str:
        head = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}" font-family="{FONT}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {head}>{"".join(self._parts)}</svg>'


def _tip(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""


def _spelled(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


class Png:
    """Drawn larger than it is kept, so that lines are smooth."""

    DENSITY = 2
    _OVER = 2

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.width, self.height = width, height
        self._scale = self.DENSITY * self._OVER
        self._image = Image.new("RGB", (width * self._scale, height * self._scale), "white")
        self._draw = ImageDraw.Draw(self._image)

    def rect(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None:
        if width > 0 and height > 0:
            self._draw.rectangle([self._at((x, y)), self._at((x + width, y + height))], fill=fill)

    def line(self, points: Sequence[Point], color: str, width: float = 1.0, dashed: bool = False) -> None:
        pieces = _dashes(points) if dashed else [points]
        for piece in pieces:
            if len(piece) > 1:
                self._draw.line([self._at(p) for p in piece], fill=color, width=round(width * self._scale), joint="curve")

    def area(self, points: Sequence[Point], fill: str, tip: str = "") -> None:
        if len(points) > 2:
            self._draw.polygon([self._at(point) for point in points], fill=fill)

    def text(self, x: float, y: float, words: str, size: float = 12, anchor: str = "start", color: str = "#3c4250") -> None:
        from PIL import ImageFont

        font = ImageFont.load_default(size * self._scale)
        self._draw.text(
            self._at((x, y)), words, fill=color, font=font, anchor={"start": "lm", "middle": "mm"}.get(anchor, "rm")
        )

    def save(self, path: Path) -> None:
        size = (self.width * self.DENSITY, self.height * self.DENSITY)
        self._image.resize(size, resample=1).save(path, optimize=True)

    def _at(self, point: Point) -> tuple[float, float]:
        return point[0] * self._scale, point[1] * self._scale


class Part:
    """A rectangle of another canvas, drawn on as if it were a canvas of its own."""

    def __init__(self, whole: Canvas, x: int, y: int, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._whole, self._x, self._y = whole, x, y

    def rect(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None:
        self._whole.rect(self._x + x, self._y + y, width, height, fill, tip)

    def line(self, points: Sequence[Point], color: str, width: float = 1.0, dashed: bool = False) -> None:
        self._whole.line(self._moved(points), color, width, dashed)

    def area(self, points: Sequence[Point], fill: str, tip: str = "") -> None:
        self._whole.area(self._moved(points), fill, tip)

    def text(self, x: float, y: float, words: str, size: float = 12, anchor: str = "start", color: str = "#3c4250") -> None:
        self._whole.text(self._x + x, self._y + y, words, size, anchor, color)

    def _moved(self, points: Sequence[Point]) -> list[Point]:
        return [(self._x + x, self._y + y) for x, y in points]


def _dashes(points: Sequence[Point], length: float = 4.0) -> list[list[Point]]:
    """Every second piece of a line between its first and last point."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    whole = max(1e-9, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
    steps = int(whole / length)
    along = [(x0 + (x1 - x0) * n / max(1, steps), y0 + (y1 - y0) * n / max(1, steps)) for n in range(steps + 1)]
    return [[along[n], along[n + 1]] for n in range(0, steps, 2)]

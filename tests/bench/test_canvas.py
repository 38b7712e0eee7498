"""Canvases that charts are drawn on."""

from __future__ import annotations

from chimera.bench.canvas import Part, Svg


def test_a_part_of_a_canvas_is_drawn_on_as_if_it_stood_alone() -> None:
    whole, alone = Svg(200, 100), Svg(60, 40)
    part = Part(whole, 100, 50, 60, 40)
    assert (part.width, part.height) == (alone.width, alone.height)
    for canvas, x, y in ((part, 0, 0), (whole, 100, 50)):
        canvas.rect(x + 1, y + 2, 3, 4, "red", "tip")
        canvas.line([(x + 5, y + 6), (x + 7, y + 8)], "blue", 2.0, dashed=True)
        canvas.area([(x, y), (x + 1, y), (x, y + 1)], "green")
        canvas.text(x + 9, y + 10, "told", 13, "end", "black")
    first, second = whole._parts[:4], whole._parts[4:]
    assert first == second

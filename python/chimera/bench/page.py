"""The report: one HTML page that needs nothing else, and the same charts as PNG files. Several runs stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from chimera.bench import chart, paired
from chimera.bench.canvas import FONT, Canvas, Png, Svg
from chimera.bench.outcome import Outcome, model_table
from chimera.bench.record import Record, stories
from chimera.units import MIB

Runs = Sequence[tuple[Outcome, Sequence[Record]]]
Draw = Callable[[Canvas], None]

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f8; color: #2a2f3a; font: 14px/1.5 FONT; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 36px 0 12px; }
.lead, .note { color: #6a7180; margin: 0 0 14px; }
.note { font-size: 12.5px; margin-top: 8px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 16px; }
.card { background: white; border: 1px solid #e6e8ee; border-radius: 10px; padding: 12px; }
.card.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid #eceef3; white-space: nowrap; }
th { color: #6a7180; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
.scroll { overflow-x: auto; }
.warn { background: #fff4e5; border: 1px solid #f3c98b; border-radius: 8px; padding: 8px 12px; margin: 0 0 12px; }
details { margin-top: 10px; }
summary { cursor: pointer; color: #2f6fde; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0 0; font-size: 13px; }
dt { color: #6a7180; } dd { margin: 0; overflow-wrap: anywhere; }
""".replace("FONT", FONT)


def write(folder: Path, title: str, runs: Runs) -> list[Path]:
    """The page and every chart of it."""
    charts = list(_charts(runs))
    written = []
    for name, _, size, draw in charts:
        canvas = Png(*size)
        draw(canvas)
        written.append(folder / f"{name}.png")
        canvas.save(written[-1])
    page = folder / "report.html"
    page.write_text("".join(_page(title, runs, charts)))
    return [page, *written]


Chart = tuple[str, str, tuple[int, int], Draw]
"""File name, section, size, and what draws it."""


def _charts(runs: Runs) -> Iterator[Chart]:
    yield from _kept(runs)
    yield from _latencies(runs)
    hues = _hues(runs)
    for found, _ in runs:
        yield from _over_time(found, hues)


def _kept(runs: Runs) -> Iterator[Chart]:
    rates = _by_rate(runs)
    if rates:
        yield (
            "attainment-by-rate",
            "Promises kept",
            (1120, 340),
            lambda canvas: chart.by_rate(canvas, "Attainment against rate", rates),
        )
        return
    groups = {
        label: [(found.name, paired.attainment(records, measure)) for found, records in runs]
        for label, measure in (("TTFT", _M["ttft"]), ("TPOT", _M["tpot"]), ("both", _M["joint"]))
    }
    yield (
        "attainment",
        "Promises kept",
        (1120, 320),
        lambda canvas: chart.shares(canvas, "Attainment, with 95 % intervals", groups),
    )


_M = paired.MEASURES


def _by_rate(runs: Runs) -> list[chart.Curve]:
    """A curve for each policy or server, when it was run at several rates."""
    groups: dict[str, list[Outcome]] = {}
    for found, _ in runs:
        if "rate_scale" in found.facts:
            groups.setdefault(str(found.facts.get("policy") or found.facts.get("url", "")), []).append(found)
    curves = []
    for name, group in groups.items():
        rates = {round(found.metrics.sent / max(found.metrics.span_s, 1e-9), 3) for found in group}
        if len({found.facts["rate_scale"] for found in group}) < 2 or len(rates) < 2:
            continue
        for word in ("ttft", "tpot", "joint"):
            points = tuple(
                (found.metrics.sent / max(found.metrics.span_s, 1e-9), 100 * getattr(found.metrics, f"{word}_attainment"))
                for found in group
            )
            label = {"ttft": "TTFT", "tpot": "TPOT", "joint": "both"}[word]
            curves.append(chart.Curve(f"{name} {label}" if len(groups) > 1 else label, points))
    return curves


def _latencies(runs: Runs) -> Iterator[Chart]:
    told = [(found.name, stories([record for record in records if record.answered])) for found, records in runs]
    promises = {(story.slo.ttft_s, story.slo.tpot_s) for _, ours in told for story in ours}
    ttft_s, tpot_s = next(iter(promises)) if len(promises) == 1 else (None, None)
    for name, title, word, promise_s in (
        ("ttft", "Time to first token", "ttft_s", ttft_s),
        ("tpot", "Time per output token", "tpot_s", tpot_s),
    ):
        curves = [(run, [1000 * value for s in ours if (value := getattr(s, word)) is not None]) for run, ours in told]
        promise = None if promise_s is None else 1000 * promise_s
        yield name, "Latencies", (560, 340), _drawn(chart.cumulative, title, curves, promise)


def _over_time(found: Outcome, hues: Mapping[str, str]) -> Iterator[Chart]:
    seen = found.sighting
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in found.name)
    if seen.samples:
        for gpu in seen.gpus:
            title = f"{found.name}: memory of each model on GPU {gpu.gpu_id}"
            name = f"memory-{safe}-gpu{gpu.gpu_id}"
            yield (
                name,
                "Memory over time",
                (560, 300),
                _drawn(chart.memory, title, seen.samples, gpu.gpu_id, gpu.capacity_bytes, hues),
            )
    if seen.stays:
        end_s = max((sample.at_s for sample in seen.samples), default=found.ending.wall_s)
        title = f"{found.name}: who was up when, {len(seen.switches)} switches"
        height = 90 + 15 * max(4, len(hues))
        yield (
            f"switches-{safe}",
            "Switches",
            (560, height),
            _drawn(chart.timeline, title, seen.stays, seen.switches, end_s, hues),
        )


def _hues(runs: Runs) -> Mapping[str, str]:
    """A model has one colour in every run."""
    names = {name for found, _ in runs for name in (*found.by_model, *(stay.model for stay in found.sighting.stays))}
    return chart.colors(sorted(names))


def _drawn(draw: Callable[..., None], *arguments: object) -> Draw:
    return lambda canvas: draw(canvas, *arguments)


# The page.


def _page(title: str, runs: Runs, charts: Sequence[Chart]) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>'
    yield f"<h1>{escape(title)}</h1>{_lead(runs)}"
    for found, _ in runs:
        if found.ending.partial:
            yield f'<p class="warn"><b>{escape(found.name)} is partial:</b> {escape(found.ending.partial)}</p>'
        if not found.valid:
            yield f'<p class="warn"><b>{escape(found.name)}</b>: requests were sent late; read nothing from it.</p>'
    yield f'<div class="card scroll">{_table(_summary(runs))}</div>'
    if len(runs) > 1:
        yield '<p class="note">Differences are paired by request; 95 % bootstrap intervals over blocks of time.</p>'
        yield f'<div class="card scroll">{_table(_differences(runs))}</div>'
    for section in ("Promises kept", "Latencies", "Memory over time", "Switches"):
        drawn = [entry for entry in charts if entry[1] == section]
        if not drawn:
            continue
        yield f"<h2>{section}</h2>"
        if section == "Memory over time":
            yield '<p class="lead">What each model held, one upon the other; the dashed line is all there is.</p>'
            hues = _hues(runs)
            legend = Svg(1120, 30 + 20 * ((len(hues) - 1) // 9))
            chart.model_legend(legend, hues)
            yield f'<div class="card wide" style="margin-bottom:16px">{legend.markup("models")}</div>'
        yield '<div class="grid">'
        for name, _, size, draw in drawn:
            canvas = Svg(*size)
            draw(canvas)
            yield f'<div class="card{" wide" if size[0] > 800 else ""}">{canvas.markup(name)}</div>'
        yield "</div>"
    yield "<h2>Per model</h2>"
    for found, _ in runs:
        opened = " open" if len(runs) == 1 else ""
        table = f'<div class="card scroll">{_table(model_table(found))}</div>'
        yield f"<details{opened}><summary>{escape(found.name)}</summary>{table}</details>"
    yield "<h2>How it was measured</h2>"
    for found, _ in runs:
        facts = "".join(
            f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in found.facts.items() if v not in (None, [], {})
        )
        yield f"<details><summary>{escape(found.name)}</summary><dl>{facts}</dl></details>"
    yield "</main></body></html>\n"


def _lead(runs: Runs) -> str:
    first = runs[0][0]
    facts = first.facts
    words = [
        f"{facts.get('requests', first.metrics.sent)} requests over {first.metrics.span_s:.0f} s",
        f"{len(first.by_model)} models",
        f"{len(first.sighting.gpus)} GPUs of {first.sighting.gpus[0].capacity_bytes / MIB:,.0f} MiB"
        if first.sighting.gpus
        else "",
        str(facts.get("trace", "")),
        str(facts.get("machine", "")),
        str(facts.get("date", ""))[:10],
    ]
    return f'<p class="lead">{escape(" · ".join(word for word in words if word))}</p>'


def _summary(runs: Runs) -> list[list[str]]:
    kept = ["sent", "answered", "TTFT %", "TPOT %", "both %", "goodput/s"]
    rows = [["run", *kept, "TTFT p50", "TTFT p99", "TPOT p50", "switches", "switch p50", "memory peak", "GPU-s"]]
    for found, _ in runs:
        m, f = found.metrics, found.figures
        shares = [f"{100 * share:.1f}" for share in (m.ttft_attainment, m.tpot_attainment, m.joint_attainment)]
        times = [_ms(value) for value in (m.ttft.p50_s, m.ttft.p99_s, m.tpot.p50_s)]
        switch = f"{f['switch_ms']['p50']:.0f} ms" if f.get("switch_ms") else "–"
        peak = f"{f['memory_peak_bytes'] / MIB:,.0f} MiB" if f.get("memory_peak_bytes") else "–"
        more = [str(f.get("switches", 0)), switch, peak, f"{f.get('gpu_seconds', 0):.0f}"]
        rows.append([found.name, str(m.sent), str(m.answered), *shares, f"{m.goodput_per_s:.2f}", *times, *more])
    return rows


def _differences(runs: Runs) -> list[list[str]]:
    (base, records), *others = runs
    rows = [[f"against {base.name}", "TTFT, points", "TPOT, points", "both, points"]]
    for found, theirs in others:
        gaps = [paired.difference(theirs, records, measure) for measure in paired.MEASURES.values()]
        rows.append([found.name, *(_gap(gap) for gap in gaps)])
    return rows


def _gap(gap: paired.Interval) -> str:
    return f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]{'' if gap.sure else ' ·'}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def _ms(value_s: float | None) -> str:
    return "–" if value_s is None else f"{1000 * value_s:,.0f} ms" if value_s >= 0.1 else f"{1000 * value_s:.1f} ms"

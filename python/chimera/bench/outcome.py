"""A run in figures: the JSON keys that vLLM's and SGLang's benchmarks have, their banner, and the words of docs/metrics.md.

One figure has one definition here, whichever of its names it is asked by; percentiles are those of `chimera.core.metrics`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chimera.bench.load import MOST_LATE, Ending
from chimera.bench.record import Record, stories
from chimera.bench.watch import Sighting
from chimera.core.metrics import Metrics, measure, measure_by_model, percentile
from chimera.errors import ConfigError

_COLUMNS, _LABEL = 50, 40


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a run beside its records."""

    name: str
    """Which run it is: a policy, a server, a rate."""
    facts: dict[str, Any]
    """What a reader needs to repeat it."""
    ending: Ending
    metrics: Metrics
    by_model: dict[str, Metrics]
    figures: dict[str, Any]
    """The peers' keys."""
    sighting: Sighting = Sighting()

    @property
    def valid(self) -> bool:
        return not self.ending.is_late


def outcome(
    name: str,
    records: Sequence[Record],
    ending: Ending,
    sighting: Sighting,
    facts: Mapping[str, Any] | None = None,
    gpu_price: float | None = None,
) -> Outcome:
    """`gpu_price` is per GPU and hour, in whatever money."""
    told = stories(records)
    metrics = measure(told)
    figures = peers_keys(records, ending, metrics)
    figures |= _machines(metrics, sighting, gpu_price)
    figures |= _switches(records, sighting)
    return Outcome(
        name=name,
        facts=dict(facts or {}),
        ending=ending,
        metrics=metrics,
        by_model=measure_by_model(told),
        figures=figures,
        sighting=sighting,
    )


def peers_keys(records: Sequence[Record], ending: Ending, metrics: Metrics) -> dict[str, Any]:
    answered = [record for record in records if record.answered]
    wall_s = max(ending.wall_s, 1e-9)
    output = sum(record.output_tokens for record in answered)
    prompt = sum(record.prompt_tokens for record in answered)
    per_second, most_at_once = _by_second(answered)
    e2e = [r.last_token_s - r.sent_s for r in answered if r.last_token_s is not None and r.sent_s is not None]
    slos = {record.slo for record in records}
    figures: dict[str, Any] = {
        "duration": wall_s,
        "completed": metrics.answered,
        "failed": metrics.sent - metrics.answered,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": metrics.answered / wall_s,
        "request_goodput": sum(story.keeps_both for story in stories(answered)) / wall_s,
        "input_throughput": prompt / wall_s,
        "output_throughput": output / wall_s,
        "total_token_throughput": (prompt + output) / wall_s,
        "total_throughput": (prompt + output) / wall_s,
        "max_output_tokens_per_s": per_second,
        "max_concurrent_requests": most_at_once,
        "concurrency": math.fsum(e2e) / wall_s,
        "slo_attainment": metrics.joint_attainment,
        "slo_attainment_by_metric": {"ttft": metrics.ttft_attainment, "tpot": metrics.tpot_attainment},
    }
    if len(slos) == 1:
        slo = next(iter(slos))
        figures["goodput_slos_ms"] = {
            name: 1000 * value for name, value in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)) if value is not None
        }
    by_story = stories(answered)
    for name, values in (
        ("ttft", [story.ttft_s for story in by_story]),
        ("tpot", [story.tpot_s for story in by_story]),
        ("itl", [gap for record in answered for gap in record.pieces_s]),
        ("e2el", e2e),
    ):
        figures |= _spread(name, [value for value in values if value is not None])
    figures |= {key.replace("e2el", "e2e_latency"): value for key, value in figures.items() if "_e2el_" in key}
    return figures


def lists(records: Sequence[Record]) -> dict[str, Any]:
    """The peers' lists, an entry for every request that was sent."""
    sent = [record for record in records if record.sent_s is not None]
    return {
        "input_lens": [record.prompt_tokens for record in sent],
        "output_lens": [record.output_tokens if record.answered else 0 for record in sent],
        "ttfts": [story.ttft_s or 0.0 for story in stories(sent)],
        "itls": [record.pieces_s for record in sent],
        "latencies": [(r.last_token_s or r.sent_s or 0.0) - (r.sent_s or 0.0) for r in sent],
        "start_times": [record.sent_s for record in sent],
        "errors": [record.error or record.refusal for record in sent],
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    ranked = sorted(1000 * value for value in values) or [0.0]
    return {
        f"mean_{name}_ms": math.fsum(ranked) / len(ranked),
        f"median_{name}_ms": percentile(ranked, 50),
        f"std_{name}_ms": statistics.pstdev(ranked),
        f"max_{name}_ms": ranked[-1],
        **{f"p{percent}_{name}_ms": percentile(ranked, percent) for percent in (50, 90, 95, 99)},
    }


def _by_second(answered: Sequence[Record]) -> tuple[float, int]:
    """The most tokens that came in one second, and the most requests that were open in one."""
    tokens: dict[int, int] = {}
    at_once: dict[int, int] = {}
    for record in answered:
        if record.sent_s is None or record.first_token_s is None or record.last_token_s is None:
            continue
        at_s = record.first_token_s
        for gap_s in (0.0, *record.pieces_s):
            at_s += gap_s
            tokens[int(at_s)] = tokens.get(int(at_s), 0) + 1
        for second in range(int(record.sent_s), int(record.last_token_s) + 1):
            at_once[second] = at_once.get(second, 0) + 1
    return float(max(tokens.values(), default=0)), max(at_once.values(), default=0)


def _machines(metrics: Metrics, sighting: Sighting, price: float | None) -> dict[str, Any]:
    gpu_s = len(sighting.gpus) * metrics.span_s
    charged = sighting.charged()
    figures: dict[str, Any] = {
        "gpu_seconds": gpu_s,
        "gpu_hours_per_1000_requests": gpu_s / 3.6 / metrics.answered if metrics.answered else None,
        "memory_capacity_bytes": sum(gpu.capacity_bytes for gpu in sighting.gpus),
        "memory_peak_bytes": max(charged, default=0),
        "memory_mean_bytes": round(statistics.fmean(charged)) if charged else 0,
    }
    hours = figures["gpu_hours_per_1000_requests"]
    figures["cost_per_1000_requests"] = None if price is None or hours is None else hours * price
    return figures


def _switches(records: Iterable[Record], sighting: Sighting) -> dict[str, Any]:
    took = sorted(1000 * switch.took_s for switch in sighting.switches)
    cold = sorted(
        1000 * (record.first_token_s - record.sent_s)
        for record in records
        if record.sent_s is not None and record.first_token_s is not None and not sighting.was_up(record.model, record.sent_s)
    )
    return {"switches": len(took), "switch_ms": _brief(took), "cold_starts": len(cold), "cold_start_ms": _brief(cold)}


def _brief(ranked: Sequence[float]) -> dict[str, float] | None:
    if not ranked:
        return None
    return {"mean": math.fsum(ranked) / len(ranked), **{f"p{p}": percentile(ranked, p) for p in (50, 95, 99)}}


def document(found: Outcome) -> dict[str, Any]:
    """As it is kept: the peers' keys on top, as their tools look for them, and the rest under `run`."""
    whole = msgspec.to_builtins(found)
    return {**whole.pop("figures"), "run": whole}


def read_outcome(path: Path) -> Outcome:
    try:
        told = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        whole = told.pop("run")
        return msgspec.convert({**whole, "figures": told}, Outcome, strict=False)
    except OSError as fault:
        raise ConfigError.single(str(path), f"cannot be read: {fault.strerror or fault}") from None
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError) as fault:
        raise ConfigError.single(str(path), f"is no result of a run: {fault}") from None


def banner(found: Outcome, *, rate: str = "trace", concurrency: int | None = None) -> str:
    return "\n".join(_banner_lines(found, rate, concurrency))


def _banner_lines(found: Outcome, rate: str, concurrency: int | None) -> Iterator[str]:
    figures, metrics = found.figures, found.metrics
    yield _rule(" Serving Benchmark Result ", "=")
    yield _line("Run:", found.name)
    if found.ending.partial:
        yield f"PARTIAL: {found.ending.partial}"
    yield _line("Traffic request rate:", rate)
    yield _line("Max request concurrency:", concurrency or "not set")
    yield _line("Successful requests:", metrics.answered)
    yield _line("Failed requests:", metrics.sent - metrics.answered)
    for label, key in (
        ("Benchmark duration (s):", "duration"),
        ("Total input tokens:", "total_input_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Request goodput (req/s):", "request_goodput"),
        ("Input token throughput (tok/s):", "input_throughput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_token_throughput"),
        ("Concurrency:", "concurrency"),
    ):
        yield _line(label, figures[key])
    for title, name, label in (
        ("End-to-End Latency", "e2el", "E2E Latency"),
        ("Time to First Token", "ttft", "TTFT"),
        ("Time per Output Token (excl. 1st token)", "tpot", "TPOT"),
        ("Inter-Token Latency", "itl", "ITL"),
    ):
        yield _rule(title, "-")
        for word in ("mean", "median", "p90", "p95", "p99"):
            yield _line(f"{word.capitalize()} {label} (ms):", figures[f"{word}_{name}_ms"])
    yield _rule("Attainment (of requests sent)", "-")
    yield _line("Requests sent:", metrics.sent)
    yield _line("TTFT attainment (%):", 100 * metrics.ttft_attainment)
    yield _line("TPOT attainment (%):", 100 * metrics.tpot_attainment)
    yield _line("Joint attainment (%):", 100 * metrics.joint_attainment)
    yield from (_line(f"  not answered, {word}:", count) for word, count in metrics.refusals.items())
    yield _rule("Machines", "-")
    yield _line("GPU-seconds:", figures["gpu_seconds"])
    yield _line("Memory, peak (MiB):", figures["memory_peak_bytes"] / (1 << 20))
    yield _line("Memory, mean (MiB):", figures["memory_mean_bytes"] / (1 << 20))
    yield _line("Switches:", figures["switches"])
    for label, key in (("Switch time", "switch_ms"), ("Cold start", "cold_start_ms")):
        if figures[key]:
            yield _line(f"{label}, median (ms):", figures[key]["p50"])
            yield _line(f"{label}, P99 (ms):", figures[key]["p99"])
    yield _line("Send lag, P99 (ms):", 1000 * found.ending.lag_p99_s)
    yield "=" * _COLUMNS


def model_table(found: Outcome) -> list[list[str]]:
    """A line per model, under a head."""
    rows = [["model", "sent", "answered", "TTFT %", "TPOT %", "joint %", "TTFT p50", "TTFT p99", "TPOT p50"]]
    for model, m in found.by_model.items():
        shares = [f"{100 * share:.1f}" for share in (m.ttft_attainment, m.tpot_attainment, m.joint_attainment)]
        times = [_ms(m.ttft.p50_s), _ms(m.ttft.p99_s), _ms(m.tpot.p50_s)]
        rows.append([model, str(m.sent), str(m.answered), *shares, *times])
    return rows


def too_late(found: Outcome) -> str:
    ending = found.ending
    return (
        f"{found.name}: no report: {ending.late:.1%} of the requests were sent more than 10 ms late (at most {MOST_LATE:.0%} "
        f"may be); p99 {1000 * ending.lag_p99_s:.1f} ms. This machine cannot make that load beside what else it does."
    )


def _ms(value_s: float | None) -> str:
    return "–" if value_s is None else f"{1000 * value_s:.1f} ms"


def _rule(title: str, character: str) -> str:
    return f"{title:{character}^{_COLUMNS}}"


def _line(label: str, value: object) -> str:
    return f"{label:<{_LABEL}} {value:<10.2f}" if isinstance(value, float) else f"{label:<{_LABEL}} {value!s:<10}"

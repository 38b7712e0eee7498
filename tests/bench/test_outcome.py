"""What a run is worth, in the peers' words and ours; and two runs against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chimera.bench import campaign, page, paired, promise
from chimera.bench.load import Ending
from chimera.bench.outcome import Outcome, banner, document, lists, model_table, outcome, read_outcome, too_late
from chimera.bench.record import Record, read_records, write_records
from chimera.bench.watch import Sample, Sighting, Stay, Switch
from chimera.core.gpu import Gpu
from chimera.core.metrics import measure
from chimera.core.model import Slo
from chimera.errors import ConfigError

VLLM = """duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput
total_token_throughput max_output_tokens_per_s max_concurrent_requests""".split()  # noqa: SIM905
VLLM_LISTS = "input_lens output_lens ttfts itls latencies start_times errors".split()  # noqa: SIM905
SGLANG = ("slo_attainment", "slo_attainment_by_metric", "goodput_slos_ms", "median_e2e_latency_ms", "concurrency")
OURS = ("switch_ms", "cold_start_ms", "gpu_seconds", "cost_per_1000_requests", "memory_peak_bytes", "memory_mean_bytes")
SLO = Slo(ttft_s=0.5, tpot_s=0.1)


def record(number: int, *, ttft_s: float | None = 0.1, gap_s: float = 0.01, model: str = "m", **more: Any) -> Record:
    sent_s = float(number)
    made = Record(
        request_id=f"r{number}", model=model, planned_s=sent_s, prompt_tokens=10, wanted_tokens=3, slo=SLO, sent_s=sent_s
    )
    if ttft_s is None:
        made.refusal = "queue_full"
    else:
        made.first_token_s, made.last_token_s = sent_s + ttft_s, sent_s + ttft_s + 2 * gap_s
        made.output_tokens, made.pieces_s, made.status = 3, [gap_s, gap_s], 200
    return msgspec.structs.replace(made, **more) if more else made


GPU = Gpu(gpu_id=0, capacity_bytes=1 << 30, page_bytes=1 << 20, name="g")
SIGHTING = Sighting(
    gpus=(GPU, msgspec.structs.replace(GPU, gpu_id=1)),
    samples=(
        Sample(at_s=0.0, held={0: {"m": 100}, 1: {"n": 50}}, kv={}),
        Sample(at_s=1.0, held={0: {"m": 300}, 1: {"n": 50}}, kv={}),
    ),
    switches=(Switch(at_s=2.0, model="n", gpu_ids=(1,), took_s=0.25, reason="asked for"),),
    stays=(Stay(model="m", gpu_ids=(0,), from_s=0.0, to_s=99.0), Stay(model="n", gpu_ids=(1,), from_s=2.0, to_s=99.0)),
)


def ending(records: list[Record], **more: Any) -> Ending:
    return Ending(planned=len(records), sent=sum(r.sent_s is not None for r in records), wall_s=10.0, **more)


def made(records: list[Record], name: str = "run", **more: Any) -> Outcome:
    return outcome(name, records, ending(records, **more), SIGHTING, {"machine": "x"}, gpu_price=2.0)


RECORDS = [record(0), record(1, ttft_s=0.9), record(2, gap_s=0.2), record(3, ttft_s=None), record(4, model="n", ttft_s=0.3)]


def test_every_key_of_the_peers_is_there() -> None:
    told = document(made(RECORDS)) | lists(RECORDS)
    spreads = [
        f"{s}_{m}_ms" for s in ("mean", "median", "std", "p50", "p90", "p95", "p99") for m in ("ttft", "tpot", "itl", "e2el")
    ]
    assert not {*VLLM, *VLLM_LISTS, *SGLANG, *OURS, *spreads} - set(told)
    assert json.loads(json.dumps(told))["completed"] == 4
    assert len({len(told[key]) for key in VLLM_LISTS}) == 1


def test_attainment_is_of_the_requests_that_were_sent() -> None:
    found = made(RECORDS)
    m = found.metrics
    assert (m.sent, m.answered) == (5, 4)
    assert (m.ttft_attainment, m.tpot_attainment, m.joint_attainment) == (0.6, 0.6, 0.4)
    assert found.figures["slo_attainment"] == 0.4 and found.figures["goodput_slos_ms"] == {"ttft": 500.0, "tpot": 100.0}
    unsent = record(5)
    unsent.sent_s = None
    assert made([*RECORDS, unsent]).metrics == m, "what was never sent counts for nothing"


def test_the_words_are_those_of_the_simulator() -> None:
    told = [story for r in RECORDS if (story := r.story) is not None]
    assert made(RECORDS).metrics == measure(told)


def test_machines_switches_and_cold_starts() -> None:
    figures = made([record(1, model="n", ttft_s=1.5), *RECORDS]).figures
    assert figures["gpu_seconds"] == 2 * 4.0
    assert figures["gpu_hours_per_1000_requests"] == pytest.approx(8 / 3600 / 5 * 1000)
    assert figures["cost_per_1000_requests"] == pytest.approx(2 * 8 / 3600 / 5 * 1000)
    assert (figures["memory_peak_bytes"], figures["memory_mean_bytes"]) == (350, 250)
    assert (figures["switches"], figures["switch_ms"]["p50"]) == (1, 250.0)
    assert (figures["cold_starts"], figures["cold_start_ms"]["p50"]) == (1, 1500.0), "n was down when it was asked at 1 s"


def test_the_banner_is_laid_out_as_the_peers_is() -> None:
    text = banner(made(RECORDS, partial="gone after 3 s"), rate="2")
    lines = text.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============" and len(lines[0]) == 50 == len(lines[-1])
    assert f"{'Successful requests:':<40} 4         " in lines
    assert any(line.startswith(f"{'Median TTFT (ms):':<40} ") for line in lines)
    assert "PARTIAL: gone after 3 s" in lines
    assert [row[0] for row in model_table(made(RECORDS))] == ["model", "m", "n"]


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = made(RECORDS, lag_p99_s=0.002)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document(found)))
    assert read_outcome(path) == found
    write_records(tmp_path / "run.jsonl", RECORDS)
    assert read_records(tmp_path / "run.jsonl") == RECORDS
    assert list(campaign.results_in([tmp_path])) == [path]
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no result"):
        read_outcome(path)


def test_a_load_that_was_not_made_is_no_result() -> None:
    assert made(RECORDS, late=0.05).valid
    late = made(RECORDS, late=0.06)
    assert not late.valid and "6.0%" in too_late(late)


# Compared.


def test_a_difference_is_paired_and_its_interval_is_honest() -> None:
    better = [record(n) for n in range(200)]
    worse = [record(n, ttft_s=0.9 if n % 4 == 0 else 0.1) for n in range(200)]
    gap = paired.difference(better, worse, paired.MEASURES["ttft"])
    assert gap.value == pytest.approx(0.25) and 0.15 < gap.low <= 0.25 <= gap.high < 0.35 and gap.sure
    same = paired.difference(better, better, paired.MEASURES["joint"])
    assert (same.value, same.low, same.high, same.sure) == (0.0, 0.0, 0.0, False)
    assert paired.difference(better, worse, paired.MEASURES["ttft"]) == gap, "the same seed draws the same"


def test_requests_that_fail_together_make_a_wide_interval() -> None:
    scattered = [record(n, ttft_s=0.9 if n % 10 == 0 else 0.1) for n in range(240)]
    together = [record(n, ttft_s=0.9 if 100 <= n < 124 else 0.1) for n in range(240)]
    narrow, wide = (paired.attainment(r, paired.MEASURES["ttft"]) for r in (scattered, together))
    assert narrow.value == pytest.approx(wide.value) and wide.high - wide.low > 2 * (narrow.high - narrow.low)


# Promised.


def test_flags_win_over_the_placement_and_a_calibration_over_both_is_scaled() -> None:
    placed = {"m": Slo(ttft_s=1.0, tpot_s=0.1)}
    assert promise.promised(["m", "n"], placed)["n"] == Slo()
    assert promise.promised(["m"], placed, ttft_ms=200)["m"] == Slo(ttft_s=0.2, tpot_s=0.1)
    measured = promise.calibrated([record(n, ttft_s=0.1 + n / 1000) for n in range(100)])
    assert measured["m"].ttft_s == pytest.approx(0.194)
    scaled = promise.promised(["m"], placed, measured=measured, ttft_scale=5, tpot_scale=2)["m"]
    assert scaled.ttft_s == pytest.approx(0.97) and scaled.tpot_s == pytest.approx(0.02)


@pytest.mark.parametrize("wrong", [{"ttft_ms": 0.0}, {"tpot_ms": -1.0}, {"ttft_scale": 0.0}, {"ttft_ms": float("nan")}])
def test_a_promise_of_nothing_is_a_mistake(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="above zero"):
        promise.promised(["m"], {}, **wrong)  # type: ignore[arg-type]


# Shown.


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    runs = [(made(RECORDS, "one <b>"), RECORDS), (made(RECORDS[:3], "two", partial="stopped"), RECORDS[:3])]
    written = page.write(tmp_path, "Title & more", runs)
    html = written[0].read_text()
    assert "Title &amp; more" in html and "one &lt;b&gt;" in html and "<b>two is partial:</b>" in html
    links = html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not [word for word in ("http", "<script", "<link", "<img", "@import", "url(") if word in links]
    assert html.count("<svg") == len(written[1:]) + 1  # and the legend of models
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in written[1:])
    names = {path.name for path in written}
    assert {"attainment.png", "ttft.png", "tpot.png", "memory-two-gpu0.png", "switches-two.png"} <= names
    assert "m held" not in html and "memory of each model on GPU 0" in html


def test_runs_at_several_rates_make_a_curve(tmp_path: Path) -> None:
    runs = []
    for scale in (1.0, 2.0):
        records = [record(n, sent_s=n / scale) for n in range(20)]
        found = made(records, f"rate-{scale}")
        runs.append((msgspec.structs.replace(found, facts={"rate_scale": scale, "policy": "p"}), records))
    assert "attainment-by-rate.png" in {path.name for path in page.write(tmp_path, "t", runs)}

"""What the scripts of benchmark/sim make of traces and of runs that were made before."""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from chimera.config.cost_tables import read_cost_table
from chimera.core.metrics import Story
from chimera.core.model import Slo
from chimera.sched.cost import CostTable, Factors
from chimera.sim.placing import gpus_of
from chimera.sim.run import Scenario, simulate
from chimera.trace.trace import Row, Trace

from benchmark import report
from benchmark.sim import elsewhere, fit, policies, reality
from benchmark.sim.bench import Cell
from benchmark.sim.calibration import Calibration
from tests.sched.builders import costs, model

CELL = Cell(trace="told", from_s=0, to_s=10, models="8", gpus=2, level="80%", rate=1.0)


def test_a_run_that_was_kept_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def replay(cell: Cell, ready: object, table: object, policy: str, local: str | None, seed: int) -> SimpleNamespace:
        made.append(seed)
        return SimpleNamespace(metrics=SimpleNamespace(joint_attainment=seed / 10))

    monkeypatch.setattr(policies, "replay", replay)
    file = tmp_path / "kept.jsonl"
    for _ in range(2):  # the second time by another process
        kept = policies._Kept(file)
        assert [kept.joint(CELL, ((), Trace("told", ())), costs(), "static+goodput", seed) for seed in (1, 2)] == [0.1, 0.2]
    assert made == [1, 2]


def test_losses_elsewhere_are_counted_load_by_load() -> None:
    figures = report.Figures("told")
    elsewhere._verdict(figures, {"static": [0.5, 0.9, 0.4], "kvpr": [0.2, 0.3, 0.8], "flexible": [0.495, 0.95, 0.6]})
    told = {figure.name: figure.value for figure in figures.figures}
    assert told["loads where ours is within 1 % of the best of the others"] == 2
    assert told["the most by which another was better"] == pytest.approx(20.0)
    assert told["ours over the best of the others, over all loads"] == pytest.approx(100 * (2.045 - 1.8) / 3)


def test_another_seed_draws_other_loads_and_the_same_seed_the_same() -> None:
    def made(seed: int) -> Trace:
        return elsewhere._made(random.Random(seed), ["a", "b"])[1]

    assert made(1) == made(1) != made(2)


def test_a_trace_for_real_engines_fits_their_contexts_and_their_time() -> None:
    table = costs()
    models = tuple(msgspec.structs.replace(model(name), slo=Slo()) for name in "ab")
    trace = Trace("told", tuple(Row(n * 0.1, "xy"[n % 2], 100 + n * 20, 50 + n) for n in range(200)))
    words = argparse.Namespace(busy=0.5, seconds=20.0, seed=1)
    promising, scaled = reality._scaled(models, trace, table, words)
    assert {row.model for row in scaled.rows} == {"a", "b"}
    assert max(row.prompt_tokens + row.output_tokens for row in scaled.rows) <= reality.LONGEST
    work_s = sum(table.of(models[0]).request_s(row.prompt_tokens, row.output_tokens, 2.0) for row in scaled.rows)
    assert work_s == pytest.approx(0.5 * 20, rel=0.1)
    assert all(m.slo.ttft_s and m.slo.tpot_s for m in promising)


def test_where_both_sides_keep_all_promises_tighter_ones_are_compared() -> None:
    def told(ttft_s: float, number: int) -> Story:
        slo = Slo(ttft_s=1.0, tpot_s=1.0)
        return Story(
            request_id=str(number),
            model="a",
            sent_s=0.0,
            prompt_tokens=1,
            output_tokens=2,
            slo=slo,
            first_token_s=ttft_s,
            last_token_s=ttft_s + 0.01,
        )

    real = [told(0.01 * number, number) for number in range(1, 11)]
    slower = [told(0.02 * number, number) for number in range(1, 11)]
    figures = report.Figures("told")
    reality._tightened(figures, "a", real, slower)
    assert [figure.value for figure in figures.figures] == pytest.approx([90.0, 40.0, 100 * 5 / 9])


def test_a_calibration_finds_what_a_server_on_paper_costs() -> None:
    """The paper's own server is asked, so what it costs is known to the digit."""
    models = tuple(msgspec.structs.replace(model(name), slo=Slo(), weight_bytes=10**7) for name in "ab")
    shipped = msgspec.json.decode(read_cost_table("cpu-2-cores"), type=CostTable)
    true = msgspec.structs.replace(shipped, refined={"b": Factors(decode=1.5, prefill=1.25)})
    scenario = Scenario(models=models, gpus=gpus_of(2, true.gpu_bytes), costs=true, policy="static", local="fcfs")

    async def server(trace: Trace, concurrency: int | None) -> list[Story]:
        rows = trace.rows
        if trace.source == "one by one":  # each long after the one before it, as the clock of a slow machine has it
            rows = tuple(msgspec.structs.replace(row, at_s=5.0 * n) for n, row in enumerate(rows))
        told: list[Story] = []
        simulate(scenario, Trace(trace.source, rows), keep=told.extend)
        return sorted(told, key=lambda story: int(story.request_id))

    calibration = Calibration(models, server, longest=600)
    asyncio.run(calibration.ask(random.Random(1)))
    found = calibration.table()
    for spec in models:
        for tokens in (20, 150, 500):
            expected_s = true.request_s + true.of(spec).prompt_s(tokens)
            assert found.request_s + found.of(spec).prompt_s(tokens) == pytest.approx(expected_s, rel=0.05)
        for batch in (1, 4):
            assert found.of(spec).decode_s(batch, batch * 40) == pytest.approx(
                true.of(spec).decode_s(batch, batch * 40), rel=0.1
            )


def test_a_fit_without_curvature_is_a_line() -> None:
    """A parabola that bends down has a slope too steep for prompts of any length."""
    bent = [(tokens, 0.02 + 1e-4 * tokens - 6e-8 * tokens**2) for tokens in range(10, 600, 10)]
    spec = {"name": "a", "weight_bytes": 10**7, "kv_bytes_per_token": 1024}
    base = msgspec.json.decode(read_cost_table("cpu-2-cores"))
    table = msgspec.convert(fit.fitted(spec, base, bent, [(1, 0.005), (8, 0.012)]), type=CostTable)
    cost = table.plain(msgspec.structs.replace(model("a"), weight_bytes=10**7))
    wrong_s = [table.request_s + cost.prompt_s(tokens) - s for tokens, s in bent]
    assert sum(wrong_s) / len(wrong_s) == pytest.approx(0.0, abs=1e-4)
    assert max(map(abs, wrong_s)) < 0.005

"""What the scripts of benchmark/sim make of traces and of runs that were made before."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from chimera.core.model import Slo
from chimera.trace.trace import Row, Trace

from benchmark.sim import policies, reality
from benchmark.sim.bench import Cell
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

"""Tenants made of recorded clients: as many requests as were asked for, whose they are by chance, and the same by seed."""

from __future__ import annotations

import gzip
import itertools
from collections import Counter
from pathlib import Path

import pytest
from chimera.config.cost_tables import read_cost_table
from chimera.sched.cost import CostTable
from chimera.trace.trace import Row
from msgspec import json

from benchmark.sim.tenants import MIX, Tenants, tenants

WINDOWS = range(0, 86_400, 600)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients, one ten times as busy as the next, who are silent every other hour; and two kinds of lengths."""
    folder = tmp_path_factory.mktemp("traces")
    counts = [
        f"{window},f,{client},{10**client * 50},{1.5 * client}"
        for client in (1, 2, 3)
        for window in WINDOWS
        if window // 3600 % 2 == 0
    ]
    _write(folder / "servegen_activity_days0-6.csv.gz", ["window_start_s,source_family,source_client,requests,iat_cv", *counts])
    lengths = [f"{n},{'ab'[n % 2]},{100 + n % 2 * 900},{10 + n % 2 * 90}" for n in range(100)]
    _write(folder / "servegen_18tenants_day.csv.gz", ["timestamp,model,prompt_tokens,output_tokens", *lengths])
    return folder


def _write(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")


def made(traces: Path, seed: int = 1, count: int = 58, seconds: float = 1800.0) -> Tenants:
    costs = json.decode(read_cost_table("h100-80g-like"), type=CostTable)
    return tenants(traces, models=count, rate=10.0, seconds=seconds, costs=costs, slo_scale=5.0, seed=seed)


def test_the_whole_comes_to_the_rate_and_in_order(traces: Path) -> None:
    load = made(traces)
    rows = list(load.rows())
    assert len(rows) == len(load) == pytest.approx(18_000, rel=0.05)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(rows)) and rows[-1].at_s < 1800
    assert {(row.prompt_tokens, row.output_tokens) for row in rows} == {(100, 10), (1000, 100)}


def test_few_are_asked_for_much_and_one_tenants_requests_are_alike(traces: Path) -> None:
    rows = list(made(traces).rows())
    by_model = Counter(row.model for row in rows)
    busiest = by_model.most_common(10)
    assert sum(count for _, count in busiest) > 0.5 * len(rows)
    assert all(len({row.prompt_tokens for row in rows if row.model == name}) == 1 for name, _ in busiest)


def test_models_are_mixed_as_prisms_58_and_promise_something(traces: Path) -> None:
    load = made(traces)
    assert Counter(model.name.partition("-")[2] for model in load.models) == {size.name: size.share for size in MIX}
    assert all(model.slo.ttft_s and model.slo.tpot_s for model in load.models)


def test_the_same_seed_makes_the_same_rows_and_another_makes_others(traces: Path) -> None:
    def first(seed: int) -> list[Row]:
        return list(itertools.islice(made(traces, seed).rows(), 200))

    assert first(1) == first(1) != first(2)

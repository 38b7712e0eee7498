"""Traces: what is read, what is refused and where, and what can be made of one."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from chimera.errors import ConfigError
from chimera.trace.reader import read_trace
from chimera.trace.trace import Row, Trace, names_for

HEADER = "timestamp,model,prompt_tokens,output_tokens\n"
SHIPPED = Path(os.environ.get("CHIMERA_TRACES", Path(__file__).parents[2] / "../shared/traces"))


def written(tmp_path: Path, text: str, *, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_trace_is_read_plain_or_gzipped(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, HEADER + "0.5,a,10,20\n\n1.5,b,1,1\n", name=name)
    assert read_trace(path).rows == (Row(0.5, "a", 10, 20), Row(1.5, "b", 1, 1))


def test_columns_may_stand_in_any_order_among_others(tmp_path: Path) -> None:
    path = written(tmp_path, "model,x,output_tokens,timestamp,prompt_tokens\na,?,2,0,1\n")
    assert read_trace(path).rows == (Row(0.0, "a", 1, 2),)


def test_azures_own_columns_are_read_from_zero(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,10,1\n"
    trace = read_trace(written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows, name="code.csv"))
    assert trace.rows == (Row(0.0, "code", 374, 44), Row(1.0, "code", 10, 1))


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        ("1,a,1,1\n0,a,1,1\n", 3, "order of time"),
        ("0,a,-5,1\n", 2, "prompt_tokens is -5"),
        ("0,a,1,0\n", 2, "output_tokens is 0"),
        ("0,a,1,99999999\n", 2, "output_tokens is 99999999"),
        ("0,a,many,1\n", 2, "'many'"),
        ("0,,1,1\n", 2, "names no model"),
        ("soon,a,1,1\n", 2, "'soon'"),
        ("nan,a,1,1\n", 2, "no moment"),
        ("-1,a,1,1\n", 2, "no moment"),
        ("0,a,1\n", 2, "3 cells"),
    ],
)
def test_a_fault_names_its_line(tmp_path: Path, rows: str, line: int, words: str) -> None:
    path = written(tmp_path, HEADER + rows)
    with pytest.raises(ConfigError) as fault:
        read_trace(path)
    assert f"{path}: line {line}" in str(fault.value)
    assert words in str(fault.value)


@pytest.mark.parametrize("text", ["", "window_start_s,source_family,requests\n0,m,1\n"])
def test_other_columns_are_refused_with_those_that_are_needed(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="needed are timestamp, model"):
        read_trace(written(tmp_path, text))


def test_a_file_that_is_cut_short_or_missing_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(HEADER.encode() * 100)[:30])
    with pytest.raises(ConfigError, match=r"t\.csv\.gz"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")


TRACE = Trace("t", tuple(Row(float(n), "ab"[n % 2], 10, 10) for n in range(100)))


def test_a_cut_begins_at_zero() -> None:
    cut = TRACE.cut(10, 20)
    assert [row.at_s for row in cut.rows] == [float(n) for n in range(10)]


def test_a_rate_scale_keeps_the_length_and_multiplies_the_requests() -> None:
    scaled = TRACE.rate_scaled(2.5, seed=7)
    assert 230 <= len(scaled.rows) <= 270
    assert scaled.rows == TRACE.rate_scaled(2.5, seed=7).rows != TRACE.rate_scaled(2.5, seed=8).rows
    assert [row.at_s for row in scaled.rows] == sorted(row.at_s for row in scaled.rows)
    assert scaled.rows[0].at_s >= 0 and scaled.rows[-1].at_s <= 99.0
    assert TRACE.rate_scaled(1, seed=1) is TRACE


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_has_to_be_above_zero(scale: float) -> None:
    with pytest.raises(ConfigError, match="above zero"):
        TRACE.rate_scaled(scale, seed=1)
    with pytest.raises(ConfigError, match="above zero"):
        TRACE.time_scaled(scale)


def test_models_are_mapped_as_told_then_by_name_then_by_order() -> None:
    trace = Trace("t", tuple(Row(0.0, name, 1, 1) for name in ("x", "y", "z", "llama")))
    assert names_for(trace, ["llama", "qwen", "gemma"], {"z": "qwen"}) == {
        "llama": "llama",
        "x": "gemma",
        "y": "gemma",
        "z": "qwen",
    }
    assert trace.renamed({"x": "q", "y": "q", "z": "q", "llama": "q"}).models == ("q",)


@pytest.mark.parametrize("wanted", [{"nobody": "llama"}, {"x": "nobody"}])
def test_a_mapping_of_unknown_models_is_refused(wanted: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="nobody"):
        names_for(Trace("t", (Row(0.0, "x", 1, 1),)), ["llama"], wanted)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the development traces are not beside the project")
def test_a_shipped_trace_is_read_whole() -> None:
    trace = read_trace(SHIPPED / "arena_prism18.csv.gz")
    assert (len(trace.rows), len(trace.models)) == (2059, 18)


def test_another_day_has_as_many_requests_on_average_and_none_far_from_its_original() -> None:
    steady = Trace("told", tuple(Row(n * 1.0, "a", 10, n + 1) for n in range(2000)))
    days = [steady.another_day(1.5, seed) for seed in (1, 2)]
    assert days[0].rows == steady.another_day(1.5, 1).rows != days[1].rows
    for day in days:
        assert len(day.rows) == pytest.approx(3000, rel=0.06)
        assert [row.at_s for row in day.rows] == sorted(row.at_s for row in day.rows)
        assert all(abs(row.at_s - (row.output_tokens - 1)) <= 5 for row in day.rows)
        copies = [sum(row.output_tokens == n for row in day.rows) for n in range(1, 401)]
        assert copies.count(0) == pytest.approx(400 * 0.223, rel=0.25), "e^-1.5 of the requests do not come"


def test_draws_in_succession_follow_each_other_and_share_the_chances_of_each_request() -> None:
    steady = Trace("told", tuple(Row(n * 1.0, "a", 10, n + 1) for n in range(500)))
    assert steady.period_s == 500
    day = steady.another_day(1.5, 1, 20)
    assert len(day.rows) == pytest.approx(20 * 750, rel=0.005), "alone, each draw differs by a few percent from the next"
    for row in day.rows:
        assert abs(row.at_s % 500 - (row.output_tokens - 1)) <= 5
    copies = [[0] * 500 for _ in range(20)]
    for row in day.rows:
        copies[int(row.at_s // 500)][row.output_tokens - 1] += 1
    none = sum(draw.count(0) for draw in copies)
    assert none == pytest.approx(10_000 * 0.223, rel=0.05), "e^-1.5 of the requests do not come"
    of_each = [sum(draw[n] for draw in copies) for n in range(500)]
    assert min(of_each) > 22 and max(of_each) < 38, "thirty, and by free draws between 15 and 48"

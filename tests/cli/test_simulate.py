"""`chimera simulate` from its command line: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chimera.bench import chart
from chimera.cli import played
from chimera.cli.main import main
from chimera.core.metrics import Story
from chimera.core.model import Slo
from PIL import Image, ImageColor

MODELS = [
    {"model_name": name, "weight_bytes": 2_000_000_000, "kv_bytes_per_token": 32768, "slo": {"ttft_ms": 200, "tpot_ms": 30}}
    for name in ("small", "other")
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "models.json").write_text(json.dumps(MODELS))
    rows = "".join(f"{n * 0.1:.1f},{'xy'[n % 2]},{50 + n},{10 + n}\n" for n in range(50))
    (tmp_path / "trace.csv").write_text("timestamp,model,prompt_tokens,output_tokens\n" + rows)
    return tmp_path


def simulate(files: Path, *words: str) -> int:
    inputs = ["--models", str(files / "models.json"), "--trace", str(files / "trace.csv"), "--gpus", "2xH100", "--quiet"]
    return main(["simulate", *inputs, *words])


def test_a_table_a_line_a_policy_and_who_stands_for_whom(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(files, "--policy", "static,flexible", "--seeds", "2", "--rate-scale", "1.5") == 0
    told = capsys.readouterr().out
    assert "x of the trace is replayed on small\ny of the trace is replayed on other" in told
    assert "50 requests over 5 s, 2 models, 2 GPUs" in told
    assert [line.split()[0] for line in told.splitlines()[-2:]] == ["static", "flexible"]


def test_what_is_written_says_the_same_as_the_table(files: Path) -> None:
    written = {flag: files / f"out{flag}" for flag in ("--json", "--csv", "--log", "--chrome-trace")}
    words = [word for flag, path in written.items() for word in (flag, str(path))]
    assert simulate(files, "--policy", "static", "--map", "x=small", *words) == 0
    (outcome,) = json.loads(written["--json"].read_text())["static"]
    assert outcome["metrics"]["sent"] == outcome["metrics"]["answered"] == 50
    assert len(written["--csv"].read_text().splitlines()) == 51
    assert {json.loads(line)["what"] for line in written["--log"].read_text().splitlines()} >= {"activate", "serves"}
    assert json.loads(written["--chrome-trace"].read_text())["traceEvents"]


def test_the_page_of_plots_has_a_bar_for_each_policy_and_a_row_for_each_model(files: Path) -> None:
    assert simulate(files, "--policy", "static,flexible", "--seeds", "2", "--plots", str(files / "p.png")) == 0
    with Image.open(files / "p.png") as picture:
        assert picture.size == (2 * played.WIDTH, 2 * played.HEIGHT)
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    hues = chart.colors([model["model_name"] for model in MODELS])
    assert {ImageColor.getrgb(hue) for hue in (*hues.values(), *chart.RUNS[:2])} <= colours


def test_what_is_kept_over_time_is_told_of_those_sent_then() -> None:
    slo = Slo(ttft_s=1.0)
    told = [
        Story(request_id=str(n), model="a", sent_s=n, prompt_tokens=1, output_tokens=1, slo=slo, **seen)
        for n, seen in ((0.0, {"first_token_s": 0.5, "last_token_s": 0.5}), (0.1, {}), (24.0, {}))
    ]
    assert played._by_time(told, 24.0) == ((0.5, 50.0), (23.5, 0.0))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plots", "p.pdf"], "does not end in .png"),
        (["--plots", "no/folder/p.png"], "there is no folder no/folder"),
        (["--json", "no/folder/p.json"], "there is no folder no/folder"),
        (["--chrome-trace", "no/folder/p.json"], "--chrome-trace: there is no folder no/folder"),
        (["--policy", "wishful"], "there is no policy 'wishful'"),
        (["--gpus", "0xH100"], "0 GPUs"),
        (["--gpus", "2xAbacus"], "no such cost table"),
        (["--map", "x"], "'x' is not TRACE=MODEL"),
        (["--map", "z=small"], "has no model 'z'"),
        (["--rate-scale", "0"], "above zero"),
        (["--slo-scale", "-1"], "above zero"),
        (["--from", "90"], "no request between"),
        (["--seeds", "0"], "0 runs are none"),
    ],
)
def test_a_mistake_is_answered_by_its_name(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert simulate(files, *words) == 1
    assert told in capsys.readouterr().err


def test_a_model_that_fits_nowhere_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "models.json").write_text(json.dumps([{**MODELS[0], "model_name": "whale", "weight_bytes": 10**12}]))
    assert simulate(files) == 1
    assert "whale fits on none of the 2 GPUs" in capsys.readouterr().err


def test_a_promise_of_nothing_is_an_error_that_names_its_model(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "models.json").write_text(json.dumps([MODELS[0], {**MODELS[1], "slo": {"ttft_ms": 0, "tpot_ms": 30}}]))
    assert simulate(files) == 1
    told = capsys.readouterr().err
    assert "other" in told or "models[1]" in told or "[1]" in told
    assert "[1].slo.ttft_ms" in told


@pytest.mark.parametrize("row", ["0,x,10,10", "9,x,-1,10", "9,x,10,99999999", "9,,10,10"])
def test_a_fault_in_the_trace_is_told_with_its_line(files: Path, capsys: pytest.CaptureFixture[str], row: str) -> None:
    with (files / "trace.csv").open("a") as trace:
        trace.write(row + "\n")
    assert simulate(files) == 1
    assert "trace.csv: line 52" in capsys.readouterr().err


def test_a_request_goes_to_no_model_that_the_operator_did_not_name(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(files, "--map", "x=nobody") == 1
    assert "nobody" in capsys.readouterr().err

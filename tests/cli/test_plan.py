"""`chimera plan` from its command line: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chimera.bench import chart
from chimera.cli.main import main
from chimera.sizing import load, page
from PIL import Image, ImageColor

SLO = {"ttft_ms": 200, "tpot_ms": 40}
MODELS: list[dict[str, Any]] = [
    {"model_name": name, "weight_bytes": 30_000_000_000, "kv_bytes_per_token": 32768, "slo": SLO}
    for name in ("one", "two", "six")
]


@pytest.fixture(autouse=True)
def _a_day_is_the_trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "REQUESTS", 90)
    monkeypatch.setattr(load, "LONGEST", 1)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "models.json").write_text(json.dumps(MODELS))
    rows = "".join(f"{n * 0.1:.1f},{('one', 'two', 'six')[n % 3]},{50 + n},{10 + n % 20}\n" for n in range(90))
    (tmp_path / "trace.csv").write_text("timestamp,model,prompt_tokens,output_tokens\n" + rows)
    return tmp_path


def plan(files: Path, *words: str) -> int:
    inputs = ["--models", str(files / "models.json"), "--trace", str(files / "trace.csv"), "--quiet"]
    return main(["plan", *inputs, "--days", "3", *words])


def planned(files: Path, *words: str) -> list[dict[str, Any]]:
    plan(files, "--json", str(files / "plan.json"), *words)
    answers: list[dict[str, Any]] = json.loads((files / "plan.json").read_text())
    return answers


def test_a_line_for_each_question_the_plain_one_first(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, more, another = planned(
        files, "--rate-scale", "1,8", "--add", "two", "--gpu-hour-price", "3.6", "--policy", "flexible,static"
    )
    told = capsys.readouterr().out
    assert [line.split("  ")[0] for line in told.splitlines() if "×" in line][:3] == [
        "×1 on H100",
        "×8 on H100",
        "×1, one more two",
    ]
    assert plain["enough"] and plain["worst"] >= 0.99
    assert more["gpus"] > plain["gpus"], "eight times the load needs more"
    assert set(another["tp_sizes"]) == {"one", "two", "six", "two-more"}
    assert plain["cost_per_1000"] == pytest.approx(plain["gpu_s_per_1000"] / 1000)
    assert "where models stand at first (×1 on H100)" in told


def test_static_needs_room_for_all_and_one_gpu_fewer_misses(files: Path) -> None:
    (answer,) = planned(files, "--policy", "static", "--slo-scale", "5")
    assert (answer["gpus"], answer["policy"]) == (2, "static"), "two of 30 GB share one GPU of 76 GB, and three do not"
    assert answer["fewer"] == {"gpus": 1, "missed_days": 3}


def test_what_breaks_first_is_named_with_its_want(files: Path) -> None:
    (answer,) = planned(files, "--policy", "static", "--slo-scale", "5")
    broken = answer["breaks"]
    assert broken["rate"] == pytest.approx(answer["carries"] * 1.1)
    assert broken["kept"] < 0.99
    twice = {"memory": broken["kept_with_twice_the_memory"], "compute": broken["kept_with_twice_the_speed"]}
    assert twice[broken["short_of"]] == max(twice.values()) > broken["kept"]


@pytest.mark.parametrize(
    ("weight_bytes", "kv_bytes", "short_of"), [(30_000_000_000, 32_768, "compute"), (70_000_000_000, 15_000_000, "memory")]
)
def test_the_want_is_memory_where_weights_leave_no_room_for_caches(
    files: Path, weight_bytes: int, kv_bytes: int, short_of: str
) -> None:
    model = {**MODELS[0], "weight_bytes": weight_bytes, "kv_bytes_per_token": kv_bytes}
    (files / "models.json").write_text(json.dumps([model]))
    (answer,) = planned(files, "--policy", "static", "--slo-scale", "3")
    assert answer["breaks"]["short_of"] == short_of


def test_promises_that_nobody_can_keep_are_said_and_end_with_one(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hasty = [{**MODELS[0], "slo": {"ttft_ms": 200, "tpot_ms": 1}}, *MODELS[1:]]
    (files / "models.json").write_text(json.dumps(hasty))
    assert plan(files, "--most", "4") == 1
    told = capsys.readouterr().out
    assert "not even 4 GPUs keep 99 %" in told
    assert "one: TPOT" in told


def test_a_large_model_is_split_over_as_many_gpus_as_hold_it(files: Path) -> None:
    (files / "models.json").write_text(json.dumps([{**MODELS[0], "weight_bytes": 140_000_000_000, "slo": {}}, *MODELS[1:]]))
    (answer,) = planned(files, "--slo-scale", "5")
    assert answer["tp_sizes"] == {"one": 2, "two": 1, "six": 1}
    assert answer["enough"]


def test_a_promise_too_short_for_one_gpu_splits_the_model(files: Path) -> None:
    quick = [{**MODELS[0], "slo": {"ttft_ms": 200, "tpot_ms": 12}}, *MODELS[1:]]
    (files / "models.json").write_text(json.dumps(quick))
    (answer,) = planned(files, "--most", "8")
    assert answer["tp_sizes"]["one"] == 4, "two GPUs would take 3.5 + 6.9 + 2 ms for a token, and four take 9"


def test_models_on_paper_need_a_checkpoint_for_a_placement_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(files, "--placement", str(files / "out.json")) == 1
    assert "one has no model_path" in capsys.readouterr().err
    assert not (files / "out.json").exists()


def test_the_page_of_plots_is_a_picture_of_the_first_line(files: Path) -> None:
    (answer, _) = planned(
        files, "--policy", "static", "--slo-scale", "5", "--rate-scale", "1,2", "--plots", str(files / "p.png")
    )
    with Image.open(files / "p.png") as picture:
        assert picture.size == (2 * page.WIDTH, 2 * page.HEIGHT)
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    hues = chart.colors([model["model_name"] for model in MODELS])
    assert answer["gpus"] == 2
    assert {ImageColor.getrgb(hue) for hue in hues.values()} <= colours, "each model has its bar"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--target", "0%"], "above 0 % and up to 100 %"),
        (["--target", "101%"], "above 0 % and up to 100 %"),
        (["--target", "most"], "'most' is no percentage"),
        (["--gpu", "H200"], "no such cost table"),
        (["--gpu", ""], "no such cost table"),
        (["--gpu", "H100,"], "no such cost table"),
        (["--slo-scale", "inf"], "it is inf"),
        (["--policy", "wishful"], "there is no policy 'wishful'"),
        (["--rate-scale", "1,0"], "above zero"),
        (["--rate-scale", "1,much"], "'much' is no number"),
        (["--slo-scale", "0"], "above zero"),
        (["--from", "90"], "no request between"),
        (["--add", "nobody"], "there is no model 'nobody'"),
        (["--days", "0"], "1 to 1000 are possible"),
        (["--most", "0"], "1 to 1024 are possible"),
        (["--gpu-hour-price", "-1"], "above zero"),
        (["--plots", "plan.pdf"], "does not end in .png"),
        (["--json", "no/folder/plan.json"], "there is no folder no/folder"),
        (["--placement", "no/folder/plan.json"], "there is no folder no/folder"),
        (["--plots", "no/folder/plan.png"], "there is no folder no/folder"),
        (["--map", "x"], "'x' is not TRACE=MODEL"),
    ],
)
def test_a_mistake_is_answered_by_its_name(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert plan(files, *words) == 1
    assert told in capsys.readouterr().err


def test_a_model_that_fits_nowhere_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "models.json").write_text(json.dumps([{**MODELS[0], "model_name": "whale", "weight_bytes": 10**12}]))
    assert plan(files) == 1
    assert "whale fits on no GPU of 76 GB, even over 8 of them" in capsys.readouterr().err


def test_a_trace_without_requests_is_an_error(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "trace.csv").write_text("timestamp,model,prompt_tokens,output_tokens\n")
    assert plan(files) == 1
    assert "trace.csv" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "share"), [("99%", 0.99), ("99", 0.99), ("0.99", 0.99), ("99.9 %", 0.999), ("100%", 1.0)])
def test_a_target_is_written_as_one_likes(files: Path, target: str, share: float) -> None:
    (answer,) = planned(files, "--target", target, "--policy", "static")
    assert answer["target"] == pytest.approx(share)

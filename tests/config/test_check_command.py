"""`chimera check`: what an operator and a program see of a good and of a bad file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chimera.cli.main import main
from chimera.config.placement_file import json_schema

Write = Callable[..., Path]
# Two halves of 128 rows, two layers of attention, MLP and norms, one last norm; two bytes each.
WEIGHT_BYTES = 2 * (2 * 128 * 64 + 2 * (12 * 1024 + 24 * 1024 + 2 * 64) + 64)
BAD = [{"model_name": "a", "model_pth": "b", "tp_size": 0, "init_placements": [{"gpu_ids": [9]}]}]


def test_a_bad_file_has_a_line_for_each_fault(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(BAD)
    assert main(["check", str(path), "--gpus", "1x1GiB"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        f"{path}: [0].model_pth: unknown key (did you mean model_path?)",
        f"{path}: [0].model_path: is missing (it is text)",
        f"{path}: [0].tp_size: 0 is less than 1",
        f"{path}: [0].init_placements[0].gpu_ids[0]: there is no GPU 9 (there are 0)",
    ]


def test_a_program_gets_the_same_faults(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(write(BAD)), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    first = {"where": "[0].model_pth", "what": "unknown key", "hint": "did you mean model_path?"}
    assert report["faults"][0] == first


def test_a_good_file_has_a_page(write: Write, make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama")
    seats = [{"gpu_ids": [0], "max_memory_pool_size": 0.1}, {"gpu_ids": [1], "on": False}]
    hub = {"model_name": "b", "model_path": "nobody/no-such-model-here"}
    path = write([{"model_name": "a", "model_path": "llama", "init_placements": seats}, hub])
    assert main(["check", str(path), "--gpus", "2x1GiB"]) == 0
    page = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert page[0] == f"{path}: no faults; 2 models, elastic"
    assert "a LlamaForCausalLM 1 176.6 KiB 256 B 512 +0 1 95.4 MiB, free" in page
    assert "b ? 1 ? ? ? any free" in page
    assert "0 1 GiB 176.6 KiB 95.4 MiB a" in page
    assert page[-1] == "not on this machine, so their weights were not counted: nobody/no-such-model-here"


def test_a_program_gets_the_measures_in_bytes(
    write: Write, make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("llama")
    path = write([{"model_name": "a", "model_path": "llama", "init_placements": [{"gpu_ids": [0]}]}])
    assert main(["check", str(path), "--gpus", "1x1GiB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["models"][0]["kv_bytes_per_token"] == 256
    assert report["gpus"] == [
        {"gpu_id": 0, "capacity_bytes": 1 << 30, "models": ["a"], "weight_bytes": WEIGHT_BYTES, "kv_limit_bytes": None}
    ]


def test_memory_is_not_judged_when_nobody_says_what_there_is(
    write: Write, make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("llama")
    path = write([{"model_name": "a", "model_path": "llama", "init_placements": [{"gpu_ids": [900]}]}])
    assert main(["check", str(path), "--static"]) == 0
    assert "name them with --gpus" in capsys.readouterr().out


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_a_file_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check"])
    assert "FILE is missing" in capsys.readouterr().err

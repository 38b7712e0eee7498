"""The GPU spike: its questions, that none can harm another, and the kit that carries SGLang to a machine without a registry."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmark.gpu import spike, standins, trim_wheel
from benchmark.gpu.answer import Answer, read
from benchmark.gpu.questions import QUESTIONS, Question
from benchmark.report import Figures

SPIKE = Path(spike.__file__)
PLENTY_S = 60.0

FINE = '''"""Decides nothing."""
def answer(answer, *, rehearse):
    answer.figure("answered", 42, "s", (41, 43))
    answer.fact("rehearsed", rehearse)
'''
FAILING = '''"""Decides nothing."""
def answer(answer, *, rehearse):
    answer.figure("known before it failed", 1, "s")
    raise RuntimeError("the device is on fire")
'''
KILLED = '''"""Decides nothing."""
import os, signal
def answer(answer, *, rehearse):
    os.kill(os.getpid(), signal.SIGKILL)
'''
HANGING = '''"""Decides nothing."""
import subprocess, threading
def answer(answer, *, rehearse):
    answer.figure("its child", subprocess.Popen(["sleep", "1000"]).pid, "")
    threading.Event().wait()
'''


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a question of a module's source."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def planted(name: str, source: str, *, limit_s: float = PLENTY_S, number: int = 1) -> Question:
        (tmp_path / f"planted_{name}.py").write_text(source)
        return Question(number=number, title=name, module=f"planted_{name}", limit_s=limit_s)

    return planted


def ask_all(*questions: Question, into: Path | None = None, budget_s: float = 1000) -> list[spike.Outcome]:
    return spike.ask_all(questions, figures=Figures("planted"), budget_s=budget_s, rehearse=True, seed=1, into=into)


def test_all_eight_questions_are_listed_and_say_what_they_decide() -> None:
    assert [question.number for question in QUESTIONS] == [1, 2, 3, 4, 5, 6, 7, 8]
    for question in QUESTIONS:
        assert question.decides.startswith(f"{question.number}. ")
        assert "\nDecides " in question.decides, question.module


def test_the_bounds_leave_room_for_two_commands_of_ten_minutes() -> None:
    limits = {question.number: question.limit_s for question in QUESTIONS}
    assert sum(limits[number] for number in (2, 3, 4, 5, 7)) < 600
    assert sum(limits[number] for number in (1, 6, 8)) < 600


def test_a_failing_question_does_not_stop_the_others(plant) -> None:
    failed, fine = ask_all(plant("failing", FAILING), plant("fine", FINE, number=2))
    assert (failed.state, failed.reason) == ("failed", "RuntimeError: the device is on fire")
    assert [figure["name"] for figure in failed.figures] == ["known before it failed"]
    assert "the device is on fire" in failed.facts["traceback"]
    assert fine.state == "ok"
    assert fine.figures == [{"name": "answered", "value": 42.0, "unit": "s", "spread": [41, 43]}]
    assert fine.facts == {"rehearsed": "True"}


def test_a_killed_question_is_told_with_its_signal(plant) -> None:
    killed, fine = ask_all(plant("killed", KILLED), plant("fine", FINE, number=2))
    assert (killed.state, killed.reason) == ("failed", "killed by SIGKILL")
    assert fine.state == "ok"


def test_a_hanging_question_is_cut_at_its_bound_with_all_it_started(plant) -> None:
    cut, fine = ask_all(plant("hanging", HANGING, limit_s=3.0), plant("fine", FINE, number=2))
    assert (cut.state, cut.reason) == ("cut", "not done after 3 s")
    assert 3.0 <= cut.wall_s < 30.0
    assert has_ended(int(cut.figures[0]["value"]))
    assert fine.state == "ok"


def has_ended(pid: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 10.0)[0])
    finally:
        os.close(process)


def test_a_question_without_time_is_skipped_with_the_reason(plant) -> None:
    (skipped,) = ask_all(plant("fine", FINE), budget_s=1)
    assert (skipped.state, skipped.reason, skipped.figures) == ("skipped", "no time left of 1 s", [])


def test_the_json_tells_the_circumstances_and_every_answer(plant, tmp_path: Path) -> None:
    into = tmp_path / "deep" / "spike.json"
    ask_all(plant("failing", FAILING), plant("fine", FINE, number=2), into=into)
    told = json.loads(into.read_text())
    assert {"machine", "python", "commit", "date"} <= told.keys()
    assert told["rehearsed"] is True
    assert [(question["state"], question["decides"]) for question in told["questions"]] == [
        ("failed", "Decides nothing."),
        ("ok", "Decides nothing."),
    ]


def test_an_answer_cut_within_a_line_keeps_the_lines_before(tmp_path: Path) -> None:
    path = tmp_path / "answer"
    Answer(path).samples("taken", [3.0, 1.0, 2.0], "ms")
    with path.open("a") as file:
        file.write('{"name": "half a li')
    figures, facts = read(path)
    assert figures == [{"name": "taken", "value": 2.0, "unit": "ms", "spread": [1.0, 3.0]}]
    assert facts == {}


def test_an_unknown_question_is_refused() -> None:
    refused = subprocess.run([sys.executable, SPIKE, "--only", "2,9"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "there are questions 1, 2, 3" in refused.stderr


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU: the spike would run")
def test_without_a_gpu_it_refuses_and_names_the_rehearsal() -> None:
    refused = subprocess.run([sys.executable, SPIKE, "--only", "2"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no NVIDIA GPU" in refused.stderr
    assert "--rehearse" in refused.stderr


def test_a_raw_call_is_rehearsed_with_the_real_argument_checks(tmp_path: Path) -> None:
    from benchmark.gpu import raw

    free_bytes = tmp_path / "free"
    free_bytes.write_text(f"{5 << 20:020d}")
    calls = raw.Rehearsal(free_bytes)
    handle = calls("cuMemCreate", 4 << 20, raw.on_device(), 0)
    with pytest.raises(raw.Refused) as refused:
        raw.Rehearsal(free_bytes)("cuMemCreate", 4 << 20, raw.on_device(), 0)
    assert refused.value.code == raw.OUT_OF_MEMORY
    calls("cuMemRelease", handle)
    raw.Rehearsal(free_bytes)("cuMemCreate", 4 << 20, raw.on_device(), 0)
    with pytest.raises(TypeError):
        calls("cuMemMap", 1 << 40, 2 << 20, 0, handle)


def test_every_layout_gives_each_slot_rows_of_its_own() -> None:
    import torch

    from benchmark.gpu.questions import layouts

    shape = layouts.Shape(layers=3, kv_heads=2, query_heads=4, dim=4, slots=64)
    for name, arrange in layouts.LAYOUTS.items():
        memory = torch.zeros(shape.slots * shape.layers * 2 * shape.row)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layouts, "STRIPE_BYTES", 16 * shape.slot_bytes)  # four stripes
            pool = arrange(memory, shape)
        numbers = pool.number(torch.arange(shape.slots))
        for keys, values in pool.layers:
            for rows in (keys, values):
                rows[numbers] += 1
        assert torch.equal(memory, torch.ones_like(memory)), name


def test_a_standin_can_be_imported_but_not_called(tmp_path: Path) -> None:
    standins.write(tmp_path, ["flashinfer"])
    line = "from flashinfer.sampling import top_p; top_p(1)"
    done = subprocess.run([sys.executable, "-c", line], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert "flashinfer.sampling.top_p was called, but only a stand-in for it is installed" in done.stderr
    missing = subprocess.run(
        [sys.executable, "-c", "import flashinfer.norm"], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "ModuleNotFoundError" in missing.stderr  # SGLang's own kernels are taken where this import fails


def test_a_package_that_is_there_gets_no_standin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(standins.MODULES, "json", ())
    assert "json" not in standins.absent()
    assert ("IPython" in standins.absent()) == (importlib.util.find_spec("IPython") is None)


def test_a_trimmed_wheel_forgets_what_it_dropped(tmp_path: Path) -> None:
    whole, rest = tmp_path / "whole.whl", tmp_path / "rest.whl"
    with zipfile.ZipFile(whole, "w") as wheel:
        wheel.writestr("k/ops.so", "kept")
        wheel.writestr("k/flash_ops.so", "dropped")
        wheel.writestr(
            "k-1.dist-info/RECORD", "k/ops.so,sha256=a,4\nk/flash_ops.so,sha256=flash_ops,7\nk-1.dist-info/RECORD,,\n"
        )
    trim_wheel.trim(whole, rest, ["flash_ops"])
    with zipfile.ZipFile(rest) as wheel:
        assert wheel.namelist() == ["k/ops.so", "k-1.dist-info/RECORD"]
        assert wheel.read("k-1.dist-info/RECORD").decode() == "k/ops.so,sha256=a,4\nk-1.dist-info/RECORD,,\n"


@pytest.mark.slow
def test_the_whole_spike_can_be_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    into = tmp_path / "spike.json"
    done = subprocess.run([sys.executable, SPIKE, "--rehearse", "--json", into], capture_output=True, text=True, timeout=900)
    told = json.loads(into.read_text())
    states = {question["number"]: (question["state"], question["reason"]) for question in told["questions"]}
    assert states == dict.fromkeys(range(1, 9), ("ok", "")), done.stdout[-4000:]
    assert done.returncode == 0
    assert all(question["figures"] for question in told["questions"])
    facts = {name: fact for question in told["questions"] for name, fact in question["facts"].items()}
    assert facts["the same graph reads a stripe mapped after its capture"] == "True"
    assert facts["serves with CUDA graphs"] == "yes"
    assert facts["a second process gets the bytes after unmap alone"] == "False"

"""`chimera serve`, whole: every process real, and each of them killed once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import House, command, cpu_s, house, placement, session_of, until

STEP_S = 0.005


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    make(MODELS["llama"], folder, 0)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return placement(tmp_path_factory.mktemp("file"), model_folder, {"a": {"step_s": STEP_S}, "b": {"step_s": STEP_S}})


def test_a_stream_passes_through_every_process_and_ctrl_c_lets_it_end(file: Path) -> None:
    with house(file) as served:
        assert any("[2/2]" in line for line in served.said), served.said
        stream = served.stream("a", 200).begun()
        assert served.stop(signal.SIGINT) == 0
        assert stream.whole
        assert len(stream.events) >= 200
        assert json.loads(stream.events[-2])["choices"][0]["finish_reason"] == "length"


def refused(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(command("serve", *arguments), capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


def test_a_port_in_use_is_said_before_anything_starts(file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, said = refused(str(file), "--port", str(port), "--engine", "simulated")
    assert status == 1
    assert f"127.0.0.1:{port}" in said
    assert "Traceback" not in said


def test_a_folder_that_is_no_model_is_said_before_anything_starts(tmp_path: Path) -> None:
    status, said = refused(str(tmp_path), "--engine", "simulated")
    assert status == 1
    assert "config.json" in said
    assert "Traceback" not in said


def test_a_run_directory_with_strangers_in_it_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    status, said = refused(str(file), "--run-dir", str(tmp_path), "--engine", "simulated")
    assert status == 1
    assert "diary.txt" in said
    assert (tmp_path / "diary.txt").exists()


@pytest.fixture(scope="class")
def served(file: Path) -> Iterator[House]:
    with house(file, "--fronts", "1") as made:
        yield made
        assert made.stop() == 0


@pytest.mark.slow
class TestAKilledProcess:
    """One server for all of them: each finds it whole, kills somebody, and leaves it whole."""

    def test_a_workers_streams_go_on_in_the_next_which_is_soon_there(self, served: House) -> None:
        broken = served.stream("a", 400).begun()
        other = served.stream("b", 300).begun()
        killed_s = time.monotonic()
        os.kill(served.worker_of("a"), signal.SIGKILL)
        status, answer = served.complete("a")
        assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
        assert time.monotonic() - killed_s < 2.0
        assert broken.whole and len(broken.events) >= 400
        assert other.whole

    def test_a_stream_that_loses_two_workers_ends_in_one_error(self, served: House) -> None:
        broken = served.stream("a", 3000).begun()
        for _ in range(2):
            victim, had = served.worker_of("a"), len(broken.events)
            os.kill(victim, signal.SIGKILL)
            killed_s = time.monotonic()
            until(lambda victim=victim: served.worker_of("a") != victim, "the next worker")
            until(lambda had=had: len(broken.events) > had, "more of the stream, or its end")
        error = broken.error
        assert error is not None and error["code"] == "worker_lost", broken.events[-2:]
        assert broken.ended_s - killed_s < 1.0
        assert served.complete("a")[0] == 200

    def test_control_leaves_streams_alone_and_comes_back(self, served: House) -> None:
        stream = served.stream("a", 400).begun()
        workers = set(served.workers())
        victim = served.of("chimera.control")
        os.kill(victim, signal.SIGKILL)
        until(lambda: set(served.processes("chimera.control")) - {victim}, "a new control")
        assert served.complete("b")[0] == 200
        assert stream.whole
        assert set(served.workers()) == workers, "no worker was started for what lives"
        assert any("control died" in line for line in served.said)

    def test_the_agent_is_replaced_and_its_workers_go_on(self, served: House) -> None:
        stream = served.stream("a", 400).begun()
        workers = set(served.workers())
        victim = served.of("chimera.agent")
        os.kill(victim, signal.SIGKILL)
        until(lambda: set(served.processes("chimera.agent")) - {victim}, "a new agent")
        status, answer = served.complete("b")
        assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
        assert stream.whole
        assert len(stream.events) >= 400
        assert set(served.workers()) == workers, "no worker was started for what lives"

    def test_a_front_end_is_replaced_and_its_requests_are_called_off(self, served: House) -> None:
        stream = served.stream("a", 3000).begun()
        os.kill(served.of("chimera.server"), signal.SIGKILL)
        assert stream.end()[-1] == "cut off" or not stream.whole
        until(lambda: _answers(served), "the new front-end")
        until(lambda: _running(served) == 0, "the end of the dead front-end's request", 5.0)

    def test_the_parent_leaves_workers_alone_and_new_ones_come_from_the_next(self, served: House) -> None:
        stream = served.stream("b", 400).begun()
        victim = served.of("chimera.worker.parent")
        assert session_of(victim) != victim, "not a worker"
        broken = served.stream("a", 400).begun()
        os.kill(victim, signal.SIGKILL)
        os.kill(served.worker_of("a"), signal.SIGKILL)
        assert served.complete("a")[0] == 200
        assert broken.whole and len(broken.events) >= 400
        assert stream.whole

    def test_what_was_decided_meanwhile_would_be_decided_again(self, served: House) -> None:
        logs = sorted(served.log_dir.glob("*.decisions*.jsonl"))
        assert len(logs) == 4, "control and the agent have had two lives each"
        for log in logs:
            done = subprocess.run(command("replay-decisions", str(log)), capture_output=True, text=True)
            assert done.returncode == 0, f"{log.name}: {done.stdout}{done.stderr}"


def _answers(served: House) -> bool:
    try:
        return served.complete("b")[0] == 200
    except OSError:
        return False


def _running(served: House) -> int:
    status, snapshot = served.ask("GET", "/snapshot")
    assert status == 200
    return sum(view["running"] + view["queued"] for view in snapshot["replicas"])


@pytest.mark.slow
def test_a_killed_supervisor_takes_everyone_along_and_its_streams_do_not_look_whole(file: Path) -> None:
    with house(file) as served:
        streams = [served.stream(model, 3000).begun() for model in ("a", "b")]
        killed_s = time.monotonic()
        served.process.kill()
        served.process.wait()
        for stream in streams:
            assert not stream.whole
            assert stream.ended_s - killed_s < 2.0
        until(lambda: not served.processes(), "the end of every process", 5.0)
        outcomes = (served.log_dir / "agent-local.decisions.jsonl").read_text().count('"outcome":"cancelled"')
        assert outcomes == 2, "the orphans' ends are recorded"


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(file: Path) -> None:
    with house(file) as served:
        stream = served.stream("a", 3000).begun()
        began_s = time.monotonic()
        served.process.send_signal(signal.SIGINT)
        served.wait_for("stopping")
        assert served.stop(signal.SIGINT) == 0
        assert time.monotonic() - began_s < 2.0
        assert not stream.whole


@pytest.mark.slow
def test_the_drain_is_bounded(file: Path) -> None:
    with house(file, "--drain", "500ms") as served:
        stream = served.stream("a", 3000).begun()
        began_s = time.monotonic()
        assert served.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began_s < 3.0
        assert not stream.whole


@pytest.mark.slow
def test_a_server_that_can_serve_nothing_says_so_and_leaves(tmp_path: Path, model_folder: Path) -> None:
    broken = placement(tmp_path, model_folder, {"broken": {"no_such_setting": 1}})
    with house(broken, ready=False) as served:
        assert served.process.wait(30) == 1
        served.wait_for("broken cannot be served")
        served.wait_for("giving up: no model could be brought up")


@pytest.mark.slow
def test_eighteen_idle_models_take_next_to_nothing(tmp_path: Path, model_folder: Path) -> None:
    crowd = placement(tmp_path, model_folder, {f"m{i:02}": {} for i in range(18)}, gpus=8)
    with house(crowd, "--virtual-gpus", "8x2GiB") as served:
        pids = [*served.processes(), served.process.pid]
        assert len(served.workers()) == 18
        before_s, began_s = cpu_s(pids), time.monotonic()
        time.sleep(5.0)
        share = (cpu_s(pids) - before_s) / (time.monotonic() - began_s)
        assert share < 0.02, f"{share:.1%} of a core"

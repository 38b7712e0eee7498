"""A running server is changed by its operator: its placement file read again, models registered and removed over HTTP."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import House, command, house, until

pytestmark = pytest.mark.slow
STEP_S = 0.005


def entry(name: str, folder: str = "llama", gpu: int = 0, **keys: Any) -> dict[str, Any]:
    placements = [{"gpu_ids": [gpu], "max_memory_pool_size": 0.05}]
    return {
        "model_name": name,
        "model_path": folder,
        "init_placements": placements,
        "engine_args": {"step_s": STEP_S},
        **keys,
    }


class Desk:
    """The operator's own."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "placement.json"
        self.write(entry("a"), entry("b", gpu=1))

    def write(self, *entries: dict[str, Any]) -> None:
        self.file.write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    make(MODELS["llama"], folder / "llama", 0)
    return Desk(folder)


@pytest.fixture(scope="module")
def served(desk: Desk) -> Iterator[House]:
    with house(desk.file, "--virtual-gpus", "2x1GiB") as made:
        yield made
        assert made.stop() == 0


def names(served: House) -> list[str]:
    _, listed = served.ask("GET", "/v1/models")
    _, prisms = served.ask("GET", "/get_model_names")
    told = sorted(card["id"] for card in listed["data"])
    assert sorted(prisms["model_names"]) == told
    return told


def up(served: House) -> dict[str, tuple[str, list[int]]]:
    _, snapshot = served.ask("GET", "/snapshot")
    return {view["replica"][0]: (view["state"], view["gpu_ids"]) for view in snapshot["replicas"]}


def test_only_what_is_different_in_the_file_happens_and_streams_go_on(served: House, desk: Desk) -> None:
    before, stream = served.worker_of("b"), served.stream("a", 400).begun()
    desk.write(entry("b", gpu=1, priority=2), entry("c"))
    status, told = served.ask("POST", "/reload")
    assert (status, told["changes"][:3]) == (
        200,
        ["a is removed, once its requests are done", "b: priority changed", "c is registered"],
    )
    assert names(served) == ["b", "c"]
    assert served.complete("a")[0] == 404
    assert stream.whole
    assert served.complete("c")[0] == 200
    until(lambda: "a" not in up(served), "the end of a")
    assert served.worker_of("b") == before
    assert served.ask("POST", "/reload") == (200, {"changes": []})


def test_a_broken_file_says_every_fault_and_the_old_one_stays_in_force(served: House, desk: Desk) -> None:
    good = desk.file.read_text()
    desk.write(entry("b", folder="nowhere/at/all"), entry("d", gpu=9))
    status, told = served.ask("POST", "/reload")
    said = told["error"]["message"]
    assert status == 400 and "stays in force" in said and "nowhere" in said and "no GPU 9" in said
    assert names(served) == ["b", "c"] and served.complete("b")[0] == 200
    desk.file.write_text("[{")
    served.process.send_signal(signal.SIGHUP)
    served.wait_for("nothing is changed")
    served.wait_for("is not JSON")
    assert served.process.poll() is None and served.complete("c")[0] == 200
    desk.file.write_text(good)


def test_a_signal_does_the_same_and_says_what_changed(served: House, desk: Desk) -> None:
    desk.write(entry("b", gpu=0), entry("c"))
    served.process.send_signal(signal.SIGHUP)
    served.wait_for("read again: .*b/0 is wanted on GPU 0, no longer on GPU 1")
    assert served.complete("b")[0] == 200
    assert up(served)["b"] == ("serving", [0])


def test_what_was_changed_outlives_control(served: House, desk: Desk) -> None:
    assert served.ask("POST", "/models", entry("n", gpu=1))[0] == 200
    victim = served.of("chimera.control")
    stream = served.stream("n", 200).begun()
    subprocess.run(["kill", "-9", str(victim)], check=True)
    until(lambda: set(served.processes("chimera.control")) - {victim}, "a new control")
    assert stream.whole
    until(lambda: served.ask("GET", "/health")[0] == 200, "the new control's word")
    assert names(served) == ["b", "c", "n"]
    assert served.complete("n")[0] == 200
    assert served.ask("DELETE", "/models/n")[0] == 200


def test_a_model_is_registered_and_removed_while_the_server_runs(served: House, desk: Desk) -> None:
    status, told = served.ask("POST", "/models", entry("late", gpu=1, aliases=["later"]))
    assert (status, told["changes"]) == (200, ["late is registered", "late/0 is wanted on GPU 1"])
    assert names(served) == ["b", "c", "late"]
    assert served.complete("later")[0] == 200
    assert served.ask("POST", "/models", entry("later"))[0] == 400
    stream = served.stream("late", 300).begun()
    assert served.ask("DELETE", "/models/late") == (200, {"model": "late", "deleted": True})
    assert names(served) == ["b", "c"]
    assert served.complete("late")[0] == 404
    assert stream.whole, "it drains"
    until(lambda: "late" not in up(served), "the end of late")
    assert served.ask("POST", "/reload") == (200, {"changes": []})


def test_a_path_outside_of_the_roots_is_refused(served: House) -> None:
    status, told = served.ask("POST", "/models", entry("evil", folder="/etc"))
    assert status == 400 and "may come from" in told["error"]["message"]
    assert "evil" not in names(served)


def test_the_command_line_reads_the_file_again(served: House, desk: Desk) -> None:
    desk.write(entry("b", gpu=0), entry("c", pin=True))
    url = f"http://{served.address[0]}:{served.address[1]}"
    done = subprocess.run(command("reload", "--url", url), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "c: pin changed\n")
    again = subprocess.run(command("reload", "--json", "--url", url), capture_output=True, text=True, timeout=60)
    assert json.loads(again.stdout) == {"changes": []}


def kept(served: House, keep_alive: object) -> tuple[int, Any]:
    body = {"model": "b", "prompt": "hello", "max_tokens": 3, "keep_alive": keep_alive}
    return served.ask("POST", "/v1/completions", body)


def test_a_request_says_how_long_its_model_stays(served: House) -> None:
    assert kept(served, "1h30m")[0] == 200
    assert up(served)["b"][0] == "serving"
    assert kept(served, 0)[0] == 200
    until(lambda: "b" not in up(served), "the end of b")
    assert kept(served, "100ms")[0] == 200, "it comes back for the next request"
    until(lambda: "b" not in up(served), "the end of b")
    assert kept(served, -1)[0] == 200
    assert up(served)["b"][0] == "serving"
    status, told = kept(served, "a while")
    assert status == 400 and told["error"]["param"] == "keep_alive"


def test_clients_that_vanish_in_mid_stream_leave_no_slot_and_no_memory_in_use(served: House) -> None:
    def account() -> tuple[int, int]:
        _, snapshot = served.ask("GET", "/snapshot")
        views = snapshot["replicas"]
        return sum(view["running"] + view["queued"] for view in views), sum(view["kv_used_tokens"] for view in views)

    until(lambda: account() == (0, 0), "an idle server")
    streams = [served.stream("c", 1500).begun() for _ in range(15)]
    until(lambda: account()[0] == 15 and account()[1] > 0, "all of them in the account")
    for stream in streams:
        stream.vanish()
    gone_s = time.monotonic()
    until(lambda: account() == (0, 0), "the end of all of them")
    assert time.monotonic() - gone_s < 3.0, "their answers would have gone on for seven seconds"
    assert not any(stream.whole for stream in streams)

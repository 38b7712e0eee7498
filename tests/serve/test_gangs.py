"""A model over two virtual GPUs, served as its operator has it: killed rank by rank, unloaded, and nothing left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import House, command, house, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gangs")
    make(MODELS["llama"], folder / "llama", 0)
    entry = {
        "model_name": "g",
        "model_path": "llama",
        "tp_size": 2,
        "init_placements": [{"gpu_ids": [0, 1], "max_memory_pool_size": 0.05}],
        "engine_args": {"step_s": 0.005},
    }
    (folder / "placement.json").write_text(json.dumps([entry]))
    return folder


def ranks(served: House) -> list[int]:
    """Who serves the model now, by the agent's log."""
    log = (served.log_dir / "agent-local.log").read_text()
    names = re.findall(r"ready replica=g/0 worker=(\S+)", log)[-2:]
    return [int(re.findall(rf"greeted worker={re.escape(name)} pid=(\d+)", log)[-1]) for name in names]


def held_pages(served: House) -> list[int]:
    """Of each GPU, by the ledgers."""
    _, snapshot = served.ask("GET", "/snapshot")
    return [sum(entry["lease"]["held"] for entry in gpu["entries"]) for gpu in snapshot["ledgers"]]


def test_a_gang_outlives_the_loss_of_either_rank_and_leaves_its_gpus_empty(folder: Path) -> None:
    with house(folder / "placement.json", "--virtual-gpus", "2x1GiB") as served:
        for rank in (0, 1):
            before, stream = ranks(served), served.stream("g", 300).begun()
            killed_s = time.monotonic()
            os.kill(before[rank], signal.SIGKILL)
            assert stream.whole and len(stream.events) > 300, "its client sees one stream"
            after = ranks(served)
            assert set(after).isdisjoint(before)
            assert not any(Path(f"/proc/{pid}").exists() for pid in before)
            assert time.monotonic() - killed_s < 10.0
        until(lambda: len(held := held_pages(served)) == 2 and all(held), "both GPUs' share of it")
        assert served.ask("POST", "/models/unload", {"model": "g"})[0] == 200
        until(lambda: held_pages(served) == [0, 0], "the ledgers of both GPUs empty")
        assert served.stop() == 0


def test_heads_that_do_not_divide_are_refused_before_anything_starts(folder: Path) -> None:
    (entry,) = json.loads((folder / "placement.json").read_text())
    config = json.loads((folder / "llama" / "config.json").read_text())
    odd = folder / "odd"
    odd.mkdir()
    for file in (folder / "llama").iterdir():
        (odd / file.name).symlink_to(file)
    (odd / "config.json").unlink()
    (odd / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3, "num_key_value_heads": 3}))
    wrong = folder / "wrong.json"
    wrong.write_text(json.dumps([entry | {"model_path": "odd"}]))
    said = subprocess.run(command("serve", str(wrong), "--engine", "simulated"), capture_output=True, text=True, timeout=60)
    assert said.returncode == 1 and "tp_size 2 does not divide" in said.stderr

"""The records of a whole server outlive it, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
from chimera.records import store
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import house, placement, until

pytestmark = pytest.mark.slow
LAST_S = 1.0
"""No more than this may be lost."""


def test_a_server_that_is_killed_has_kept_all_but_its_last_second(tmp_path: Path) -> None:
    make(MODELS["llama"], tmp_path / "llama", seed=0)
    file = placement(tmp_path, tmp_path / "llama", {"m": {"step_s": 0.005}})
    kept = tmp_path / "kept.sqlite"
    ended_s: dict[str, float] = {}
    with house(file, "--records", str(kept)) as served:
        began_s = time.monotonic()
        while time.monotonic() - began_s < LAST_S + 1.0:
            status, body = served.complete("m", 5)
            assert status == 200
            ended_s[body["id"].partition("-")[2]] = time.monotonic()
        killed_s = time.monotonic()
        for pid in (served.process.pid, served.of("chimera.server"), served.of("chimera.control")):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not served.processes(), "the end of those that were left alone")
        shutil.rmtree(served.run_dir)  # nobody was left to do it
    with closing(store.open_to_read(kept)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        found = {row[0] for row in reader.execute("SELECT request FROM requests")}
    owed = {name for name, at_s in ended_s.items() if at_s < killed_s - LAST_S}
    assert len(owed) > 10 and owed <= found

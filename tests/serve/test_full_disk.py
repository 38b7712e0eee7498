"""A disk without room: requests are answered, it is said loudly, and what came meanwhile is kept when there is room again."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import House, house, placement, until

FILE_BYTES = 8192
"""No file of control's may be longer: what it is told then, a full disk tells as well."""


def told(served: House, line: str) -> str | None:
    log = (served.log_dir / "control.log").read_text()
    return next((one for one in log.splitlines() if line in one), None)


@pytest.mark.slow
def test_serving_goes_on_with_a_full_disk_and_it_is_said_loudly(tmp_path: Path) -> None:
    make(MODELS["llama"], tmp_path / "llama", seed=0)
    file = placement(tmp_path, tmp_path / "llama", {"m": {}})
    with house(file) as served:
        assert served.complete("m")[0] == 200
        control = served.of("chimera.control")
        before = resource.prlimit(control, resource.RLIMIT_FSIZE, (FILE_BYTES, resource.RLIM_INFINITY))
        try:
            for _ in range(20):
                assert served.complete("m")[0] == 200
            line = until(lambda: told(served, "records are not kept"), "that records are not kept")
            assert " E " in line and "serving goes on" in line
            until(lambda: told(served, "nothing more is written to"), "that decisions are not written")
            assert served.of("chimera.control") == control
        finally:
            resource.prlimit(control, resource.RLIMIT_FSIZE, before)
        until(lambda: told(served, "records are kept again"), "that records are kept again")
        until(lambda: len(served.ask("GET", "/requests?most=50")[1]) == 21 or None, "all requests in the records")

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path

import pytest
from chimera.wire.process import OneLine, fresh_log


def test_no_name_forges_a_line_of_a_log() -> None:
    record = logging.LogRecord("n", logging.INFO, "", 1, "load model=%s", ("a\n2026 E control: all is lost\x1b[2J",), None)
    line = OneLine("%(levelname)s %(message)s").format(record)
    assert line == "INFO load model=a\\n2026 E control: all is lost\\x1b[2J"


def test_a_log_on_a_full_disk_ends_with_a_whole_line_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write = fresh_log(tmp_path / "log.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for number in range(100):
            write(b'{"number": %d, "padding": "%s"}\n' % (number, b"x" * 30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(b"a line after a gap\n")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(len(lines))) and 10 < len(lines) < 30
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "the process goes on" in caplog.text

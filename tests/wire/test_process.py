from __future__ import annotations

import logging

from chimera.wire.process import OneLine


def test_no_name_forges_a_line_of_a_log() -> None:
    record = logging.LogRecord("n", logging.INFO, "", 1, "load model=%s", ("a\n2026 E control: all is lost\x1b[2J",), None)
    line = OneLine("%(levelname)s %(message)s").format(record)
    assert line == "INFO load model=a\\n2026 E control: all is lost\\x1b[2J"

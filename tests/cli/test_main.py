"""The command line as a whole: a verb that is not there is a mistyped one."""

from __future__ import annotations

import pytest
from chimera.cli.main import main


@pytest.mark.parametrize(("typed", "told"), [("serv", "did you mean serve?"), ("frobnicate", "`chimera --help` lists them")])
def test_an_unknown_verb_is_told_with_the_nearest(typed: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed, "x"]) == 1
    assert capsys.readouterr().err == f"chimera: there is no verb '{typed}' ({told})\n"

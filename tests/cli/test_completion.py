"""What a shell offers after the tab key, asked of bash itself."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from chimera.cli.completion import script
from chimera.cli.main import VERBS, make_parser


def offered(*words: str) -> set[str]:
    """After `chimera` and these words, the last of which is being typed."""
    line = shlex.join(["chimera", *words])
    asked = f"COMP_WORDS=({line})\nCOMP_CWORD={len(words)}\n_chimera\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    told = subprocess.run(
        ["bash", "--norc", "-uc", f"{script(make_parser(), 'bash')}\n{asked}"], capture_output=True, text=True, timeout=30.0
    )
    assert told.returncode == 0, told.stderr
    return set(told.stdout.split())


def test_every_verb_is_offered() -> None:
    assert offered("") == set(VERBS)


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (("se",), {"serve"}),
        (("serve", "--pol"), {"--policy"}),
        (("serve", "placement.json", "--engine", ""), {"sglang", "simulated"}),
        (("bench", ""), {"serve", "sweep", "compare", "calibrate", "switch", "report"}),
        (("bench", "compare", "--pol"), {"--policies"}),
        (("bench", "serve", "--api", "c"), {"completions", "chat"}),
        (("policy", "fl"), {"flexible"}),
        (("serve", ""), set()),  # files, by the shell itself
    ],
)
def test_what_may_follow_is_offered(typed: tuple[str, ...], wanted: set[str]) -> None:
    assert offered(*typed) == wanted


def test_zsh_gets_the_same_through_its_own_bridge() -> None:
    lines = script(make_parser(), "zsh").splitlines()
    assert lines[1] == "autoload -U +X bashcompinit && bashcompinit"
    assert lines[2:] == script(make_parser(), "bash").splitlines()[1:]

"""The placement file read again: what a flag has settled is no difference, whatever the file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chimera.cli.filing import Filing
from chimera.config.deployment import load_placement
from chimera.config.roots import Roots
from chimera.config.virtual_gpus import parse_virtual_gpus


@pytest.mark.parametrize(
    ("flag", "words"), [(None, ("gpus has changed, which takes a new start of the server",)), ("2x1GiB", ())]
)
def test_other_gpus_in_the_file_are_named_unless_a_flag_has_settled_them(
    tmp_path: Path, flag: str | None, words: tuple[str, ...]
) -> None:
    file = tmp_path / "placement.json"
    file.write_text(json.dumps({"gpus": "2x1GiB", "models": []}))
    given = None if flag is None else parse_virtual_gpus(flag)
    filing = Filing(
        in_force=load_placement(file, given),
        file=file,
        elastic=True,
        roots=Roots([tmp_path]),
        flags=frozenset() if flag is None else frozenset({"filed_gpus"}),
    )
    assert not filing.read_again()[1]
    file.write_text(json.dumps({"gpus": "4x1GiB", "models": []}))
    fresh, change = filing.read_again()
    assert change.words == words
    assert fresh.gpus == filing.in_force.gpus, "a running server keeps those that it has"

"""What the guides show is real: their placement files are accepted, and the policy of the tutorial decides as it says."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chimera.config.deployment import survey_placement
from chimera.config.placement_file import json_schema
from chimera.core.snapshot import Demand
from chimera.errors import ConfigError
from chimera.sched.policies import POLICIES
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.docs.documents import ROOT, documents, name_of
from tests.sched.builders import seat
from tests.sched.test_policies import WAITED_FOR, asked, spec

DOCS = ROOT / "docs"


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / guide).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tutorial() -> tuple[dict[str, Any], str]:
    """The names that the tutorial's code leaves behind, and what it prints."""
    names: dict[str, Any] = {"__name__": "tutorial"}
    printed = io.StringIO()
    known = dict(POLICIES)
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        try:
            for block in blocks("writing-a-policy.md", "python"):
                exec(compile(block, "writing-a-policy.md", "exec"), names)
        finally:
            POLICIES.clear()
            POLICIES.update(known)
    return names, printed.getvalue()


def test_the_tutorials_code_evaluates_its_policy_beside_two_others(tutorial: tuple[dict[str, Any], str]) -> None:
    _, printed = tutorial
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines] == ["space-sharing", "busiest", "flexible"]
    shares = [float(line[1].rstrip("%")) for line in lines]
    assert all(10.0 < share < 100.0 for share in shares), printed
    assert len({line[3] for line in lines}) == 1, "all three were asked the same"


def test_the_tutorials_policy_lets_the_least_asked_for_go(tutorial: tuple[dict[str, Any], str]) -> None:
    decision = tutorial[0]["Busiest"]().decide(QUESTION)
    assert {seat.replica.model for seat in decision.placement.seats} == {"a", "c", "d"}
    assert decision.reasons[seat("b").replica] == "asked for least, and d needs the room"


def test_the_tutorials_policy_leaves_newcomers_in_peace(tutorial: tuple[dict[str, Any], str]) -> None:
    assert tutorial[0]["Busiest"](peace_s=1e6).decide(QUESTION).placement == QUESTION.wanted


QUESTION = asked(
    [spec(name) for name in "abcd"],
    [seat("a"), seat("b"), seat("c")],
    {name: Demand(idle_s=9.0, requests_per_s_minute=rate) for name, rate in (("a", 0.3), ("b", 0.1), ("c", 0.2))}
    | {"d": WAITED_FOR},
)
"""Three models fill the GPU, all idle, and somebody waits for a fourth."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("llama", "qwen3"):
        make(MODELS[name], tmp_path / "models" / name, seed=0)
    return tmp_path


@pytest.mark.parametrize("guide", ["placement.md", "slos.md"])
def test_the_placement_files_in_a_guide_are_accepted(guide: str, folder: Path) -> None:
    shown = [document for document in map(json.loads, blocks(guide, "json")) if "messages" not in document]
    assert shown
    for document in shown:
        (folder / "placement.json").write_text(json.dumps(document))
        survey = survey_placement(folder / "placement.json", None, elastic=True)
        assert not survey.absent
        assert all(entry.model_path.startswith("models/") for entry in survey.file.models)


def test_the_fault_that_the_guide_shows_is_told_so(folder: Path) -> None:
    (folder / "placement.json").write_text(blocks("placement.md", "json")[-1].replace('"10m"', '"10 minuts"'))
    with pytest.raises(ConfigError) as refused:
        survey_placement(folder / "placement.json", None, elastic=True)
    [shown] = blocks("placement.md", "text")
    assert str(refused.value).endswith(shown.strip())


def placements(document: Path) -> list[Any]:
    shown = re.findall(r"^```json\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [json.loads(block) for block in shown if "model_path" in block]


@pytest.mark.parametrize("document", [path for path in documents() if placements(path)], ids=name_of)
def test_every_placement_file_that_is_shown_keeps_to_the_schema(document: Path) -> None:
    for placement in placements(document):
        jsonschema.validate(placement, json_schema())

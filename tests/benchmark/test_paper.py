"""The systems of the literature on paper, and the table that holds theirs against ours."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
from chimera.core.metrics import Story
from chimera.core.model import Slo
from chimera.sim.chronicle import Chronicle
from chimera.sim.run import simulate
from chimera.trace.trace import Row, Trace
from chimera.units import GIB

from benchmark.sim import kept, paper, rivals
from tests.sched.builders import costs, model

TINY = tuple(msgspec.structs.replace(model(name), slo=Slo(ttft_s=2.0, tpot_s=0.1)) for name in "abc")
ASKED = Trace("told", tuple(Row(n * 0.2, "abc"[n % 3 if n % 5 else 0], 20, 10) for n in range(120)))


def stood(name: str, gpus: int) -> tuple[Chronicle, list[Story]]:
    chronicle, stories = Chronicle(), []  # type: ignore[var-annotated]
    table = costs(gpu_bytes=4 * GIB, activation_s=0.2)
    with rivals.known():
        simulate(
            rivals.scenario(rivals.RIVALS[name], TINY, ASKED, gpus, table), ASKED, chronicle=chronicle, keep=stories.extend
        )
    return chronicle, stories


@pytest.mark.parametrize("name", ["qlm-like", "serverless-like"])
def test_those_that_take_turns_begin_with_nobody_and_have_one_model_on_a_gpu_at_a_time(name: str) -> None:
    chronicle, stories = stood(name, 1)
    spans = sorted((span for span in chronicle.spans if span.ready_s is not None), key=lambda span: span.asked_s)
    assert len({span.replica.partition("/")[0] for span in spans}) == 3
    assert all(before.gone_s <= after.ready_s + 1e-9 for before, after in itertools.pairwise(spans) if after.ready_s)
    assert all(story.answered for story in stories)


def test_the_planned_start_keeps_the_busiest_apart_and_never_moves_anybody() -> None:
    chronicle, _ = stood("muxserve-like", 2)
    places = {span.replica.partition("/")[0]: span.gpus for span in chronicle.spans}
    assert len(chronicle.spans) == 3, "each model stood once, all the time"
    assert places["b"] == places["c"] != places["a"], "a is asked for most"


def test_a_run_in_the_file_is_not_made_again_and_another_is(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    for _ in range(2):
        runs = kept.Kept(file)
        assert runs.figures(("kvpr", 4, 1.5), lambda: {"ttft": 0.5}) == {"ttft": 0.5}
    assert runs.figures(("kvpr", 5, 1.5), lambda: {"ttft": 0.6}) == {"ttft": 0.6}
    assert len(file.read_text().splitlines()) == 2


def test_the_fewest_and_the_highest_are_found_by_what_is_attained(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = paper.Stage(costs(), Path(), kept.Kept(None))

    def run(rival: object, load: str, models: str, gpus: int, rate: float, **words: object) -> dict[str, float]:
        return {"ttft": 1.0 if rate <= 1.7 * gpus else 0.9}

    monkeypatch.setattr(stage, "run", run)
    monkeypatch.setattr(stage, "models", lambda load, models: (model("a"),))
    kvpr = rivals.RIVALS["kvpr"]
    assert stage.fewest("ttft", kvpr, "Arena", "18", 6.0, 16, (1,)) == 4
    assert stage.fewest("ttft", kvpr, "Arena", "18", 60.0, 16, (1,)) == 17
    assert stage.highest_rate(kvpr, "Arena", "18", 4, start=1.0) == pytest.approx(6.8, rel=0.06)
    assert stage.highest_rate(kvpr, "Arena", "18", 4, start=100.0) == pytest.approx(6.8, rel=0.06)


def test_the_table_says_theirs_ours_the_ratio_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    row = paper.Row(experiment="58 models: GPUs of kvpr", theirs=16, said="16", ours=20, unit="GPUs")
    monkeypatch.setattr(paper, "WHY", {"58 models": "they are others"})
    assert paper._markdown([row]).splitlines()[-1] == "| 58 models: GPUs of kvpr | 16 | 20 GPUs | 1.25 | they are others |"

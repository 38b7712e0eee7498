"""The decision log: written by a scheduler, run again, compared."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from chimera.cli.main import main
from chimera.core.replica import Epoch, ReplicaId
from chimera.errors import ProtocolError
from chimera.msg.actions import Action
from chimera.msg.events import Event, ModelRegistered
from chimera.sched.control import ControlScheduler
from chimera.sched.log import Recorder, replay
from chimera.sched.node import NodeScheduler

from tests.sched.builders import activate, arrived, finished, joined, model, placement, ready, routed, seat, worker_lost

E1, E2 = Epoch(100, 1), Epoch(100, 2)
CONTROL_STORY: list[Event | Action] = [
    ModelRegistered(model=model("a")),
    joined(),
    arrived("x"),
    ready("a", E1),
    arrived("y", at=0.1),
    finished("x", "a", E1),
    worker_lost("a", E1),
    arrived("z", at=0.2),
    ready("a", E2),
]
NODE_STORY: list[Event | Action] = [
    activate("a", 0),
    activate("b", 1),
    routed("x", ReplicaId("a")),
    ready("a", E1, credits=1),
    routed("y", ReplicaId("a"), at=0.1),
    finished("x", "a", E1),
    worker_lost("a", E1),
    activate("a", 0),
]


def written(scheduler: ControlScheduler | NodeScheduler, story: list[Event | Action], *, opened_after: int = 0) -> list[bytes]:
    """The log of a story, opened in its middle if so wished."""
    recorder = Recorder(scheduler)
    lines = [recorder.opening()]
    for number, event in enumerate(story):
        if number == opened_after:
            lines = [recorder.opening()]
        now = number * 0.125 + 1 / 3
        actions = scheduler.on(event, now)  # type: ignore[arg-type]
        lines.append(recorder.line(now, event, actions))
    return lines


def control_log(opened_after: int = 0) -> list[bytes]:
    return written(ControlScheduler(placement(seat("a"))), CONTROL_STORY, opened_after=opened_after)


@pytest.mark.parametrize("opened_after", range(len(CONTROL_STORY)))
def test_a_log_of_control_opened_at_any_moment_replays_to_the_same_actions(opened_after: int) -> None:
    outcome = replay(control_log(opened_after))
    assert outcome.differences == ()
    assert (outcome.scheduler, outcome.steps) == ("control", len(CONTROL_STORY) - opened_after)


@pytest.mark.parametrize("opened_after", range(len(NODE_STORY)))
def test_a_log_of_an_agent_opened_at_any_moment_replays_to_the_same_actions(opened_after: int) -> None:
    outcome = replay(written(NodeScheduler("local", 100, (0, 1)), NODE_STORY, opened_after=opened_after))
    assert outcome.differences == ()
    assert outcome.scheduler == "node"


def test_a_changed_action_is_found_at_its_line() -> None:
    lines = control_log()
    lines[5] = lines[5].replace(b'"Route"', b'"Route"').replace(b"takes 2 at a time", b"takes 3 at a time")
    (difference,) = replay(lines).differences
    assert difference.line == 6


def test_a_line_cut_short_at_the_end_is_left_out_and_said() -> None:
    lines = control_log()
    lines[-1] = lines[-1][:40]
    outcome = replay(lines)
    assert outcome.truncated
    assert outcome.steps == len(CONTROL_STORY) - 1
    assert outcome.differences == ()


@pytest.mark.parametrize(
    ("number", "line", "said"),
    [
        (0, b"", "line 1 does not open"),
        (0, b'{"scheduler":"oracle","version":1}\n', "line 1 does not open"),
        (3, b'{"now": 1.0, "event": \n', "line 4 is damaged"),
        (3, b'{"now":1.0,"event":{"type":"Earthquake"},"actions":[]}\n', "line 4 is damaged"),
        (3, b"\xff\xfe\n", "line 4 is damaged"),
    ],
)
def test_a_damaged_log_names_its_line(number: int, line: bytes, said: str) -> None:
    lines = control_log()
    lines[number] = line
    with pytest.raises(ProtocolError, match=said):
        replay(lines)


def test_a_log_of_another_version_is_refused() -> None:
    lines = control_log()
    with pytest.raises(ProtocolError, match="version 2"):
        replay([lines[0].replace(b'"version":1', b'"version":2'), *lines[1:]])


def test_the_verb_says_that_all_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "control.decisions.jsonl"
    log.write_bytes(b"".join(control_log()))
    assert main(["replay-decisions", str(log)]) == 0
    assert capsys.readouterr().out == (
        "control.decisions.jsonl: 9 decisions of control over 1.000 s\nthe same actions, all of them\n"
    )


def test_the_verb_shows_the_first_difference_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = control_log()
    step = msgspec.json.decode(lines[5])
    step["actions"] = []
    lines[5] = msgspec.json.encode(step) + b"\n"
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(lines))
    assert main(["replay-decisions", str(log)]) == 1
    shown = capsys.readouterr().out
    assert "1 lines lead to other actions today; the first is line 6" in shown
    assert "recorded: nothing" in shown
    assert '{"type":"Route"' in shown.partition("replayed:")[2]


@pytest.mark.parametrize("content", [None, b"", b"not a log\n"])
def test_the_verb_fails_on_what_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_bytes(content)
    assert main(["replay-decisions", str(log)]) == 1
    assert str(log) in capsys.readouterr().err


def test_the_verb_says_when_the_end_is_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(control_log())[:-30])
    assert main(["replay-decisions", str(log)]) == 0
    assert "the last line is cut short and was left out" in capsys.readouterr().out

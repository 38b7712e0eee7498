"""`chimera replay-decisions LOG`: runs a decision log again and compares every action. Reads; starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from chimera.errors import ConfigError, ProtocolError
from chimera.msg.actions import Action
from chimera.sched.log import Difference, Replay, replay


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, metavar="LOG", help="a *.decisions.jsonl file of control or of an agent")


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.log
    try:
        with path.open("rb") as lines:
            outcome = replay(lines)
    except OSError as fault:
        raise ConfigError.single(str(path), f"cannot be read: {fault.strerror}") from None
    except ProtocolError as fault:
        raise ProtocolError(f"{path}: {fault}") from None
    print(report(path.name, outcome))
    return 1 if outcome.differences else 0


def report(name: str, outcome: Replay) -> str:
    """What a person wants to know of a replay."""
    lines = [f"{name}: {outcome.steps} decisions of {outcome.scheduler} over {outcome.span_s:.3f} s"]
    if outcome.truncated:
        lines.append("the last line is cut short and was left out: the process was stopped while it wrote")
    if not outcome.differences:
        return "\n".join([*lines, "the same actions, all of them"])
    first = outcome.differences[0]
    lines.append(f"{len(outcome.differences)} lines lead to other actions today; the first is line {first.line}:")
    return "\n".join([*lines, *_shown(first)])


def _shown(difference: Difference) -> list[str]:
    step = difference.step
    return [
        f"  at {step.now:.6f} s  {_written(step.event)}",
        *_listed("recorded", step.actions),
        *_listed("replayed", difference.replayed),
    ]


def _listed(title: str, actions: Sequence[Action]) -> list[str]:
    return [f"  {title}:", *(f"    {_written(action)}" for action in actions)] if actions else [f"  {title}: nothing"]


def _written(message: msgspec.Struct) -> str:
    return msgspec.json.encode(message).decode()

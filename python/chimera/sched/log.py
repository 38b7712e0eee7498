"""The decision log: what a scheduler was told, what it decided, and whether it would decide the same again.

A log is lines of JSON. The first opens it: version, kind of scheduler, and all that the scheduler remembered at that
moment, so a log may begin in mid-life. Every further line is one event with its time and the actions that it gave. Requests
are in it by their measure; what they say never is. Knows no file: takes and gives lines as bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Union

import msgspec

from chimera.errors import ProtocolError
from chimera.msg.actions import Action
from chimera.msg.events import Event
from chimera.sched.control import ControlScheduler, ControlState
from chimera.sched.node import NodeScheduler, NodeState

VERSION = 1

if TYPE_CHECKING:
    Done = Action
    Told = Event | Action
else:
    # Whatever the messages are, the log can hold: no list to keep in step with them.
    Done = Union[tuple(Action.__subclasses__())]  # noqa: UP007
    Told = Union[(Done, *Event.__subclasses__())]


class ControlOpening(msgspec.Struct, frozen=True, kw_only=True, tag="control", tag_field="scheduler"):
    version: int
    state: ControlState


class NodeOpening(msgspec.Struct, frozen=True, kw_only=True, tag="node", tag_field="scheduler"):
    version: int
    state: NodeState


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One event, and what it led to."""

    now: float
    event: Told
    actions: list[Done]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A line whose event leads to other actions today."""

    line: int
    step: Step
    replayed: list[Action]


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What came of running a log again."""

    scheduler: str
    """`control` or `node`."""
    steps: int
    span_s: float
    """From the first event to the last."""
    truncated: bool
    """The last line is cut short: its writer was stopped in mid-word. Nothing before it is in doubt."""
    differences: tuple[Difference, ...]


_encoder = msgspec.json.Encoder()
_openings: msgspec.json.Decoder[ControlOpening | NodeOpening] = msgspec.json.Decoder(ControlOpening | NodeOpening)
_steps = msgspec.json.Decoder(Step)


class Recorder:
    """Writes the log of one scheduler: `opening` first, then a `line` for each event. The caller keeps the bytes."""

    __slots__ = ("_scheduler",)

    def __init__(self, scheduler: ControlScheduler | NodeScheduler) -> None:
        self._scheduler = scheduler

    def opening(self) -> bytes:
        """The first line. Asked for again in mid-life, it opens a new log."""
        scheduler = self._scheduler
        if isinstance(scheduler, ControlScheduler):
            return _line(ControlOpening(version=VERSION, state=scheduler.state()))
        return _line(NodeOpening(version=VERSION, state=scheduler.state()))

    def line(self, now: float, event: Event | Action, actions: Sequence[Action]) -> bytes:
        return _line(Step(now=now, event=event, actions=list(actions)))


def replay(lines: Iterable[bytes]) -> Replay:
    """Runs a log again. Raises `ProtocolError` for a log that is damaged elsewhere than at its very end."""
    source = iter(lines)
    opening = _opening(next(source, b""))
    scheduler = _revived(opening)
    differences = []
    times: list[float] = []
    truncated = False
    for number, line in enumerate(source, start=2):
        step = _step(line, number)
        if step is None:
            truncated = True
            break
        times.append(step.now)
        replayed = _decide(scheduler, step)
        if replayed != step.actions:
            differences.append(Difference(line=number, step=step, replayed=replayed))
    return Replay(
        scheduler="control" if isinstance(opening, ControlOpening) else "node",
        steps=len(times),
        span_s=times[-1] - times[0] if times else 0.0,
        truncated=truncated,
        differences=tuple(differences),
    )


def _decide(scheduler: ControlScheduler | NodeScheduler, step: Step) -> list[Action]:
    # Each kind passes over what is not for it, so a log may hold whatever its loop passed on.
    return scheduler.on(step.event, step.now)  # type: ignore[arg-type]


def _revived(opening: ControlOpening | NodeOpening) -> ControlScheduler | NodeScheduler:
    match opening:
        case ControlOpening():
            return ControlScheduler.from_state(opening.state)
        case NodeOpening():
            return NodeScheduler.from_state(opening.state)


def _opening(line: bytes) -> ControlOpening | NodeOpening:
    try:
        opening = _openings.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise ProtocolError(f"line 1 does not open a decision log: {fault}") from None
    if opening.version != VERSION:
        raise ProtocolError(f"the log is of version {opening.version}, and this release replays version {VERSION}")
    return opening


def _step(line: bytes, number: int) -> Step | None:
    """The line as a step, or `None` for a line cut short, which only the last can be."""
    try:
        return _steps.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        if line.endswith(b"\n"):
            raise ProtocolError(f"line {number} is damaged: {fault}") from None
        return None


def _line(value: ControlOpening | NodeOpening | Step) -> bytes:
    return _encoder.encode(value) + b"\n"

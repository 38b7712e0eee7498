"""A sight as lines of text: GPUs as bars, models as rows, the newest actions below. Pure; knows columns, not terminals."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from chimera.core.record import Entry
from chimera.core.replica import ReplicaState
from chimera.core.sight import Cast, News, Part, Past, Pool, Pulse, Shelf, Sight, Standing
from chimera.units import MIB, format_bytes, printable

Line = list[tuple[str, str]]
"""Pieces of text, each with its paint."""

_PAINTS = {"": "", "bold": "1", "soft": "2", "good": "32", "warn": "33", "bad": "31"}
_OF_MODELS = ("38;5;37", "38;5;173", "38;5;108", "38;5;139", "38;5;143", "38;5;67", "38;5;132", "38;5;180")
_STATE_PAINT = {"serving": "good", "loading": "warn", "draining": "warn", "quarantined": "bad", "down": "soft"}
_ACTION_PAINT = {"failed": "bad", "lost": "bad", "reject": "bad", "ready": "good", "deactivate": "warn", "requeue": "warn"}
_MOST_NEWS = 50
_BAR = 32


class Panorama:
    """The newest sight, in the cast that it is told in."""

    def __init__(self) -> None:
        self.cast = Cast()
        self.sight: Sight | None = None
        self.news: list[tuple[int, Entry]] = []
        self.away = ""
        """Why there is nothing newer."""

    def see(self, sight: Sight) -> bool:
        """Whether it can be read: who has just come knows no cast."""
        if sight.changed is not None and self.cast.number:
            self.cast = sight.changed
        if sight.cast != self.cast.number:
            return False
        self.sight, self.away = sight, ""
        self._remember(sight.news)
        return True

    def look_back(self, past: Past) -> None:
        self.cast = past.cast
        self._remember(past.news)

    def _remember(self, news: Iterable[News]) -> None:
        newest = self.news[-1][0] if self.news else 0
        self.news += [(one.number, one.entry) for one in news if one.number > newest]
        del self.news[:-_MOST_NEWS]


def rendered(view: Panorama, columns: int, lines: int) -> list[Line]:
    """Exactly so many lines, none wider than that."""
    sight = view.sight
    if sight is None:
        return [_fit([("nothing to see yet", "soft")], columns)] + [[] for _ in range(lines - 1)]
    left = lines - 4  # the head, the models' head, and two gaps
    gpus = min(len(view.cast.gpus), max(2, left // 3))
    actions = min(len(view.news), max(3, left // 5))
    if actions:
        left -= 1
    models = left - gpus - actions
    picture = [_head(view, sight, columns), []]
    picture += [*_gpus(view.cast, sight, gpus), []]
    picture += _models(view.cast, sight, models, columns)
    if actions:
        picture += [[], *(_action(entry) for _, entry in view.news[-actions:])]
    picture = [_fit(line, columns) for line in picture[:lines]]
    return picture + [[] for _ in range(lines - len(picture))]


def plain(line: Line) -> str:
    return "".join(text for text, _ in line).rstrip()


def painted(line: Line) -> str:
    return "".join(f"\x1b[{_PAINTS.get(paint, paint)}m{text}\x1b[0m" if paint else text for text, paint in line)


def _head(view: Panorama, sight: Sight, columns: int) -> Line:
    up = len({one.model for one in sight.replicas if one.state is ReplicaState.SERVING})
    sent, kept = sum(pulse.sent for pulse in sight.pulses), sum(pulse.kept for pulse in sight.pulses)
    said = f" {sight.policy}, {sight.local} · {up} of {len(view.cast.models)} up"
    said += (
        f" · {sum(p.requests_per_s for p in sight.pulses):.1f} req/s · {sum(p.tokens_per_s for p in sight.pulses):,.0f} tok/s"
    )
    said += f" · {_share(kept, sent)} kept" if sent else ""
    state = ("away", "bad") if view.away else (_clock(sight.at_s), "soft")
    if len("chimera") + len(said) + len(state[0]) >= columns and not view.away:
        state = ("", "")  # the time can be read elsewhere
    room = columns - len("chimera") - len(state[0]) - 1
    return [("chimera", "bold"), (_cut(said, room).ljust(room), ""), (" ", ""), state]


def _gpus(cast: Cast, sight: Sight, most: int) -> list[Line]:
    shown = list(zip(cast.gpus, sight.shelves, strict=False))
    folded = len(shown) - most
    found: list[Line] = []
    digits = max((len(str(device.gpu_id)) for device, _ in shown), default=1)
    for device, shelf in shown[: most - (folded > 0)]:
        names = " ".join(printable(_name(cast, pool.model)) for pool in shelf.pools)
        room = f"{_size(max(0, device.mib - _held(shelf))):>9} free "
        found.append([(f"GPU {device.gpu_id:>{digits}} ", "bold"), *_bar(shelf, device.mib), (room, "soft"), (names, "")])
    if folded > 0:
        rest = shown[most - 1 :]
        held, whole = sum(_held(shelf) for _, shelf in rest), sum(device.mib for device, _ in rest)
        found.append([(f"and {len(rest)} more GPUs, {_size(whole - held)} free of {_size(whole)}", "soft")])
    return found


def _bar(shelf: Shelf, mib: int) -> Line:
    """From the left: what is nobody's, weights, and the pools; full where tokens lie, light where they may."""
    parts: list[tuple[int, str, str]] = [(shelf.others + shelf.engines + shelf.adapters, "▒", "soft")]
    parts += [(pool.weights, "▓", _paint(pool.model)) for pool in shelf.pools]
    for pool in shelf.pools:
        parts += [(pool.used, "█", _paint(pool.model)), (pool.kv - pool.used, "░", _paint(pool.model))]
    bar: Line = []
    held = drawn = 0
    for part, block, paint in parts:
        held += part
        until = min(_BAR, round(_BAR * held / max(1, mib)))
        bar.append((block * (until - drawn), paint))
        drawn = until
    return [*bar, ("·" * (_BAR - drawn), "soft")]


def _models(cast: Cast, sight: Sight, most: int, columns: int) -> list[Line]:
    replicas: dict[int, list[Standing]] = {}
    for one in sight.replicas:
        replicas.setdefault(one.model, []).append(one)
    pulses = {pulse.model: pulse for pulse in sight.pulses}
    rows = [
        _Row(part, place, replicas.get(place, []), pulses.get(place, Pulse(place))) for place, part in enumerate(cast.models)
    ]
    rows.sort(key=lambda row: (-row.busy, row.state == "down", row.place))
    name = columns - sum(size for _, size, _ in _COLUMNS) - len(_COLUMNS)
    head: Line = [("MODEL".ljust(name), "soft")]
    head += [(f" {align(word, size)}", "soft") for word, size, align in _COLUMNS]
    folded = len(rows) - most
    found = [head, *(row.line(name) for row in rows[: most - (folded > 0)])]
    if folded > 0:
        found.append([(f"and {folded + 1} more models", "soft")])
    return found


class _Row:
    def __init__(self, part: Part, place: int, replicas: Sequence[Standing], pulse: Pulse) -> None:
        best = next((one for one in replicas if one.state is ReplicaState.SERVING), replicas[0] if replicas else None)
        self.part, self.place, self.replicas, self.pulse = part, place, replicas, pulse
        self.state = "down" if best is None or best.state is ReplicaState.STOPPED else str(best.state)
        if best is not None and best.quarantine_s is not None:
            self.state = "quarantined"
        self.running = sum(one.running for one in replicas)
        self.queue = sum(one.queued for one in replicas) + pulse.waiting
        self.busy = self.running + self.queue

    def line(self, name: int) -> Line:
        promised = self.part.ttft_slo_s is not None or self.part.tpot_slo_s is not None
        used, leased = (sum(getattr(one, field) for one in self.replicas) for field in ("kv_used_tokens", "kv_tokens"))
        told = (
            self.state,
            " ".join(",".join(map(str, one.gpu_ids)) for one in self.replicas),
            str(self.running or ""),
            str(self.queue or ""),
            _share(self.pulse.kept, self.pulse.sent) if promised and self.pulse.sent else "",
            f"{self.pulse.tokens_per_s:,.0f}" if self.pulse.tokens_per_s else "",
            f"{_tokens(used, self.part)} of {_tokens(leased, self.part)}" if leased else "",
        )
        cells: Line = [(_pad(("*" if self.part.pin else "") + printable(self.part.name), name), "bold" if self.busy else "")]
        for text, (word, size, align) in zip(told, _COLUMNS, strict=True):
            cells.append((" " + align(_cut(text, size), size), _STATE_PAINT.get(text, "") if word == "STATE" else ""))
        return cells


def _left(text: str, size: int) -> str:
    return text.ljust(size)


def _right(text: str, size: int) -> str:
    return text.rjust(size)


_COLUMNS: tuple[tuple[str, int, Callable[[str, int], str]], ...] = (
    ("STATE", 11, _left),
    ("GPU", 5, _left),
    ("RUN", 4, _right),
    ("QUEUE", 5, _right),
    ("KEPT", 6, _right),
    ("TOK/S", 6, _right),
    ("KV USED", 20, _right),
)


def _action(entry: Entry) -> Line:
    subject = printable(entry.replica or entry.model)
    return [
        (f"{_clock(entry.at_s)} ", "soft"),
        (f"{entry.what} ", _ACTION_PAINT.get(entry.what, "bold")),
        (f"{subject} " if subject else "", ""),
        (printable(entry.reason), "soft"),
    ]


def _fit(line: Line, columns: int) -> Line:
    fitted: Line = []
    for text, paint in line:
        taken = _cut(text, columns)
        columns -= width(taken)
        if taken:
            fitted.append((taken, paint))
    return fitted


def width(text: str) -> int:
    """In columns of a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cut(text: str, columns: int) -> str:
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 1:
        text = text[:-1]
    return text + "…" if columns > 0 else ""


def _pad(text: str, columns: int) -> str:
    text = _cut(text, columns)
    return text + " " * (columns - width(text))


def _name(cast: Cast, model: int) -> str:
    return cast.models[model].name if 0 <= model < len(cast.models) else "others"


def _paint(model: int) -> str:
    return _OF_MODELS[model % len(_OF_MODELS)]


def _held(shelf: Shelf) -> int:
    return shelf.engines + shelf.adapters + shelf.others + sum(_of(pool) for pool in shelf.pools)


def _of(pool: Pool) -> int:
    return pool.weights + pool.kv


def _size(mib: int) -> str:
    return format_bytes(mib * MIB)


def _tokens(tokens: int, part: Part) -> str:
    return format_bytes(tokens * part.kv_bytes // MIB * MIB)


def _share(part: int, whole: int) -> str:
    return "100 %" if part == whole else f"{min(99.9, 100 * part / whole):.1f}%"


def _clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))

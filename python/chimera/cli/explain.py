"""`chimera explain`: why a request, a model or a moment went as it did. Asks a running server, or reads a file of records."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from urllib.parse import urlencode

import msgspec

from chimera.cli.server_url import DEFAULT_URL, ServerError, request
from chimera.errors import ConfigError, RequestError
from chimera.records import questions
from chimera.records.questions import Account, Happening, RequestAccount
from chimera.records.store import open_to_read
from chimera.units import parse_seconds, printable

_ANSWER_WITHIN_S = 30.0
_MOST_WEIGHED = 5


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", help="a request, by its own name or its client's; or a model (default: everything)")
    parser.add_argument("--since", default="10m", metavar="10m", help="how far back (default: %(default)s)")
    parser.add_argument("--at", metavar="TIME", help="what happened around then: 14:03:20, 2026-03-01T14:03:20, or seconds")
    parser.add_argument("--leases", action="store_true", help="show grants and recalls, too")
    parser.add_argument("--records", type=Path, metavar="FILE", help="read this file in place of asking a server")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the answer as it is")


def run(arguments: argparse.Namespace) -> int:
    at_s = None if arguments.at is None else _moment(arguments.at)
    account = _read(arguments, at_s) if arguments.records is not None else _asked(arguments, at_s)
    if arguments.json:
        print(msgspec.json.encode(account).decode())
    elif isinstance(account, RequestAccount):
        print("\n".join(request_lines(account)))
    else:
        print("\n".join(account_lines(account, leases=arguments.leases)))
    return 0


def _asked(arguments: argparse.Namespace, at_s: float | None) -> RequestAccount | Account:
    words = {"since": arguments.since}
    if arguments.what:
        words["what"] = arguments.what
    if at_s is not None:
        words = {"at": repr(at_s)}
    with request(arguments.url, "GET", f"/explain?{urlencode(words)}", within_s=_ANSWER_WITHIN_S) as response:
        document = response.read()
    try:
        return msgspec.json.decode(document, type=RequestAccount | Account)
    except msgspec.DecodeError as fault:
        raise ServerError(f"{arguments.url} explains itself as another release does: {fault}") from None


def _read(arguments: argparse.Namespace, at_s: float | None) -> RequestAccount | Account:
    with contextlib.closing(open_to_read(arguments.records)) as store:
        newest_s = store.execute("SELECT max(at) FROM entries").fetchone()[0] or time.time()
        if at_s is not None:
            return questions.moment(store, at_s)
        try:
            since_s = newest_s - parse_seconds(arguments.since)
        except ValueError as fault:
            raise ConfigError.single("--since", str(fault)) from None
        if not arguments.what:
            return questions.house(store, since_s, newest_s)
        if store.execute("SELECT 1 FROM entries WHERE model = ? LIMIT 1", (arguments.what,)).fetchone():
            return questions.model(store, arguments.what, since_s, newest_s)
        try:
            return questions.request(store, arguments.what)
        except RequestError as fault:
            raise ConfigError.single("explain", fault.message) from None


def request_lines(account: RequestAccount) -> Iterator[str]:
    return map(printable, _of_request(account))


def account_lines(account: Account, *, leases: bool = False) -> Iterator[str]:
    return map(printable, _of_time(account, leases=leases))


def _of_request(account: RequestAccount) -> Iterator[str]:
    yield f"request {account.request} to {account.model}: {account.outcome}" + (
        f" ({account.client})" if account.client else ""
    )
    if account.detail:
        yield f"  because {account.detail}"
    kept = " and ".join(
        f"{'kept' if kept else 'missed'} its {name} of {promise:g} s"
        for name, promise, kept in (
            ("TTFT", account.ttft_slo_s, account.kept_ttft),
            ("TPOT", account.tpot_slo_s, account.kept_tpot),
        )
        if promise is not None
    )
    tokens = f"{account.prompt_tokens} tokens in, {account.output_tokens} out, {account.cached_tokens} from a cache"
    yield f"  {tokens}{'; ' + kept if kept else ''}"
    yield f"  {_clock(account.arrived_s)} it came"
    for name, start_s, end_s in account.spans:
        yield f"  {start_s - account.arrived_s:+9.3f} s  {end_s - start_s:8.3f} s  {name}"
    for one in account.tries:
        yield f"  try {one.number + 1} on {one.replica}: {one.outcome}; {one.why}"
    yield from _section("meanwhile", account.happenings, leases=False)


def _of_time(account: Account, *, leases: bool) -> Iterator[str]:
    whose = account.model or "everything"
    yield f"{whose} from {_clock(account.since_s)} to {_clock(account.until_s)}"
    for one in account.statistics:
        refused = ", ".join(f"{count} {code}" for code, count in one.refused.items())
        attained = "" if one.joint_attainment is None else f", {100 * one.joint_attainment:.1f} % kept both promises"
        yield f"  {one.model}: {one.sent} requests, {one.answered} answered{attained}{'; ' + refused if refused else ''}"
    shown = [h for h in account.happenings if leases or h.what not in ("grant", "recall")]
    hidden = len(account.happenings) - len(shown)
    yield from _section("what was done", shown, leases=leases)
    if hidden:
        yield f"  ({hidden} grants and recalls: --leases shows them)"
    if account.truncated:
        yield "  (there was more before that)"


def _section(title: str, happenings: list[Happening] | tuple[Happening, ...], *, leases: bool) -> Iterator[str]:
    if happenings:
        yield f"{title}:"
    for happening in happenings:
        if leases or happening.what not in ("grant", "recall"):
            yield from _happening(happening)


def _happening(one: Happening) -> Iterator[str]:
    whom = one.replica or one.model or ""
    where = f" on GPU {','.join(map(str, one.gpus))}" if one.gpus and one.replica else ""
    moved = " (a move)" if one.move else ""
    code = f" {one.code}" if one.code else ""
    pages = "" if one.pages is None else f" to {one.pages} pages"
    whom = whom or one.request[:12]
    yield f"  {_clock(one.at_s)}  {one.what}{code} {whom}{where}{pages}{moved}: {one.why}"
    if one.cost:
        yield f"                cost: {one.cost}"
    for other in one.alternatives[:_MOST_WEIGHED]:
        yield f"                {'→' if other.chosen else ' '} {other.score:+.3f}  {other.what}"
    if one.alternatives:
        yield f"                  ({one.alternatives[0].unit})"


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).strftime("%H:%M:%S.%f")[:-3]


def _moment(text: str) -> float:
    """A time of today, a date and time, or seconds since 1970."""
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        return datetime.combine(datetime.now().date(), datetime.strptime(text, "%H:%M:%S").time()).timestamp()
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    raise ConfigError.single("--at", f"{text!r} is no moment", hint="like 14:03:20 or 2026-03-01T14:03:20")

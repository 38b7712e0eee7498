"""Why it went as it did: answers made of the store's rows. Pure reading; the same for the command line and for HTTP.

An account is what somebody asked about, line by line: what happened, why, what it cost, and what else was weighed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from chimera.core.record import Alternative
from chimera.errors import RequestError

MOST_LINES: Final = 1000
AROUND_S: Final = 5.0
"""A moment is so many seconds to either side."""

_weighed = msgspec.json.Decoder(tuple[Alternative, ...])


class Happening(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line: something that was done, and what came of it."""

    id: int = 0
    at_s: float
    """On the wall's clock."""
    what: str
    model: str = ""
    replica: str = ""
    gpus: tuple[int, ...] = ()
    request: str = ""
    code: str = ""
    why: str = ""
    move: bool = False
    seconds: float | None = None
    pages: int | None = None
    cost: str = ""
    """In words: how long it took, what had to go elsewhere."""
    alternatives: tuple[Alternative, ...] = ()


class Try(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    replica: str
    why: str
    routed_s: float
    admitted_s: float | None
    ended_s: float
    outcome: str
    output_tokens: int
    cached_tokens: int


class RequestAccount(msgspec.Struct, frozen=True, kw_only=True, tag_field="of", tag="request"):
    """One request from its arrival to its end."""

    request: str
    client: str
    trace: str
    key: str
    model: str
    arrived_s: float
    first_token_s: float | None
    ended_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    outcome: str
    detail: str
    ttft_slo_s: float | None
    tpot_slo_s: float | None
    kept_ttft: bool
    kept_tpot: bool
    tries: tuple[Try, ...]
    happenings: tuple[Happening, ...]
    """Of the request itself, and of its model meanwhile."""
    prompt: str = ""
    answer: str = ""

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """Where its time went: name, beginning and end, in order."""
        found: list[tuple[str, float, float]] = []
        since = self.arrived_s
        for one in self.tries:
            found.append(("waits for a replica", since, one.routed_s))
            since = one.routed_s
            if one.admitted_s is not None:
                found.append((f"waits for its turn on {one.replica}", since, one.admitted_s))
                since = one.admitted_s
            first = self.first_token_s
            if first is not None and since < first <= one.ended_s:
                found.append(("prompt", since, first))
                since = first
            found.append(("tokens" if first is not None and since >= first else "no token came", since, one.ended_s))
            since = one.ended_s
        if not self.tries:
            found.append(("waits for a replica", since, self.ended_s))
        return [(name, a, b) for name, a, b in found if b > a]


class RequestLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request in a list of them."""

    request: str
    model: str
    arrived_s: float
    first_token_s: float | None
    ended_s: float
    prompt_tokens: int
    output_tokens: int
    outcome: str
    kept: bool
    """Both promises."""
    tries: int


class ModelStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One model's requests over a stretch of time."""

    model: str
    sent: int
    answered: int
    ttft_attainment: float | None
    tpot_attainment: float | None
    joint_attainment: float | None
    mean_ttft_s: float | None
    mean_e2e_s: float | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    requeued: int
    refused: dict[str, int] = {}


class Account(msgspec.Struct, frozen=True, kw_only=True, tag_field="of", tag="time"):
    """A model, or the whole house, over a stretch of time."""

    model: str
    since_s: float
    until_s: float
    statistics: tuple[ModelStatistics, ...]
    happenings: tuple[Happening, ...]
    truncated: bool = False
    """There were more; these are the newest."""


def request(store: sqlite3.Connection, name: str) -> RequestAccount:
    """By its own name or its client's. RequestError when there is none."""
    row = store.execute(
        "SELECT * FROM requests WHERE request = ?1 OR (client = ?1 AND client != '') ORDER BY arrived DESC LIMIT 1", (name,)
    ).fetchone()
    if row is None:
        raise no_such_request(name)
    tries = store.execute("SELECT * FROM attempts WHERE request = ? ORDER BY ended", (row["request"],))
    own = store.execute("SELECT * FROM entries WHERE request = ? ORDER BY id", (row["request"],)).fetchall()
    around = store.execute(
        "SELECT * FROM entries WHERE model = ? AND at BETWEEN ? AND ? AND request = '' ORDER BY id LIMIT 200",
        (row["model"], row["arrived"], row["ended"]),
    ).fetchall()
    return RequestAccount(
        request=row["request"],
        client=row["client"],
        trace=row["trace"],
        key=row["key"],
        model=row["model"],
        arrived_s=row["arrived"],
        first_token_s=row["first_token"],
        ended_s=row["ended"],
        prompt_tokens=row["prompt_tokens"],
        output_tokens=row["output_tokens"],
        cached_tokens=row["cached_tokens"],
        outcome=row["outcome"],
        detail=row["detail"],
        ttft_slo_s=row["ttft_slo"],
        tpot_slo_s=row["tpot_slo"],
        kept_ttft=bool(row["kept_ttft"]),
        kept_tpot=bool(row["kept_tpot"]),
        tries=tuple(_try(one) for one in tries),
        happenings=_told(store, sorted([*own, *around], key=lambda entry: entry["id"])),
        prompt=row["prompt"],
        answer=row["answer"],
    )


def no_such_request(name: str) -> RequestError:
    return RequestError("not_found", f"no request {name} is in the records; running ones come when they have ended")


def model(store: sqlite3.Connection, name: str, since_s: float, until_s: float) -> Account:
    """All that was done to a model. One that is in no record has an empty account."""
    return _account(store, name, since_s, until_s)


def moment(store: sqlite3.Connection, at_s: float) -> Account:
    """All that was done anywhere around one moment."""
    return _account(store, "", at_s - AROUND_S, at_s + AROUND_S)


def house(store: sqlite3.Connection, since_s: float, until_s: float) -> Account:
    return _account(store, "", since_s, until_s)


def recent_requests(store: sqlite3.Connection, most: int, model: str = "") -> tuple[RequestLine, ...]:
    """The newest first."""
    where, values = ("WHERE model = ?", (model, most)) if model else ("", (most,))
    rows = store.execute(f"SELECT * FROM requests {where} ORDER BY arrived DESC LIMIT ?", values)
    return tuple(
        RequestLine(
            request=row["request"],
            model=row["model"],
            arrived_s=row["arrived"],
            first_token_s=row["first_token"],
            ended_s=row["ended"],
            prompt_tokens=row["prompt_tokens"],
            output_tokens=row["output_tokens"],
            outcome=row["outcome"],
            kept=bool(row["kept_ttft"] and row["kept_tpot"]),
            tries=row["tries"],
        )
        for row in rows
    )


def statistics(store: sqlite3.Connection, since_s: float, until_s: float, model: str = "") -> tuple[ModelStatistics, ...]:
    where = "arrived BETWEEN ? AND ?" + (" AND model = ?" if model else "")
    values = (since_s, until_s, *([model] if model else []))
    answered = "outcome IN ('stop', 'length')"
    rows = store.execute(
        f"""SELECT model, count(*) AS sent, sum({answered}) AS answered, sum(kept_ttft) AS ttft, sum(kept_tpot) AS tpot,
            sum(kept_ttft AND kept_tpot) AS joint, avg(first_token - arrived) AS mean_ttft,
            avg(CASE WHEN {answered} THEN ended - arrived END) AS mean_e2e, sum(prompt_tokens) AS prompt,
            sum(output_tokens) AS output, sum(cached_tokens) AS cached, sum(tries) AS requeued
            FROM requests WHERE {where} GROUP BY model ORDER BY model""",
        values,
    ).fetchall()
    refused: dict[str, dict[str, int]] = {}
    for row in store.execute(
        f"SELECT model, outcome, count(*) FROM requests WHERE {where} AND NOT {answered} GROUP BY model, outcome", values
    ):
        refused.setdefault(row[0], {})[row[1]] = row[2]
    return tuple(
        ModelStatistics(
            model=row["model"],
            sent=row["sent"],
            answered=row["answered"],
            ttft_attainment=row["ttft"] / row["sent"],
            tpot_attainment=row["tpot"] / row["sent"],
            joint_attainment=row["joint"] / row["sent"],
            mean_ttft_s=row["mean_ttft"],
            mean_e2e_s=row["mean_e2e"],
            prompt_tokens=row["prompt"],
            output_tokens=row["output"],
            cached_tokens=row["cached"],
            requeued=row["requeued"],
            refused=refused.get(row["model"], {}),
        )
        for row in rows
    )


def _account(store: sqlite3.Connection, model: str, since_s: float, until_s: float) -> Account:
    where = "at BETWEEN ? AND ?" + (" AND model = ?" if model else "")
    values = (since_s, until_s, *([model] if model else []), MOST_LINES + 1)
    rows = store.execute(f"SELECT * FROM entries WHERE {where} ORDER BY id DESC LIMIT ?", values).fetchall()
    return Account(
        model=model,
        since_s=since_s,
        until_s=until_s,
        statistics=statistics(store, since_s, until_s, model),
        happenings=_told(store, list(reversed(rows[:MOST_LINES]))),
        truncated=len(rows) > MOST_LINES,
    )


def _told(store: sqlite3.Connection, rows: Sequence[sqlite3.Row]) -> tuple[Happening, ...]:
    return tuple(_happening(row, _cost(store, row)) for row in rows)


def _happening(row: sqlite3.Row, cost: str) -> Happening:
    return Happening(
        id=row["id"],
        at_s=row["at"],
        what=row["what"],
        model=row["model"],
        replica=row["replica"],
        gpus=_numbers(row["gpus"].split(",")),
        request=row["request"],
        code=row["code"],
        why=row["reason"],
        move=bool(row["move"]),
        seconds=row["seconds"],
        pages=row["pages"],
        cost=cost,
        alternatives=_weighed.decode(row["alternatives"]) if row["alternatives"] else (),
    )


def _cost(store: sqlite3.Connection, row: sqlite3.Row) -> str:
    match row["what"]:
        case "activate":
            after = _next(store, row, ("ready", "failed", "lost", "stopped"))
            if after is None:
                return "it is still coming up"
            return f"{after['at'] - row['at']:.2f} s until it was {after['what']}"
        case "deactivate":
            after = _next(store, row, ("stopped", "lost"))
            if after is None:
                return "it still drains"
            sent_back = store.execute(
                "SELECT count(*) FROM attempts WHERE replica = ? AND ended BETWEEN ? AND ? AND outcome = 'requeued'",
                (row["replica"], row["at"], after["at"] + 0.5),
            ).fetchone()[0]
            return f"{after['at'] - row['at']:.2f} s until it was gone; {_count(sent_back, 'request')} went elsewhere"
        case "reject":
            again = "" if row["seconds"] is None else f"; told to come again in {row['seconds']:.1f} s"
            return f"one request was not served{again}"
        case "requeue":
            return "one request began again with the tokens it had"
        case _:
            return ""


def _next(store: sqlite3.Connection, row: sqlite3.Row, what: tuple[str, ...]) -> Any:
    """The first of these that became of the same replica."""
    marks = ",".join("?" * len(what))
    return store.execute(
        f"SELECT at, what FROM entries WHERE model = ? AND replica = ? AND at >= ? AND id > ? AND what IN ({marks}) LIMIT 1",
        (row["model"], row["replica"], row["at"], row["id"], *what),
    ).fetchone()


def _try(row: sqlite3.Row) -> Try:
    return Try(
        number=row["try"],
        replica=row["replica"],
        why=row["reason"],
        routed_s=row["routed"],
        admitted_s=row["admitted"],
        ended_s=row["ended"],
        outcome=row["outcome"],
        output_tokens=row["output_tokens"],
        cached_tokens=row["cached_tokens"],
    )


def _numbers(parts: Iterable[str]) -> tuple[int, ...]:
    return tuple(int(part) for part in parts if part)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

"""What can be read of the server: what it has counted, and why it did what it did. Gives no orders.

Metrics come from control; explanations from the store that control writes, which any front-end can read beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from aiohttp import web

from chimera.core.access import ApiKey
from chimera.errors import ConfigError, RequestError
from chimera.records import questions
from chimera.records.questions import MOST_LINES, Account, RequestAccount, RequestLine
from chimera.records.store import open_to_read
from chimera.server import metrics
from chimera.server.blinds import Blinds
from chimera.server.bodies import json_response
from chimera.server.catalogue import Catalogue
from chimera.server.gate import GUEST
from chimera.server.relay import Relay
from chimera.server.routes import Route
from chimera.units import parse_seconds


class Observatory:
    def __init__(self, catalogue: Catalogue, relay: Relay, records: Path | None = None) -> None:
        self._catalogue = catalogue
        self._relay = relay
        self._records = records

    def routes(self) -> list[Route]:
        return [
            Route(
                "GET /metrics", "What the whole server has counted, for Prometheus", self._metrics, text=metrics.CONTENT_TYPE
            ),
            Route(
                "GET /explain",
                "What happened to a request (`request=`), a model (`model=`, `since=10m`) or at a moment (`at=`), and why",
                self._explain,
                gives=RequestAccount | Account,
                fails=(400, 404),
            ),
            Route(
                "GET /requests",
                "The requests that ended last (`most=50`), maybe of one model (`model=`); `/explain` tells of each",
                self._requests,
                gives=tuple[RequestLine, ...],
                fails=(400, 404),
            ),
        ]

    async def _metrics(self, http: web.Request) -> web.Response:
        """For the whole server, whichever front-end is asked. `?names=own,vllm,sglang` leaves the others out."""
        families = tuple(http.query.get("names", ",".join(metrics.FAMILIES)).split(","))
        if unknown := set(families) - set(metrics.FAMILIES):
            known = ", ".join(metrics.FAMILIES)
            raise RequestError("bad_request", f"names: {', '.join(sorted(unknown))} is not one of {known}", param="names")
        measures, snapshot = await self._relay.measures()
        blinds = Blinds(http[GUEST].key, snapshot.models)
        measures, snapshot = blinds.measures(measures), blinds.snapshot(snapshot)
        # In a thread: with hundreds of models the page is long, and streams do not wait for it.
        text = await asyncio.to_thread(metrics.page, measures, snapshot, families)
        return web.Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _explain(self, http: web.Request) -> web.Response:
        question = Question.of(http, self._catalogue)
        guest = http[GUEST]
        if question.model:
            guest.require(question.model)
        account = await asyncio.to_thread(self._ask, question)
        if isinstance(account, RequestAccount) and not guest.key.allows(account.model):
            raise questions.no_such_request(question.request)  # nor may its model be named
        return json_response(self._seen(account, guest.key))

    def _seen(self, account: RequestAccount | Account, key: ApiKey) -> RequestAccount | Account:
        told = {one.model for one in account.happenings if one.model}
        if isinstance(account, Account):
            told |= {one.model for one in account.statistics}
        blinds = Blinds(key, [spec for spec, _ in self._catalogue.models], gone=told)
        return blinds.account(account) if isinstance(account, Account) else blinds.request(account)

    async def _requests(self, http: web.Request) -> web.Response:
        words = http.query
        if unknown := set(words) - {"model", "most"}:
            raise RequestError("bad_request", f"{', '.join(sorted(unknown))}: ask by model and most")
        most = words.get("most", "50")
        if not most.isdecimal() or not 1 <= int(most) <= MOST_LINES:
            raise RequestError("bad_request", f"most: a number from 1 to {MOST_LINES}", param="most")
        lines = await asyncio.to_thread(self._ended, int(most), words.get("model", ""))
        allows = http[GUEST].key.allows
        return json_response([line for line in lines if allows(line.model)])

    def _ended(self, most: int, model: str) -> tuple[RequestLine, ...]:
        with self._store() as store:
            return questions.recent_requests(store, most, model)

    def _ask(self, question: Question) -> RequestAccount | Account:
        with self._store() as store:
            return question.answer(store, time.time())

    @contextlib.contextmanager
    def _store(self) -> Iterator[sqlite3.Connection]:
        if self._records is None:
            raise RequestError("not_found", "this server keeps no records (--records off)")
        try:
            with contextlib.closing(open_to_read(self._records)) as store:
                yield store
        except (ConfigError, sqlite3.Error) as fault:
            raise RequestError("service_unavailable", f"the records cannot be read: {fault}", retry_after_s=1) from None


class Question(msgspec.Struct, frozen=True, kw_only=True):
    request: str = ""
    model: str = ""
    at_s: float | None = None
    since_s: float = 600.0

    @classmethod
    def of(cls, http: web.Request, catalogue: Catalogue) -> Question:
        """`what=` is a model if there is one of that name, else a request."""
        words = http.query
        if unknown := set(words) - {"what", "request", "model", "at", "since"}:
            raise RequestError("bad_request", f"{', '.join(sorted(unknown))}: ask by request, model, at or since")
        request, model = words.get("request", ""), words.get("model", "")
        if what := words.get("what", ""):
            known = {name for spec, _ in catalogue.models for name in (spec.name, *spec.aliases)}
            request, model = ("", what) if what in known else (what, "")
        if model:
            with contextlib.suppress(RequestError):  # one that was removed has its records still
                model = catalogue.resolve(model).name
        return cls(request=request, model=model, at_s=_moment(words.get("at")), since_s=_stretch(words.get("since", "10m")))

    def answer(self, store: sqlite3.Connection, now_s: float) -> RequestAccount | Account:
        if self.request:
            return questions.request(store, self.request)
        if self.at_s is not None:
            return questions.moment(store, self.at_s)
        if self.model:
            return questions.model(store, self.model, now_s - self.since_s, now_s)
        return questions.house(store, now_s - self.since_s, now_s)


def _moment(text: str | None) -> float | None:
    """Seconds since 1970, or a date and time as ISO 8601 writes it."""
    if text is None:
        return None
    try:
        at_s = float(text) if re.fullmatch(r"[\d.]+", text) else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        told = f"at: {text[:40]!r} is no moment; like 2026-03-01T14:03:20, or seconds since 1970"
        raise RequestError("bad_request", told, param="at") from None
    return at_s


def _stretch(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as fault:
        raise RequestError("bad_request", f"since: {fault}", param="since") from None

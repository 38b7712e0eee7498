"""The page at `/`, and the stream that feeds it and `chimera top`: one sight a second, asked once for all
viewers, and encoded once for those who may see the same.

The page is files beside this one, sent as they are; nothing in it comes from elsewhere, and nothing of the server is in it.
Whoever falls behind is let go and comes again. Knows no model and gives no orders: the page's buttons are the operator's verbs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Final

import msgspec
from aiohttp import web

import chimera
from chimera.core.access import ApiKey
from chimera.core.sight import Cast, Past, Sight
from chimera.errors import RequestError
from chimera.server.blinds import Blinds
from chimera.server.bodies import json_response
from chimera.server.gate import GUEST
from chimera.server.readers import STREAM_HEADERS
from chimera.server.relay import Relay
from chimera.server.routes import Route

_EVERY_S: Final = 1.0
_MOST_UNREAD: Final = 30
"""A viewer that leaves so many seconds unread is let go."""
_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS: Final = {
    # Only what is served here runs there, and no text becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="of", tag="welcome"):
    """The first event: what the one who watches may do."""

    version: str
    admin: bool
    key: str
    """The name of the key that it came with."""


class Away(msgspec.Struct, frozen=True, kw_only=True, tag_field="of", tag="away"):
    """There is nothing to see for now, and why."""

    why: str


class Dashboard:
    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.viewers: dict[asyncio.Queue[bytes | None], ApiKey] = {}
        self._watching: asyncio.Task[None] | None = None
        self._cast = Cast()
        """What the newest second was told in."""
        self._page = {path.name: path.read_bytes() for path in (files("chimera.server") / "page").iterdir()}

    def routes(self) -> list[Route]:
        return [
            Route("GET /", "The dashboard", self._index, text=_KINDS["html"], open=True),
            Route("GET /page/{name}", "A file of the dashboard", self._file, text="*/*", fails=(404,), open=True),
            Route(
                "GET /sight",
                "The house as it is, once a second; numbers are places in the cast that `/sight/past` begins with",
                self._sight,
                streams=Welcome | Sight | Away,
                fails=(504,),
            ),
            Route("GET /sight/past", "Memory and actions of the last minutes", self._past, gives=Past, fails=(504,)),
        ]

    # The page.

    async def _index(self, http: web.Request) -> web.Response:
        return self._send(http, "index.html")

    async def _file(self, http: web.Request) -> web.Response:
        name = http.match_info["name"]
        if name not in self._page:
            raise RequestError("not_found", "the dashboard has no such file")
        return self._send(http, name)

    def _send(self, http: web.Request, name: str) -> web.Response:
        content = self._page[name]
        etag = hashlib.sha256(content).hexdigest()[:16]
        if http.if_none_match and any(known.value == etag for known in http.if_none_match):
            return web.Response(status=304, headers=_HEADERS)
        response = web.Response(body=content, headers={**_HEADERS, "Content-Type": _KINDS[name.rpartition(".")[2]]})
        response.etag = etag
        response.enable_compression()
        return response

    # The stream.

    async def _sight(self, http: web.Request) -> web.StreamResponse:
        key = http[GUEST].key
        response = web.StreamResponse(headers=STREAM_HEADERS)
        await response.prepare(http)
        await response.write(_event(Welcome(version=chimera.__version__, admin=key.admin, key=key.name)))
        with contextlib.ExitStack() as leaving:
            unread = self._come(leaving, key)
            while (event := await unread.get()) is not None:
                await response.write(event)
        return response

    async def _past(self, http: web.Request) -> web.Response:
        past = await self._relay.past()
        response = json_response(Blinds(http[GUEST].key, past.cast.models).past(past))
        response.enable_compression()
        return response

    def _come(self, leaving: contextlib.ExitStack, key: ApiKey) -> asyncio.Queue[bytes | None]:
        """One more viewer; the first has the stream begin, the last has it end."""
        unread: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_UNREAD)
        self.viewers[unread] = key
        leaving.callback(self._leave, unread)
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        return unread

    def _leave(self, unread: asyncio.Queue[bytes | None]) -> None:
        self.viewers.pop(unread, None)
        if not self.viewers and self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _watch(self) -> None:
        async for told in self._seconds():
            encoded: dict[tuple[str, ...] | None, bytes] = {}
            for unread, key in list(self.viewers.items()):
                if unread.qsize() >= _MOST_UNREAD - 1:
                    del self.viewers[unread]
                    unread.put_nowait(None)
                    continue
                if key.models not in encoded:
                    encoded[key.models] = _event(self._seen(told, key))
                unread.put_nowait(encoded[key.models])

    async def _seconds(self) -> AsyncIterator[Sight | Away]:
        self._cast, after = Cast(), 0
        while True:
            try:
                sight = await self._relay.sight(cast=self._cast.number, after=after)
            except RequestError as fault:
                yield Away(why=fault.message)
            else:
                first = self._cast.number == 0  # what there was before is told by the past, which each viewer asks for
                self._cast = sight.changed or self._cast
                after = sight.news[-1].number if sight.news else after
                yield msgspec.structs.replace(sight, changed=None, news=()) if first else sight
            await asyncio.sleep(_EVERY_S)

    def _seen(self, told: Sight | Away, key: ApiKey) -> Sight | Away:
        return told if isinstance(told, Away) else Blinds(key, self._cast.models).sight(told, self._cast)


def _event(what: Welcome | Sight | Away) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(what)

"""A route, declared once: what it takes, what it gives, how it may fail, and whose key it asks for.

From this aiohttp's router, the door's list of what is an operator's, and the OpenAPI document are all made. Knows no handler.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from chimera.server import intake
from chimera.server.bodies import read_body

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ABOUT_A_MODEL = (404,)
"""How a request fails that names a model."""
ANSWERED_BY_AN_ENGINE = (404, 408, 429, 502, 504)
"""How a request fails that an engine answers."""


@dataclass(frozen=True, slots=True)
class Route:
    at: str
    """Method and path, as OpenAPI writes it: `GET /v1/models/{name}`. A name in it may have slashes."""
    what: str
    """In a few words."""
    handler: Handler
    _: KW_ONLY
    takes: Any = None
    """The type of the JSON body."""
    gives: Any = None
    """The type of a good answer's JSON body."""
    streams: Any = None
    """The type of each event, where there is an event stream; beside `gives`, one of the two."""
    text: str | None = None
    """The content type of an answer that is no JSON."""
    fails: tuple[int, ...] = ()
    """Statuses beside those that every route has."""
    admin: bool = False
    """Asks for an operator's key."""
    open: bool = False
    """Asks for no key, also where there are some; so it says nothing about anybody."""

    @property
    def method(self) -> str:
        return self.at.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.at.partition(" ")[2]

    def is_at(self, method: str, path: str) -> bool:
        return method == self.method and self._pattern.fullmatch(path) is not None

    def definition(self) -> web.RouteDef:
        return web.route(self.method, re.sub(r"{(\w+)}", r"{\1:.+}", self.path), self.handler)

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(self.path)))


def taking(kind: type[T], work: Callable[[T], Awaitable[web.StreamResponse]]) -> Handler:
    """A handler of one argument: the decoded body."""
    return partial(_take, msgspec.json.Decoder(kind), work)


async def _take(
    decoder: msgspec.json.Decoder[T], work: Callable[[T], Awaitable[web.StreamResponse]], http: web.Request
) -> web.StreamResponse:
    return await work(intake.decode(await read_body(http), decoder))

"""The door: which key a request comes with, what that key may do, how much, and from which sites.

Compares hashes in constant time and never logs a key. Knows paths, headers and clocks; no model's state.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Callable, Iterable

from aiohttp import web
from aiohttp.typedefs import Handler

from chimera.core.access import Access, ApiKey, hash_of
from chimera.errors import RequestError
from chimera.server.routes import Route

_MINUTE_S = 60.0


class Allowance:
    """So much a minute, all of it at once after a minute's silence. May be overdrawn by what is only known afterwards."""

    def __init__(self, per_minute: float, now: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._left = per_minute
        self._now = now
        self._seen_s = now()

    def wait_s(self, amount: float = 0.0) -> float:
        """Seconds until there is so much, or anything at all."""
        self._refill()
        short = max(amount, min(1.0, self._per_minute)) - self._left
        return max(0.0, short * _MINUTE_S / self._per_minute)

    def take(self, amount: float) -> None:
        self._refill()
        self._left -= amount

    def _refill(self) -> None:
        now = self._now()
        self._left = min(self._per_minute, self._left + (now - self._seen_s) * self._per_minute / _MINUTE_S)
        self._seen_s = now


class Guest:
    """One key, and what is left of its allowances."""

    def __init__(self, key: ApiKey, share: float, now: Callable[[], float]) -> None:
        self.key = key
        self._requests = _allowance(key.requests_per_minute, share, now)
        self._tokens = _allowance(key.tokens_per_minute, share, now)

    def admit(self) -> None:
        """One more request. RequestError while the key has used up a limit."""
        for allowance, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            wait_s = 0.0 if allowance is None else allowance.wait_s()
            if wait_s > 0:
                told = f"the key {self.key.name!r} has used up its {what} per minute"
                raise RequestError("rate_limit_exceeded", told, retry_after_s=wait_s)
        if self._requests is not None:
            self._requests.take(1)

    def charge(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)

    def require(self, model: str) -> None:
        if not self.key.allows(model):
            raise RequestError("permission_denied", f"the key {self.key.name!r} may not ask {model}", param="model")


def _allowance(per_minute: int | None, share: float, now: Callable[[], float]) -> Allowance | None:
    return None if per_minute is None else Allowance(per_minute * share, now)


ANYONE = Guest(ApiKey(name="anyone", hash="", admin=True), 1.0, time.monotonic)
GUEST = web.RequestKey("guest", Guest)


class Gate:
    def __init__(self, access: Access, now: Callable[[], float] = time.monotonic) -> None:
        self._guests = [Guest(key, access.share, now) for key in access.keys]
        self._origins = frozenset(access.cors_origins)
        self._guarded: tuple[Route, ...] = ()
        self._open: tuple[Route, ...] = ()

    def guard(self, routes: Iterable[Route]) -> None:
        """What is an operator's, and what is anybody's."""
        routes = list(routes)
        self._guarded = tuple(route for route in routes if route.admin)
        self._open = tuple(route for route in routes if route.open)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is not None and request.method == "OPTIONS" and self._knows(origin):
            return web.Response(status=204)  # a page's question before its request, which comes without a key
        request[GUEST] = self._let_in(request, origin)
        return await handler(request)

    async def on_prepare(self, http: web.Request, response: web.StreamResponse) -> None:
        """Whether a page may read the answer; a stream's headers go out before the answer is over."""
        origin = http.headers.get("Origin")
        if origin is not None and self._knows(origin):
            response.headers.update(_cors_headers(origin))

    def _let_in(self, http: web.Request, origin: str | None) -> Guest:
        admin = any(route.is_at(http.method, http.path) for route in self._guarded)
        if admin and origin is not None and not self._knows(origin) and not _same_site(origin, http.host):
            raise RequestError("permission_denied", "pages of other sites may not give orders here")
        if admin and origin is None and http.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            # A picture in such a page is fetched without an origin, but browsers say this much.
            raise RequestError("permission_denied", "pages of other sites may not give orders here")
        if not self._guests or any(route.is_at(http.method, http.path) for route in self._open):
            return ANYONE
        guest = self._guest(_key_in(http))
        if admin and not guest.key.admin:
            raise RequestError("permission_denied", f"the key {guest.key.name!r} is no operator's")
        return guest

    def _guest(self, key: str | None) -> Guest:
        if key is None:
            raise RequestError("invalid_api_key", "no API key: send Authorization: Bearer, or x-api-key")
        offered = hash_of(key).encode()
        found = None
        for guest in self._guests:  # all of them, so that time does not tell which was near
            if hmac.compare_digest(offered, guest.key.hash.encode()):
                found = guest
        if found is None:
            raise RequestError("invalid_api_key", "the API key is not known here")
        return found

    def _knows(self, origin: str) -> bool:
        return origin in self._origins or "*" in self._origins


def _key_in(http: web.Request) -> str | None:
    given = http.headers.get("x-api-key")
    if given:
        return given
    scheme, _, rest = http.headers.get("Authorization", "").partition(" ")
    match scheme.lower():
        case "bearer":
            return rest.strip() or None
        case "basic":
            try:
                _, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                return None
            return password or None
        case _:
            return None


def _same_site(origin: str, host: str) -> bool:
    return origin.partition("://")[2] == host


def _cors_headers(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": "authorization, content-type, x-api-key, anthropic-version",
        "Access-Control-Expose-Headers": "x-request-id, retry-after, x-estimated-wait, x-queue-position",
        "Vary": "Origin",
    }

"""A request's body, read within its limits of size and time; and JSON written as one."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from chimera.errors import RequestError

MAX_BODY_BYTES = 16 << 20
_BODY_WITHIN_S = 60.0


async def read_body(http: web.Request) -> bytes:
    if http.content_length is not None and http.content_length > MAX_BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, http.content_length)
    try:
        async with asyncio.timeout(_BODY_WITHIN_S):
            return await http.read()
    except TimeoutError:
        raise RequestError("bad_request", f"the body did not arrive within {_BODY_WITHIN_S:g} s") from None


def json_response(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")

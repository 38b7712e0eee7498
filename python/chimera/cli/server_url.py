"""How the verbs that talk to a running server reach it: one request over HTTP, and one clear error when that fails."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from chimera.config.keys import client_key
from chimera.errors import ChimeraError, ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_WITHIN_S = 5.0


class ServerError(ChimeraError):
    """The server is not there, or refuses, in its own words."""


@contextlib.contextmanager
def request(
    url: str, method: str, path: str, body: dict[str, Any] | None = None, *, within_s: float | None = None
) -> Iterator[http.client.HTTPResponse]:
    """A response with status 200; leaving the block closes the connection. `within_s` bounds every wait for a byte."""
    parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError.single("--url", f"{url!r} is not a server's address", hint=f"like {DEFAULT_URL}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=_CONNECT_WITHIN_S)
    try:
        try:
            connection.connect()
        except OSError as fault:
            reason = fault.strerror or fault
            raise ServerError(f"no server at {url} ({reason}); start one with `chimera serve`, or name its --url") from None
        connection.sock.settimeout(within_s)
        headers = {"Content-Type": "application/json"}
        if (key := client_key()) is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as fault:
            raise ServerError(f"the server at {url} broke the connection: {fault!r}") from None
        if response.status != http.client.OK:
            raise ServerError(_refusal(response, url))
        yield response
    finally:
        connection.close()


def order(url: str, path: str, body: dict[str, Any] | None, *, as_json: bool) -> dict[str, Any]:
    """An operator's verb, and what came of it; printed as it is when `as_json`."""
    with request(url, "POST", path, body) as response:
        document = response.read()
    if as_json:
        print(document.decode())
    answer: dict[str, Any] = json.loads(document)
    return answer


def _refusal(response: http.client.HTTPResponse, url: str) -> str:
    content = response.read()
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):  # somebody else's server
        return f"{url} answers {response.status} {response.reason}, not as a chimera server would"

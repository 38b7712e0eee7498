"""One front-end put together: what `python -m chimera.server` runs, and what tests run in their own loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from chimera.core.access import Access
from chimera.errors import RequestError
from chimera.server.account import Account
from chimera.server.app import App
from chimera.server.catalogue import Catalogue
from chimera.server.desk import Desk, Patience
from chimera.server.gate import Gate
from chimera.server.relay import Relay
from chimera.wire.codec import Message

if TYPE_CHECKING:
    from chimera.spans.client import ClientSpans

_LAST_WORDS_S = 0.5
"""What a handler is given to send its last event when the front-end leaves."""

_IDLE_S = 75.0
"""A connection without a whole request for so long is closed: idle ones, and those whose headers never end."""

_log = logging.getLogger(__name__)


class _Discreet(logging.Filter):
    """aiohttp quotes the header that it could not read, which may have been a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        fault = record.exc_info[1] if record.exc_info else None
        if isinstance(fault, HttpProcessingError):
            record.msg, record.args = "a request that is no HTTP: %s", (type(fault).__name__,)
            record.exc_info = record.exc_text = None
        return True


_aiohttp_log = logging.getLogger("aiohttp.server")
_aiohttp_log.addFilter(_Discreet())


def listen(host: str, port: int) -> socket.socket:
    """A socket that several front-ends of one server share. OSError when the port belongs to somebody else."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


class FrontEnd:
    """Raises OSError or ssl.SSLError when the certificate cannot be used."""

    def __init__(
        self,
        *,
        run_dir: Path,
        name: str,
        listener: socket.socket,
        patience: Patience | None = None,
        access: Access | None = None,
        metrics: bool = True,
        records: Path | None = None,
        record_texts: bool = False,
        spans: ClientSpans | None = None,
    ) -> None:
        """Without `metrics` nothing is counted and nothing is told for the records."""
        access = access or Access()
        self._tls = _tls(access)
        self.catalogue = Catalogue()
        self._account = Account(self._tell_control, texts=record_texts, spans=spans) if metrics else None
        self.desk = Desk(name, patience or Patience(), None if self._account is None else self._account.steps)
        self._relay = Relay(run_dir, name, self.catalogue, self.desk, self._account)
        self._name = name
        self._listener = listener
        app = App(self.catalogue, self.desk, self._relay, Gate(access), self._account, records)
        self.dashboard = app.dashboard
        # Cancelled handlers are how a client that leaves is noticed.
        self._runner = web.AppRunner(
            app.build(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_LAST_WORDS_S,
            keepalive_timeout=_IDLE_S,
        )

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @property
    def ready(self) -> bool:
        """Control is there and has told of its models."""
        return self._relay.in_touch

    async def start(self) -> None:
        await self._relay.start()
        await self._runner.setup()
        await web.SockSite(self._runner, self._listener, backlog=1024, ssl_context=self._tls).start()
        _log.info("%s listens on %s", self._name, self.url)

    async def drain(self, within_s: float) -> None:
        """Take no more connections and let the open answers end."""
        for site in list(self._runner.sites):
            await site.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.desk.wait_until_idle()

    async def close(self) -> None:
        self.desk.fail_all(RequestError("service_unavailable", "the server is stopping", retry_after_s=1))
        await self._runner.cleanup()
        self.desk.close()
        if self._account is not None:
            self._account.tell()
            self._account.close()
        await self._relay.close()

    def _tell_control(self, message: Message) -> bool:
        return self._relay.tell(message)


def _tls(access: Access) -> ssl.SSLContext | None:
    if access.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(access.tls_cert, access.tls_key)
    return context

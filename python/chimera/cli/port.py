"""The one port that all front-ends share: found to be free, held while the server runs, reached from this machine."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from chimera.errors import ConfigError

LAST_PORT = 65535


@contextlib.contextmanager
def reserve(host: str, port: int) -> Iterator[int]:
    """Hold the port (0: one that is free) for our front-ends, also while none of them listens. Yields its number."""
    if not 0 <= port <= LAST_PORT:
        raise ConfigError.single("--port", f"{port} is no port: 1 to {LAST_PORT}, or 0 for one that is free")
    family, _, _, _, address = _resolve(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as holder, socket.socket(socket.AF_UNIX) as claim:
        try:
            if port:
                _require_free(family, address)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(address)
            _claim(claim, holder.getsockname())
        except OSError as fault:
            hint = "another server is running there; choose with --port" if port else ""
            raise ConfigError.single("--port", f"cannot listen on {host}:{port}: {fault.strerror}", hint=hint) from None
        yield int(holder.getsockname()[1])


def _require_free(family: int, address: tuple[object, ...]) -> None:
    """Bind it alone: with SO_REUSEPORT two servers of one user would share the port unnoticed."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _claim(claim: socket.socket, address: tuple[object, ...]) -> None:
    """A name that one process can have, and loses with its life. Nobody listens on the port while a server starts, and
    until somebody does, the kernel lets a second server share it."""
    claim.bind(f"\0chimera-port-{address[0]}-{address[1]}")


def _resolve(host: str, port: int) -> tuple[int, int, int, str, tuple[object, ...]]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as fault:
        raise ConfigError.single("--host", f"{host!r} is no address of this machine: {fault.strerror}") from None


def reachable(host: str) -> str:
    """Where a client of this machine finds a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)

"""The flags of `chimera serve` that say who is let in; without any, whoever is on this machine."""

from __future__ import annotations

import argparse
import ipaddress
import ssl
from pathlib import Path

from chimera.config.keys import read_keys
from chimera.core.access import Access
from chimera.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    door = parser.add_argument_group("who is let in")
    door.add_argument("--keys", type=Path, metavar="FILE", help="API keys, by their hashes; `chimera keys` makes entries")
    door.add_argument("--open", action="store_true", help="let in whoever reaches the address, without a key")
    door.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve https with this certificate")
    door.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, where it is a file of its own")
    door.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="a site whose pages may ask; * for all")


def access_of(arguments: argparse.Namespace) -> Access:
    """ConfigError when others could reach the server without a key, or the files cannot be used."""
    keys = () if arguments.keys is None else read_keys(arguments.keys)
    if not keys and not arguments.open and not _only_this_machine(arguments.host):
        what = f"other machines can reach {arguments.host}, and no key is asked for"
        raise ConfigError.single("--host", what, hint="give --keys FILE, or say --open")
    if arguments.tls_key is not None and arguments.tls_cert is None:
        raise ConfigError.single("--tls-key", "is the key of a certificate; --tls-cert names that")
    if arguments.tls_cert is not None:
        _require_certificate(arguments.tls_cert, arguments.tls_key)
    return Access(
        keys=keys,
        cors_origins=tuple(arguments.cors),
        tls_cert=None if arguments.tls_cert is None else str(arguments.tls_cert.absolute()),
        tls_key=None if arguments.tls_key is None else str(arguments.tls_key.absolute()),
    )


def _require_certificate(cert: Path, key: Path | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as fault:
        raise ConfigError.single("--tls-cert", f"{cert} cannot be used: {fault.strerror or fault}") from None


def _only_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

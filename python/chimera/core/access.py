"""Who may ask for what, how often, and from where: what a front-end's door goes by. Holds hashes of keys, never keys."""

from __future__ import annotations

import hashlib

import msgspec


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """One client's key, and its bounds. `None` sets no bound."""

    name: str
    """What logs call it."""
    hash: str
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    admin: bool = False
    """Whether it may load and unload models."""

    def allows(self, model: str) -> bool:
        return self.models is None or model in self.models


class Access(msgspec.Struct, frozen=True, kw_only=True):
    keys: tuple[ApiKey, ...] = ()
    """Without any, whoever reaches the port is let in."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may ask; `*` for all."""
    tls_cert: str | None = None
    tls_key: str | None = None
    share: float = 1.0
    """The part of each limit that one front-end of several gives out."""


def hash_of(key: str) -> str:
    """Keys are long and random, so that one round of SHA-256 keeps them; made-up passwords would need a slow hash."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()

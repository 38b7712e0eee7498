"""The keys file: who may ask a server for what. Holds hashes; a key itself is shown once, when it is made.

Also where a client on this machine finds its own key.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from chimera.config.conform import conform
from chimera.config.document import read_document, read_lines
from chimera.config.faults import Faults, at_index
from chimera.config.placement_file import Name
from chimera.core.access import ApiKey

CLIENT_KEY = "CHIMERA_API_KEY"
_PREFIX = "sk-"
_KEY_BYTES = 32

Hash = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
PerMinute = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key, as `chimera keys` prints it."""

    name: Annotated[Name, msgspec.Meta(description="What logs and refusals call it.")]
    hash: Annotated[Hash, msgspec.Meta(description="From `chimera keys`.")]
    models: Annotated[tuple[Name, ...] | None, msgspec.Meta(description="Which it may ask; all, if left out.")] = None
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: Annotated[PerMinute | None, msgspec.Meta(description="Of prompts and answers together.")] = None
    admin: Annotated[bool, msgspec.Meta(description="Whether it may load and unload models.")] = False


class KeysFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What JSON and YAML hold. A `.jsonl` has the entries alone, one in each line, so that `>>` adds one."""

    keys: tuple[KeyEntry, ...]


def read_keys(path: Path, environment: Mapping[str, str] = os.environ) -> tuple[ApiKey, ...]:
    """ConfigError lists every fault."""
    faults = Faults(str(path))
    by_line = path.suffix == ".jsonl"
    document = {"keys": read_lines(path, environment, faults)} if by_line else read_document(path, environment, faults)
    file = conform(document, KeysFile, "", faults)
    if not file.keys:
        faults.add("keys", "is empty", "`chimera keys NAME` makes one")
    for what in ("name", "hash"):
        seen: set[str] = set()
        for index, entry in enumerate(file.keys):
            value = getattr(entry, what)
            if value and value in seen:
                faults.add(f"{at_index('keys', index)}.{what}", "is another key's as well")
            seen.add(value)
    faults.require_none()
    return tuple(ApiKey(**msgspec.structs.asdict(entry)) for entry in file.keys)


def new_key() -> str:
    """Long and random, so that its hash keeps it."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def client_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key with which commands on this machine ask a server."""
    return environment.get(CLIENT_KEY) or None

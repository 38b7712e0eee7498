"""Finds cost tables: those that come with the package, by the name of their machine, or any file. Knows bytes, not prices."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from chimera.errors import ConfigError

_SHIPPED = resources.files("chimera.config") / "costs"


def shipped_tables() -> tuple[str, ...]:
    return tuple(sorted(entry.name.removesuffix(".json") for entry in _SHIPPED.iterdir() if entry.name.endswith(".json")))


def read_cost_table(name: str) -> bytes:
    """`h100-80g-like`, or the path of a JSON file of the same form."""
    path = Path(name)
    try:
        if path.suffix == ".json":
            return path.read_bytes()
        if name in shipped_tables():
            return (_SHIPPED / f"{name}.json").read_bytes()
    except OSError as fault:
        raise ConfigError.single(name, f"cannot be read: {fault.strerror or fault}") from None
    raise ConfigError.single(name, f"no such cost table; there are {', '.join(shipped_tables())}, or a .json file")

"""Which releases of SGLang our reaches inside were read and run against."""

from __future__ import annotations

import importlib.metadata

from chimera.engine.api import CannotServe

OLDEST = (0, 5, 16)
NEWEST = (0, 5, 23)


def parse(version: str) -> tuple[int, ...]:
    """`0.5.20.post1` → (0, 5, 20)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def require_supported(version: str | None = None) -> tuple[int, ...]:
    """The installed release, or a loud refusal before anything is served."""
    found = version or importlib.metadata.version("sglang")
    release = parse(found)
    if not OLDEST <= release <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise CannotServe(
            f"SGLang {found} is installed; this release was made for {oldest} to {newest}: pip install sglang==0.5.20",
            permanent=True,
        )
    return release

"""Units and their spelling: bytes, seconds, and text that can be shown. Knows no noun of the domain."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
GB = 10**9

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def _quantity(text: str, scale: dict[str, float] | dict[str, int], kind: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in scale:
        known = ", ".join(unit for unit in scale if unit)
        raise ValueError(f"{text!r} is not {kind}: a number and one of {known}")
    return float(match[1]) * scale[match[2].lower()]


def parse_bytes(text: str) -> int:
    """`2GiB`, `512MB`, `4096` → bytes."""
    return round(_quantity(text, _BYTES, "a size"))


def parse_seconds(text: str) -> float:
    """`250ms`, `5m`, `30` → seconds."""
    return _quantity(text, _SECONDS, "a duration")


def parse_stay(text: str) -> float:
    """`5m`, `1h30m`, `30`, `-1` → seconds; below zero stands for ever."""
    sign, text = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    parts = re.findall(r"[\d.]+[a-zA-Z]*", text)
    if "".join(parts) != text or not parts:
        raise ValueError(f"{text!r} is not a duration: like 5m, 1h30m, or seconds")
    return sign * sum(map(parse_seconds, parts))


def format_bytes(n: float) -> str:
    """For people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or n == int(n) else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def printable(text: str) -> str:
    """On one line, whatever it holds: control characters are spelled out, so that no name moves a cursor or forges a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)

"""Memory budgets on the host that stand in for GPUs: `8x2GiB`, `2x4GiB,1x8GiB`. Knows no device.

A machine without GPUs lends a quarter of its memory, in equal parts: one GPU, unless a placement file names more.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from chimera.core.gpu import Gpu
from chimera.errors import ConfigError
from chimera.units import GIB, MIB, format_bytes, parse_bytes

PAGE_BYTES = 2 * MIB
MOST_GPUS = 1024
SMALLEST_BYTES = 16 * MIB
LARGEST_BYTES = 1024 * GIB
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def parse_virtual_gpus(text: str, *, source: str = "--gpus", where: str = "") -> tuple[Gpu, ...]:
    """Numbered from 0 in the order written."""
    capacities: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([0-9]{1,9})\s*[x×])?\s*([^x×]+)", part)
        if match is None:
            raise _refused(source, where, part, "is not a number of GPUs and their memory")
        try:
            capacity = parse_bytes(match[2]) if len(match[2]) < 32 else -1
        except ValueError as reason:
            raise _refused(source, where, part, str(reason)) from None
        if not SMALLEST_BYTES <= capacity <= LARGEST_BYTES:
            bounds = f"{format_bytes(SMALLEST_BYTES)} to {format_bytes(LARGEST_BYTES)}"
            raise _refused(source, where, part, f"a virtual GPU has {bounds}")
        count = int(match[1] or 1)
        if not 1 <= count <= MOST_GPUS - len(capacities):
            raise _refused(source, where, part, f"there may be 1 to {MOST_GPUS} virtual GPUs")
        capacities += [capacity] * count
    return tuple(_virtual(number, capacity) for number, capacity in enumerate(capacities))


def default_virtual_gpus(count: int = 1, memory_bytes: int | None = None) -> tuple[Gpu, ...]:
    """A quarter of the memory of this machine, or of its container, in `count` equal GPUs."""
    lent = (host_memory_bytes() if memory_bytes is None else memory_bytes) // 4
    return tuple(_virtual(number, lent // count) for number in range(count))


def host_memory_bytes() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(_CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or its limit is "max"
        return physical


def _virtual(number: int, capacity: int) -> Gpu:
    whole_pages = capacity // PAGE_BYTES * PAGE_BYTES
    return Gpu(gpu_id=number, capacity_bytes=whole_pages, page_bytes=PAGE_BYTES, virtual=True)


def _refused(source: str, where: str, part: str, what: str) -> ConfigError:
    return ConfigError.single(source, f"{part[:64]!r}: {what}", where=where, hint="write 8x2GiB, or 2x4GiB,1x8GiB")

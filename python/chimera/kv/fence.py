"""When memory that nobody asks for any more is also out of use by the device. Knows streams, not what runs on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Passed = Callable[[], bool]
Fence = Callable[[], Passed]
"""Called when stripes are found empty; what it returns says whether every step launched before that call has ended."""


def immediate() -> Passed:
    """Where a step has ended when its call returns: engines on a CPU."""
    return lambda: True


def after_stream(stream: Any) -> Fence:
    """Wait, without blocking, for what is on a CUDA stream now: a step in flight still reads slots that are free already."""

    def fence() -> Passed:
        event = torch.cuda.Event()
        event.record(stream)
        return lambda: bool(event.query())

    return fence

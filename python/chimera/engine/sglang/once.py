"""What SGLang asks of the machine anew for every model, and what does not change while the machine runs: asked once."""

from __future__ import annotations

import functools

from sglang.srt.utils import common


def ask_once() -> None:
    """In the preloaded parent, so that no worker asks at all."""
    # A process of `lscpu`, eleven times for each model: 45 of the 150 ms in which a warm worker becomes a tiny model.
    if not hasattr(common.parse_lscpu_topology, "cache_info"):
        common.parse_lscpu_topology = functools.cache(common.parse_lscpu_topology)
    common.parse_lscpu_topology()

"""Small pools over the fake driver, and words for what tests do with them."""

from __future__ import annotations

from typing import Any

import torch
from chimera.kv.budget import Budget
from chimera.kv.layout import Interleaved, KvKind, Layout
from chimera.kv.pool import ElasticPool
from chimera.kv.reserve import Reserve
from chimera.units import KIB
from chimera.vmm.driver import Driver
from chimera.vmm.fake import FakeDriver

GRANULE = 64 * KIB
KIND = KvKind.heads(layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)
"""2 KiB a token: a granule is 32 slots."""


def layout_of(stripes: int, *, block_slots: int = 1, kind: KvKind = KIND) -> Layout:
    layout = Interleaved(kind, slots=stripes, granularity=GRANULE, block_slots=block_slots, stripe_bytes=GRANULE)
    return Interleaved(
        kind,
        slots=stripes * layout.slots_per_stripe,
        granularity=GRANULE,
        block_slots=block_slots,
        stripe_bytes=GRANULE,
    )


def reserve_for(layout: Layout, driver: Driver, *, budget: Budget | None = None, low: int = 0, high: int = 0) -> Reserve:
    return Reserve(
        driver,
        handle_bytes=layout.handle_bytes,
        handles_per_stripe=layout.handles_per_stripe,
        budget=budget or Budget(1 << 50),
        low=low,
        high=high,
    )


def pool_of(
    stripes: int, *, driver: Driver | None = None, lease: int | None = None, block_slots: int = 1, **more: Any
) -> ElasticPool:
    """A pool of up to `stripes`, none present yet; `lease` is its budget in stripes."""
    layout = layout_of(stripes, block_slots=block_slots)
    stripe_bytes = layout.handle_bytes * layout.handles_per_stripe
    budget = Budget((stripes if lease is None else lease) * stripe_bytes)
    reserve = reserve_for(layout, driver or FakeDriver(GRANULE), budget=budget)
    return ElasticPool(layout, reserve, block_slots=block_slots, **more)


def alloc(pool: ElasticPool, slots: int) -> torch.Tensor:
    taken = pool.slots.alloc(slots)
    assert taken is not None
    return taken


def stripes_of(pool: ElasticPool, slots: torch.Tensor) -> set[int]:
    return set((slots // pool.layout.slots_per_stripe).tolist())

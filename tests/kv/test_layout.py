"""Layouts: whole granules, no overlap, every slot of every layer inside its own stripe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from chimera.kv.layout import Interleaved, KvKind, Layout, PerLayer
from chimera.units import KIB, MIB

KINDS = {
    "llama-3-8b": KvKind.heads(32, 8, 128, torch.bfloat16),
    "qwen3-fp8": KvKind.heads(28, 8, 128, torch.float8_e4m3fn),
    "tiny": KvKind.heads(2, 2, 16, torch.float32),
    "uneven": KvKind.heads(3, 2, 192, torch.float16, v_head_dim=128),
    "mla": KvKind.latent(27, 576, torch.bfloat16),
}


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("granularity", [64 * KIB, 2 * MIB])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layout_class", [Interleaved, PerLayer])
def test_stripes_are_whole_granules_and_never_overlap(layout_class, name: str, granularity: int, block: int) -> None:  # type: ignore[no-untyped-def]
    layout = layout_class(KINDS[name], slots=100_000, granularity=granularity, block_slots=block)
    assert layout.stripes * layout.slots_per_stripe >= 100_000
    assert layout.slots_per_stripe % block == 0
    assert layout.handle_bytes % granularity == 0
    offsets = sorted(offset for stripe in range(min(layout.stripes, 5)) for offset in layout.offsets(stripe))
    assert len(offsets) == min(layout.stripes, 5) * layout.handles_per_stripe
    assert all(before + layout.handle_bytes <= after for before, after in itertools.pairwise(offsets))
    assert layout.offsets(layout.stripes - 1)[-1] + layout.handle_bytes <= layout.range_bytes


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layout_class", [Interleaved, PerLayer])
def test_a_slot_lies_in_its_own_stripe_in_every_layer(layout_class, name: str) -> None:  # type: ignore[no-untyped-def]
    layout = layout_class(KINDS[name], slots=50_000, granularity=64 * KIB, stripe_bytes=MIB)
    itemsize = layout.kind.dtype.itemsize
    seen: list[tuple[int, int]] = []

    def note(offset: int, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        for slot in (0, layout.slots_per_stripe - 1, layout.slots_per_stripe, shape[0] - 1):
            first = offset + slot * strides[0] * itemsize
            last = first + math.prod(shape[1:]) * itemsize
            assert holds(layout, slot // layout.slots_per_stripe, first, last)
            seen.append((first, last))
        return torch.empty(0)

    layout.views(note)
    ordered = sorted(set(seen))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ordered)), "no two layers share a byte"


def holds(layout: Layout, stripe: int, first: int, last: int) -> bool:
    """Whether the bytes lie in the stripe; neighbouring handles count as one."""
    covered = first
    for offset in layout.offsets(stripe):
        if offset <= covered < offset + layout.handle_bytes:
            covered = offset + layout.handle_bytes
    return covered >= last


def test_an_interleaved_stripe_is_one_handle_near_the_size_aimed_at() -> None:
    for kind in KINDS.values():
        layout = Interleaved(kind, slots=10**6, granularity=2 * MIB)
        assert layout.handles_per_stripe == 1
        assert 16 * MIB <= layout.handle_bytes <= 64 * MIB


def test_awkward_records_are_padded_by_an_eighth_at_most() -> None:
    mla = Interleaved(KINDS["mla"], slots=10**6, granularity=2 * MIB)
    assert (mla.kind.token_bytes, mla.record_bytes) == (31_104, 31_744)
    for kind in KINDS.values():
        layout = Interleaved(kind, slots=10**6, granularity=2 * MIB)
        assert kind.token_bytes <= layout.record_bytes <= kind.token_bytes * 9 / 8


def test_a_contiguous_buffer_per_layer_is_what_engines_expect() -> None:
    shapes = []

    def note(offset: int, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        shapes.append((tuple(shape[1:]), tuple(strides)))
        return torch.empty(0)

    PerLayer(KINDS["llama-3-8b"], slots=4096, granularity=2 * MIB).views(note)
    assert set(shapes) == {((8, 128), (1024, 128, 1))}
    assert len(shapes) == 64

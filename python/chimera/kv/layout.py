"""Where the cache of a token lies inside a range, and what a stripe is made of. Arithmetic; maps nothing.

A stripe is the smallest part of a pool that comes and goes: every layer's cache of one run of token slots. Two layouts:
*interleaved* keeps a token's layers side by side, so that a stripe is one piece of memory; *per layer* gives every layer
its own contiguous buffer, as engines allocate them, so that a stripe is one piece per buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from chimera.units import MIB, ceil_div

STRIPE_BYTES: Final = 32 * MIB
"""The size aimed at: 16 to 64 MiB is mapped in well under a millisecond, and is little to wait for when it drains."""

_MOST_PADDING: Final = 1 / 8

TensorAt = Callable[[int, Sequence[int], Sequence[int]], torch.Tensor]
"""A tensor at (byte offset, shape, strides in elements)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One thing that a layer keeps of a token: its keys, its values, or MLA's latent."""

    name: str
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvKind:
    """What one kind of cache keeps of a token. A model with sliding-window layers has two kinds, each with its own pool."""

    name: str
    layers: int
    planes: tuple[Plane, ...]
    dtype: torch.dtype

    @classmethod
    def heads(cls, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, v_head_dim: int | None = None) -> KvKind:
        """Keys and values: multi-head and grouped-query attention."""
        k = Plane(name="k", shape=(kv_heads, head_dim))
        v = Plane(name="v", shape=(kv_heads, v_head_dim or head_dim))
        return cls(name="heads", layers=layers, planes=(k, v), dtype=dtype)

    @classmethod
    def latent(cls, layers: int, width: int, dtype: torch.dtype) -> KvKind:
        """One compressed vector: multi-head latent attention."""
        return cls(name="latent", layers=layers, planes=(Plane(name="kv", shape=(1, width)),), dtype=dtype)

    def bytes_of(self, plane: Plane) -> int:
        itemsize: int = self.dtype.itemsize
        return plane.items * itemsize

    @property
    def token_bytes(self) -> int:
        return self.layers * sum(self.bytes_of(plane) for plane in self.planes)


class Layout(Protocol):
    """`stripes` stripes of `slots_per_stripe` slots; each is `handles_per_stripe` handles of `handle_bytes`."""

    @property
    def kind(self) -> KvKind: ...
    @property
    def stripes(self) -> int: ...
    @property
    def slots_per_stripe(self) -> int: ...
    @property
    def handle_bytes(self) -> int: ...
    @property
    def handles_per_stripe(self) -> int: ...

    @property
    def range_bytes(self) -> int:
        """Addresses needed for every stripe at once."""
        ...

    def offsets(self, stripe: int) -> list[int]:
        """Where in the range the handles of a stripe go, ascending."""
        ...

    def views(self, tensor_at: TensorAt) -> dict[str, list[torch.Tensor]]:
        """By plane: one tensor `[slots, *shape]` per layer, over all stripes."""
        ...

    def rows(self, tensor_at: TensorAt) -> list[torch.Tensor]:
        """The same memory as few tensors `[slots, items]` as there can be: what copying a slot has to copy."""
        ...


class Interleaved:
    """`[slots, layers, planes, …]`: a layer is a strided view, a stripe is one handle.

    A token whose bytes share no large factor with the granule would need stripes of hundreds of MiB to end on a granule;
    its record is padded by up to an eighth instead (MLA's 31,104 bytes become 31,744, and a stripe 62 MiB, not 486).
    """

    def __init__(
        self, kind: KvKind, *, slots: int, granularity: int, block_slots: int = 1, stripe_bytes: int = STRIPE_BYTES
    ) -> None:
        self.kind = kind
        self.record_bytes, quantum = _padded_record(kind, granularity, block_slots, stripe_bytes)
        self.slots_per_stripe = quantum * max(1, stripe_bytes // (quantum * self.record_bytes))
        self.stripes = ceil_div(slots, self.slots_per_stripe)
        self.handle_bytes = self.slots_per_stripe * self.record_bytes
        self.handles_per_stripe = 1
        self.range_bytes = self.stripes * self.handle_bytes

    def offsets(self, stripe: int) -> list[int]:
        return [stripe * self.handle_bytes]

    def views(self, tensor_at: TensorAt) -> dict[str, list[torch.Tensor]]:
        views: dict[str, list[torch.Tensor]] = {plane.name: [] for plane in self.kind.planes}
        slots = self.stripes * self.slots_per_stripe
        stride = self.record_bytes // self.kind.dtype.itemsize
        offset = 0
        for _ in range(self.kind.layers):
            for plane in self.kind.planes:
                shape = (slots, *plane.shape)
                views[plane.name].append(tensor_at(offset, shape, (stride, *_strides(plane.shape))))
                offset += self.kind.bytes_of(plane)
        return views

    def rows(self, tensor_at: TensorAt) -> list[torch.Tensor]:
        items = self.record_bytes // self.kind.dtype.itemsize
        return [tensor_at(0, (self.stripes * self.slots_per_stripe, items), (items, 1))]


class PerLayer:
    """One contiguous buffer per layer and plane, as a stock engine has it: a stripe is a piece of each of them."""

    def __init__(
        self, kind: KvKind, *, slots: int, granularity: int, block_slots: int = 1, stripe_bytes: int = STRIPE_BYTES
    ) -> None:
        self.kind = kind
        rows = [kind.bytes_of(plane) for plane in kind.planes]
        quantum = math.lcm(block_slots, *(granularity // math.gcd(granularity, row) for row in rows))
        self.slots_per_stripe = quantum * max(1, stripe_bytes // (quantum * kind.token_bytes))
        self.stripes = ceil_div(slots, self.slots_per_stripe)
        # Keys and values may differ in width; handles of one size let every stripe draw on the same reserve.
        self.handle_bytes = math.gcd(*(self.slots_per_stripe * row for row in rows))
        self.handles_per_stripe = self.slots_per_stripe * kind.token_bytes // self.handle_bytes
        self.range_bytes = self.stripes * self.slots_per_stripe * kind.token_bytes

    def offsets(self, stripe: int) -> list[int]:
        offsets: list[int] = []
        for base, plane in self._buffers():
            piece = self.slots_per_stripe * self.kind.bytes_of(plane)
            start = base + stripe * piece
            offsets.extend(range(start, start + piece, self.handle_bytes))
        return offsets

    def views(self, tensor_at: TensorAt) -> dict[str, list[torch.Tensor]]:
        views: dict[str, list[torch.Tensor]] = {plane.name: [] for plane in self.kind.planes}
        for base, plane in self._buffers():
            shape = (self.stripes * self.slots_per_stripe, *plane.shape)
            views[plane.name].append(tensor_at(base, shape, _strides(shape)))
        return views

    def rows(self, tensor_at: TensorAt) -> list[torch.Tensor]:
        slots = self.stripes * self.slots_per_stripe
        return [tensor_at(base, (slots, plane.items), (plane.items, 1)) for base, plane in self._buffers()]

    def _buffers(self) -> list[tuple[int, Plane]]:
        """Where each layer's buffer of each plane begins."""
        buffers = []
        base = 0
        for _ in range(self.kind.layers):
            for plane in self.kind.planes:
                buffers.append((base, plane))
                base += self.stripes * self.slots_per_stripe * self.kind.bytes_of(plane)
        return buffers


def _padded_record(kind: KvKind, granularity: int, block_slots: int, stripe_bytes: int) -> tuple[int, int]:
    """Bytes from one token to the next, and the smallest run of tokens that is whole granules and whole blocks."""
    best: tuple[int, int] | None = None
    align = kind.dtype.itemsize
    while align <= granularity:
        record = ceil_div(kind.token_bytes, align) * align
        quantum = math.lcm(block_slots, granularity // math.gcd(granularity, record))
        if best is not None and record > kind.token_bytes * (1 + _MOST_PADDING):
            break
        if best is None or quantum * record < best[0] * best[1]:
            best = (record, quantum)
        if quantum * record <= 2 * stripe_bytes:
            break
        align *= 2
    assert best is not None, "an element is never larger than a granule"
    return best


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))

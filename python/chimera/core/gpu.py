"""A GPU as decisions see it: an identity, a capacity and a granule."""

from __future__ import annotations

import msgspec

from chimera.units import MIB


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device, or one memory budget on the host that stands in for a device."""

    gpu_id: int
    """Its number in placement files, unique over all nodes."""
    node: str = "local"
    capacity_bytes: int
    page_bytes: int = 2 * MIB
    """The physical granule: every lease counts whole pages of this size."""
    name: str = "virtual"
    virtual: bool = False

    @property
    def pages(self) -> int:
        return self.capacity_bytes // self.page_bytes

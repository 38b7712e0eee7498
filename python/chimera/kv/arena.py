"""A reserved range of one lease class, and tensors over it. Knows addresses and tensors, not what they are for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from chimera.core.lease import LeaseClass
from chimera.vmm.driver import Driver, Handle, Range


class Arena:
    """Addresses for `nbytes`, of which any part may have memory.

    Tensors made here see the whole range, and do not keep it alive: they must not be touched where nothing is mapped, nor
    after `close`.
    """

    def __init__(self, driver: Driver, nbytes: int, *, lease_class: LeaseClass, device: torch.device) -> None:
        self.lease_class = lease_class
        self.device = device
        self._driver = driver
        self._range: Range = driver.reserve(nbytes)

    @property
    def address(self) -> int:
        return self._range.address

    @property
    def nbytes(self) -> int:
        return self._range.nbytes

    @property
    def mapped_bytes(self) -> int:
        return self._range.mapped_bytes

    @property
    def is_open(self) -> bool:
        return self._range.open

    def map(self, placements: Mapping[int, Handle]) -> None:
        self._driver.map(self._range, placements)

    def scrub(self, offsets: Collection[int]) -> None:
        self._driver.scrub(self._range, offsets)

    def unmap(self, offsets: Collection[int]) -> list[Handle]:
        return self._driver.unmap(self._range, offsets)

    def unmap_all(self) -> list[Handle]:
        """Everything that is still mapped, scrubbed and taken away."""
        offsets = list(self._range.mapped)
        self.scrub(offsets)
        return self.unmap(offsets)

    def tensor(self, *, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of the range that starts `offset` bytes in; strides count elements. Touches no byte."""
        storage = torch._C._construct_storage_from_data_pointer(self.address, self.device, self.nbytes)
        empty = torch.empty(0, dtype=dtype, device=self.device)
        return empty.set_(storage, offset // dtype.itemsize, tuple(shape), tuple(strides))

    def close(self) -> None:
        """Give the addresses back; nothing may be mapped."""
        self._driver.free(self._range)

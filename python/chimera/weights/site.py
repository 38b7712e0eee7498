"""Where one model's weights lie on a device: addresses that stay while the bytes under them come and go.

What was built over them, tensors and graphs, is right again as soon as the same bytes are there again. Knows bytes; not what
they mean.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch

from chimera.errors import DriverError
from chimera.units import MIB, ceil_div
from chimera.vmm.driver import Driver
from chimera.vmm.window import Window
from chimera.weights.image import Image

_PIECE_BYTES: Final = 64 * MIB
"""Created and mapped in one call each: large, because nobody ever gives back a part."""


class Site(Protocol):
    device: torch.device
    bytes: torch.Tensor
    """Not to be touched while nothing is there."""

    def vacate(self) -> None:
        """The memory goes; no work of the device may be under way on it."""

    def close(self) -> None:
        """The addresses go too, and whatever was built over them is dead."""


class InMemory:
    """Memory of a device, by its driver."""

    def __init__(self, driver: Driver, nbytes: int, device: torch.device) -> None:
        self.device = device
        self._driver = driver
        self._piece_bytes = min(_PIECE_BYTES, ceil_div(nbytes, driver.granularity) * driver.granularity)
        self._pieces = ceil_div(nbytes, self._piece_bytes)
        self._range = driver.reserve(self._pieces * self._piece_bytes)
        self.bytes = _over(self._range.address, nbytes, device)

    def occupy(self) -> None:
        """Memory under all of it. DriverError, with nothing taken, where there is none."""
        handles = self._driver.create(self._piece_bytes, self._pieces)
        offsets = range(0, self._range.nbytes, self._piece_bytes)
        try:
            self._driver.map(self._range, dict(zip(offsets, handles, strict=True)))
        except DriverError:
            self._driver.release(handles)
            raise

    def vacate(self) -> None:
        self._driver.release(self._driver.unmap(self._range, list(self._range.mapped)))

    def close(self) -> None:
        self.vacate()
        self._driver.free(self._range)


class OfImage:
    """An image itself, seen from a CPU. While it shows the image is in use, so whoever shows it keeps the object too."""

    device = torch.device("cpu")

    def __init__(self, nbytes: int) -> None:
        self._window = Window(nbytes)
        self.bytes = _over(self._window.address, nbytes, self.device)

    def show(self, image: Image) -> None:
        self._window.show(image.fileno())

    def vacate(self) -> None:
        self._window.hide()

    def close(self) -> None:
        self._window.close()


def _over(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))

"""The way from an image into a device's memory.

On a CPU there is none: tensors are views of the image. On a GPU the image is one run of bytes there too, copied through
page-locked memory while the engine builds its model around it. Knows bytes; not what they mean.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch

from chimera.units import MIB
from chimera.weights.image import Image

CHUNK_BYTES: Final = 64 * MIB
CHUNKS: Final = 4


class Copier(Protocol):
    def begin(self, image: Image, device: torch.device) -> torch.Tensor | None:
        """Where the image's bytes will be on the device; `None` if they need not go anywhere."""

    def finish(self) -> None:
        """When this returns, the next step on the device finds them there."""


def copier_for(device_kind: str) -> Copier:
    return InPlace() if device_kind == "cpu" else StagingRing()


class InPlace:
    """For a CPU."""

    def begin(self, image: Image, device: torch.device) -> torch.Tensor | None:
        return None

    def finish(self) -> None:
        pass


class StagingRing:
    """A few page-locked chunks of this process: the host fills one while the device drains the others."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, chunks: int = CHUNKS) -> None:
        self._chunk_bytes = chunk_bytes
        self._count = chunks
        self._ring: list[torch.Tensor] = []
        self._drained: list[torch.cuda.Event] = []
        self._stream: torch.cuda.Stream | None = None

    def begin(self, image: Image, device: torch.device) -> torch.Tensor | None:
        if not self._ring:
            # Locking pages costs more than filling them: done once, for the life of the worker.
            self._ring = [torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(self._count)]
            self._drained = [torch.cuda.Event() for _ in range(self._count)]
            self._stream = torch.cuda.Stream(device)
        assert self._stream is not None
        data = image.bytes[: image.contents.data_bytes]
        run = torch.empty(data.numel(), dtype=torch.uint8, device=device)
        # The memory of `run` may have been another tensor's, with a kernel still reading it.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        run.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            for number, at in enumerate(range(0, data.numel(), self._chunk_bytes)):
                slot = number % self._count
                self._drained[slot].synchronize()
                chunk = data[at : at + self._chunk_bytes]
                staged = self._ring[slot][: chunk.numel()]
                staged.copy_(chunk)
                run[at : at + chunk.numel()].copy_(staged, non_blocking=True)
                self._drained[slot].record(self._stream)
        return run

    def finish(self) -> None:
        assert self._stream is not None, "begun before it is finished"
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

"""The way from an image into a device's memory.

On a CPU there is none: tensors are views of the image. On a GPU the image is one run of bytes there too, staged through
page-locked memory by several threads at once, while the engine makes its model around it. Knows bytes; not what they mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol

import torch

from chimera.errors import DriverError, WeightsError
from chimera.units import MIB
from chimera.vmm.cuda import CudaDriver
from chimera.weights.image import Image
from chimera.weights.site import InMemory, OfImage, Site

CHUNK_BYTES: Final = 64 * MIB
LANES: Final = 4
"""One core fills page-locked memory more slowly than a link takes it away."""
CHUNKS_PER_LANE: Final = 2
"""One is filled while the device drains the other."""


class Copier(Protocol):
    def site(self, image: Image, device: torch.device) -> Site:
        """Where the image's bytes will be for the device."""

    def begin(self, image: Image, site: Site) -> None:
        """The bytes are on their way to where they were once, or will be for the first time."""

    def finish(self) -> None:
        """When this returns, the next step on the device finds them there."""

    def leave(self, site: Site) -> None:
        """Their memory is given back; the site stays."""


class Queue(Protocol):
    """One device's memory, and the order of copies into it."""

    def lock(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device itself can read."""

    def site(self, nbytes: int) -> InMemory:
        """Room on the device."""

    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        """Starts a copy. The answer waits for its end: only then may `staged` be written over. Called by several threads."""

    def settle(self) -> None:
        """Whatever the device does next comes after all that was sent."""

    def drain(self) -> None:
        """Returns when the device has nothing to do."""


def copier_for(device_kind: str) -> Copier:
    return InPlace() if device_kind == "cpu" else StagingRing(CudaQueue)


class InPlace:
    """For a CPU, which sees the image itself."""

    def site(self, image: Image, device: torch.device) -> Site:
        return OfImage(image.contents.data_bytes)

    def begin(self, image: Image, site: Site) -> None:
        assert isinstance(site, OfImage), "it was made here"
        site.show(image)

    def finish(self) -> None:
        """There was nothing to copy."""

    def leave(self, site: Site) -> None:
        site.vacate()


class StagingRing:
    """Page-locked memory of this process, in lanes: while the device drains one, the host fills the others."""

    def __init__(
        self, make_queue: Callable[[torch.device], Queue], *, chunk_bytes: int = CHUNK_BYTES, lanes: int = LANES
    ) -> None:
        self._make_queue = make_queue
        self._chunk_bytes = chunk_bytes
        self._lanes = lanes
        self._queues: dict[torch.device, Queue] = {}
        self._queue: Queue | None = None
        """Of the device that bytes were last sent to."""
        self._staging: list[list[torch.Tensor]] = []
        self._under_way: list[Future[None]] = []

    def site(self, image: Image, device: torch.device) -> Site:
        if device not in self._queues:
            self._queues[device] = self._make_queue(device)
        try:
            return self._queues[device].site(image.contents.data_bytes)
        except DriverError as refusal:
            raise WeightsError(f"no addresses for {image.contents.model} on {device}: {refusal}", passing=True) from refusal

    def begin(self, image: Image, site: Site) -> None:
        assert isinstance(site, InMemory), "it was made here"
        self._queue = queue = self._queues[site.device]
        if not self._staging:
            # Locking pages costs more than filling them: done once, for the life of the worker.
            chunks = range(CHUNKS_PER_LANE)
            self._staging = [[queue.lock(self._chunk_bytes) for _ in chunks] for _ in range(self._lanes)]
        try:
            site.occupy()
        except DriverError as refusal:
            raise WeightsError(f"no room for {image.contents.model} on {site.device}: {refusal}", passing=True) from refusal
        data = image.bytes[: image.contents.data_bytes]
        # torch lets go of the interpreter while it copies, so the lanes and the making of the model do not wait in turn.
        threads = ThreadPoolExecutor(self._lanes, thread_name_prefix="lane")
        self._under_way = [threads.submit(self._fill, queue, lane, data, site.bytes) for lane in range(self._lanes)]
        threads.shutdown(wait=False)

    def finish(self) -> None:
        under_way, self._under_way = self._under_way, []
        for lane in under_way:
            lane.result()
        if self._queue is not None:
            self._queue.settle()

    def leave(self, site: Site) -> None:
        self._queues[site.device].drain()
        site.vacate()

    def _fill(self, queue: Queue, lane: int, data: torch.Tensor, run: torch.Tensor) -> None:
        """Every so manyth chunk, through this lane's own staging memory."""
        sent: deque[Callable[[], object]] = deque()
        starts = range(lane * self._chunk_bytes, data.numel(), self._lanes * self._chunk_bytes)
        for number, at in enumerate(starts):
            if len(sent) == CHUNKS_PER_LANE:
                sent.popleft()()
            chunk = data[at : at + self._chunk_bytes]
            staged = self._staging[lane][number % CHUNKS_PER_LANE][: chunk.numel()]
            staged.copy_(chunk)
            sent.append(queue.send(staged, run[at : at + chunk.numel()]))
        for wait in sent:  # the next image may be on its way as soon as this one is there
            wait()


class CudaQueue:
    """A stream of its own on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._driver = CudaDriver(device.index)

    def lock(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def site(self, nbytes: int) -> InMemory:
        return InMemory(self._driver, nbytes, self._device)

    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            sent = torch.cuda.Event()
            sent.record(self._stream)
        wait: Callable[[], object] = sent.synchronize
        return wait

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)

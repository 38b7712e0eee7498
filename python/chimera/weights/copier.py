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

from chimera.units import MIB
from chimera.weights.image import Image

CHUNK_BYTES: Final = 64 * MIB
LANES: Final = 4
"""One core fills page-locked memory more slowly than a link takes it away."""
CHUNKS_PER_LANE: Final = 2
"""One is filled while the device drains the other."""


class Copier(Protocol):
    def begin(self, image: Image, device: torch.device) -> torch.Tensor | None:
        """Where the image's bytes will be on the device; `None` if they need not go anywhere."""

    def finish(self) -> None:
        """When this returns, the next step on the device finds them there."""


class Queue(Protocol):
    """One device's memory, and the order of copies into it."""

    def lock(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device itself can read."""

    def reserve(self, nbytes: int) -> torch.Tensor:
        """Room on the device."""

    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        """Starts a copy. The answer waits for its end: only then may `staged` be written over. Called by several threads."""

    def settle(self) -> None:
        """Whatever the device does next comes after all that was sent."""


def copier_for(device_kind: str) -> Copier:
    return InPlace() if device_kind == "cpu" else StagingRing(CudaQueue)


class InPlace:
    """For a CPU."""

    def begin(self, image: Image, device: torch.device) -> torch.Tensor | None:
        return None

    def finish(self) -> None:
        pass


class StagingRing:
    """Page-locked memory of this process, in lanes: while the device drains one, the host fills the others."""

    def __init__(
        self, make_queue: Callable[[torch.device], Queue], *, chunk_bytes: int = CHUNK_BYTES, lanes: int = LANES
    ) -> None:
        self._make_queue = make_queue
        self._chunk_bytes = chunk_bytes
        self._lanes = lanes
        self._queue: Queue | None = None
        self._staging: list[list[torch.Tensor]] = []
        self._under_way: list[Future[None]] = []

    def begin(self, image: Image, device: torch.device) -> torch.Tensor | None:
        queue = self._queue
        if queue is None:
            queue = self._queue = self._make_queue(device)
            # Locking pages costs more than filling them: done once, for the life of the worker.
            chunks = range(CHUNKS_PER_LANE)
            self._staging = [[queue.lock(self._chunk_bytes) for _ in chunks] for _ in range(self._lanes)]
        data = image.bytes[: image.contents.data_bytes]
        run = queue.reserve(data.numel())
        # torch lets go of the interpreter while it copies, so the lanes and the making of the model do not wait in turn.
        threads = ThreadPoolExecutor(self._lanes, thread_name_prefix="lane")
        self._under_way = [threads.submit(self._fill, queue, lane, data, run) for lane in range(self._lanes)]
        threads.shutdown(wait=False)
        return run

    def finish(self) -> None:
        under_way, self._under_way = self._under_way, []
        for lane in under_way:
            lane.result()
        if self._queue is not None:
            self._queue.settle()

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

    def lock(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def reserve(self, nbytes: int) -> torch.Tensor:
        run = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # The memory may have been another tensor's, with a kernel still reading it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        run.record_stream(self._stream)
        return run

    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            sent = torch.cuda.Event()
            sent.record(self._stream)
        wait: Callable[[], object] = sent.synchronize
        return wait

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

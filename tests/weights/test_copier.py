"""An image on its way to a device: every byte at its place, whatever the lanes do, and none written over too early."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chimera.weights.copier import InPlace, StagingRing
from chimera.weights.image import Contents, Image, aligned
from chimera.weights.store import WeightStore

from tests.weights.test_store import key

CPU = torch.device("cpu")
CHUNK = 1024


class LateQueue:
    """A device that copies at the last moment it may: when it is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.settled = 0
        self._lock = threading.Lock()
        self.sent = 0

    def lock(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        with self._lock:
            self.sent += 1
        return lambda: target.copy_(staged)

    def settle(self) -> None:
        self.settled += 1


class BrokenQueue(LateQueue):
    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        raise RuntimeError("the device is gone")


def image(folder: Path, nbytes: int) -> Image:
    data = torch.frombuffer(bytearray(random.Random(nbytes).randbytes(nbytes)), dtype=torch.uint8)
    contents = Contents(key="k", model="a", data_bytes=aligned(nbytes), entries=())
    return WeightStore(folder).put(key(str(nbytes)), contents, [(0, data)])


@pytest.mark.parametrize("nbytes", [1, CHUNK, CHUNK * 3 + 1, CHUNK * 64 + 7])
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_every_byte_arrives_at_its_place(tmp_path: Path, nbytes: int, lanes: int) -> None:
    queues: list[LateQueue] = []

    def make(device: torch.device) -> LateQueue:
        queues.append(LateQueue(device))
        return queues[-1]

    ring = StagingRing(make, chunk_bytes=CHUNK, lanes=lanes)
    for _ in range(2):
        its = image(tmp_path, nbytes)
        run = ring.begin(its, CPU)
        ring.finish()
        assert run is not None and torch.equal(run, its.bytes[: its.contents.data_bytes])
    (queue,) = queues
    assert queue.settled == 2 and queue.sent == 2 * -(-aligned(nbytes) // CHUNK)


def test_a_device_that_fails_is_heard_of(tmp_path: Path) -> None:
    ring = StagingRing(BrokenQueue, chunk_bytes=CHUNK, lanes=2)
    ring.begin(image(tmp_path, CHUNK * 4), CPU)
    with pytest.raises(RuntimeError, match="gone"):
        ring.finish()


def test_on_a_cpu_nothing_is_copied(tmp_path: Path) -> None:
    assert InPlace().begin(image(tmp_path, CHUNK), CPU) is None

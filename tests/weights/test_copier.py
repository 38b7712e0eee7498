"""An image on its way to a device: every byte at its place, whatever the lanes do, and none written over too early."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chimera.errors import WeightsError
from chimera.units import KIB
from chimera.vmm.fake import FakeDriver
from chimera.vmm.host import HostDriver
from chimera.weights.copier import InPlace, StagingRing
from chimera.weights.image import Contents, Image, aligned
from chimera.weights.site import InMemory
from chimera.weights.store import WeightStore, _in_use

from tests.weights.test_store import key

CPU = torch.device("cpu")
DRIVER = HostDriver(64 * KIB)
CHUNK = 1024


class LateQueue:
    """A device that copies at the last moment it may: when it is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.settled = self.drained = 0
        self._lock = threading.Lock()
        self.sent = 0

    def lock(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def site(self, nbytes: int) -> InMemory:
        return InMemory(DRIVER, nbytes, CPU)

    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        with self._lock:
            self.sent += 1
        return lambda: target.copy_(staged)

    def settle(self) -> None:
        self.settled += 1

    def drain(self) -> None:
        self.drained += 1


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
        site = ring.site(its, CPU)
        ring.begin(its, site)
        ring.finish()
        assert torch.equal(site.bytes, its.bytes[: its.contents.data_bytes])
        site.close()
    (queue,) = queues
    assert queue.settled == 2 and queue.sent == 2 * -(-aligned(nbytes) // CHUNK)


def test_a_device_that_fails_is_heard_of(tmp_path: Path) -> None:
    ring = StagingRing(BrokenQueue, chunk_bytes=CHUNK, lanes=2)
    its = image(tmp_path, CHUNK * 4)
    ring.begin(its, ring.site(its, CPU))
    with pytest.raises(RuntimeError, match="gone"):
        ring.finish()


def test_what_left_comes_back_to_where_it_was(tmp_path: Path) -> None:
    queues: list[LateQueue] = []
    ring = StagingRing(lambda device: queues.append(LateQueue(device)) or queues[-1], chunk_bytes=CHUNK, lanes=2)
    its = image(tmp_path, CHUNK * 9 + 5)
    site = ring.site(its, CPU)
    before = DRIVER.created_bytes
    ring.begin(its, site)
    ring.finish()
    view = site.bytes[CHUNK:]  # as a graph has it
    ring.leave(site)
    assert DRIVER.created_bytes == before and queues[0].drained == 1, "no byte of it is left, and nothing used it"
    ring.begin(its, site)
    ring.finish()
    assert torch.equal(view, its.bytes[CHUNK : its.contents.data_bytes])
    site.close()
    assert DRIVER.created_bytes == before


def test_a_device_that_is_full_is_a_reason_that_passes(tmp_path: Path) -> None:
    driver = FakeDriver(64 * KIB)
    driver.refuse("create")

    class FullQueue(LateQueue):
        def site(self, nbytes: int) -> InMemory:
            return InMemory(driver, nbytes, CPU)

    ring = StagingRing(FullQueue, chunk_bytes=CHUNK, lanes=2)
    its = image(tmp_path, CHUNK)
    with pytest.raises(WeightsError, match="no room for a on cpu") as refused:
        ring.begin(its, ring.site(its, CPU))
    assert refused.value.passing


def test_a_cpu_sees_the_image_itself_which_is_in_use_while_it_shows(tmp_path: Path) -> None:
    its, copier = image(tmp_path, CHUNK), InPlace()
    path, wanted = its.path, its.bytes[:CHUNK].clone()
    site = copier.site(its, CPU)
    copier.begin(its, site)
    copier.finish()
    assert torch.equal(site.bytes[:CHUNK], wanted) and path.name in Path("/proc/self/maps").read_text()
    del its
    copier.leave(site)
    assert path.name not in Path("/proc/self/maps").read_text() and not _in_use(path)
    again = Image.open(path)
    assert again is not None
    copier.begin(again, site)
    assert torch.equal(site.bytes[:CHUNK], wanted)
    site.close()

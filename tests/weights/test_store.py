"""The folder of images: whole or not there, one builder at a time, a budget, and what goes when it is full."""

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chimera.errors import WeightsError
from chimera.weights.image import Canary, Contents, Entry, Image, aligned
from chimera.weights.source import FileStamp
from chimera.weights.store import ImageKey, WeightStore

PATIENCE_S = 30.0
PAGE = 4096


def key(folder: str = "/models/a", version: int = 1) -> ImageKey:
    files = (FileStamp("model.safetensors", 10, version, 1),)
    return ImageKey(folder=folder, files=files, engine="any 1.0", device="cpu", settings="{}")


def put(store: WeightStore, image_key: ImageKey, tensor: torch.Tensor, build_s: float = 1.0) -> Image:
    piece = tensor.contiguous().flatten().view(torch.uint8)
    entry = Entry("weight", "parameter", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride(), 0)
    contents = Contents(
        key=image_key.name,
        model="a",
        data_bytes=aligned(piece.numel()),
        entries=(entry,),
        canary=Canary(prompt=(1, 2), tokens=(3,)),
        build_s=build_s,
    )
    return store.put(image_key, contents, [(0, piece)])


def size(nbytes: int) -> torch.Tensor:
    return torch.arange(nbytes // 4, dtype=torch.int32)


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path)


def in_another_process(work: Callable[[], None]) -> int:
    """The process id; `work` has begun when this returns only if it says so itself."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], PATIENCE_S)[0])


def test_an_image_comes_back_as_it_was_put(store: WeightStore) -> None:
    tensor = torch.randn(16, 8, dtype=torch.bfloat16)
    put(store, key(), tensor)
    image = store.open(key())
    assert image is not None
    ((entry, found),) = image.tensors()
    assert entry.name == "weight" and torch.equal(found, tensor)
    assert image.contents.canary == Canary(prompt=(1, 2), tokens=(3,))
    image.require_intact()


def test_an_image_laid_over_other_memory_has_the_same_tensors(store: WeightStore) -> None:
    tensor = torch.randn(16, 8)
    image = put(store, key(), tensor)
    run = torch.cat([torch.zeros(512, dtype=torch.uint8), image.bytes[: image.contents.data_bytes]])[512:]
    ((_, found),) = image.tensors(run)
    assert torch.equal(found, tensor) and found.untyped_storage().data_ptr() == run.untyped_storage().data_ptr()


def test_changed_files_are_another_image_and_the_old_one_goes(store: WeightStore) -> None:
    put(store, key(version=1), size(PAGE))
    assert store.open(key(version=2)) is None
    put(store, key(version=2), size(PAGE))
    assert store.open(key(version=1)) is None and store.open(key(version=2)) is not None


def test_a_tensor_written_to_changes_nobody_else(store: WeightStore) -> None:
    put(store, key(), size(PAGE))
    mine, other = store.open(key()), store.open(key())
    assert mine is not None and other is not None
    ((_, tensor),) = mine.tensors()
    tensor.fill_(7)
    other.require_intact()


@pytest.mark.parametrize("damage", ["cut", "mark", "table"])
def test_a_damaged_image_is_taken_away(store: WeightStore, damage: str) -> None:
    path = put(store, key(), size(PAGE)).path
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            del content[-1:]
        case "mark":
            content[-1] ^= 1
        case "table":
            content[-40] ^= 1
    path.write_bytes(content)
    assert store.open(key()) is None and not path.exists()


def test_a_flipped_bit_is_found_by_its_checksum(store: WeightStore) -> None:
    path = put(store, key(), size(PAGE)).path
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    image = store.open(key())
    assert image is not None
    with pytest.raises(WeightsError, match="checksum"):
        image.require_intact()


def test_a_table_that_points_outside_is_refused(store: WeightStore) -> None:
    entry = Entry("weight", "parameter", "float32", (1024,), (1,), 512)
    with pytest.raises(WeightsError, match="outside"):
        store.put(key(), Contents(key="k", model="a", data_bytes=PAGE, entries=(entry,)), [])


def test_a_budget_lets_the_cheapest_to_rebuild_go_first(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, budget_bytes=24 * PAGE)
    for name, build_s in (("dear", 100.0), ("cheap", 1.0)):
        put(store, key(name), size(8 * PAGE), build_s)
    put(store, key("new"), size(8 * PAGE))
    assert store.open(key("cheap")) is None
    assert store.open(key("dear")) is not None and store.open(key("new")) is not None
    assert store.used_bytes() <= 24 * PAGE


def test_what_lies_idle_goes_before_what_was_just_used(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, budget_bytes=24 * PAGE)
    for name in ("idle", "used"):
        os.utime(put(store, key(name), size(8 * PAGE)).path, (1, 1))
    assert store.open(key("used")) is not None
    put(store, key("new"), size(8 * PAGE))
    assert store.open(key("idle")) is None and store.open(key("used")) is not None


def test_an_image_in_use_never_goes_and_the_newcomer_is_refused(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, budget_bytes=24 * PAGE)
    held = [put(store, key(name), size(8 * PAGE)) for name in ("a", "b")]
    tensors = [tensor for image in held for _, tensor in image.tensors()]
    del held
    with pytest.raises(WeightsError, match="no room") as refused:
        put(store, key("new"), size(8 * PAGE))
    assert refused.value.passing
    del tensors
    put(store, key("new"), size(8 * PAGE))


def test_an_image_that_can_never_fit_costs_nobody_his_place(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, budget_bytes=24 * PAGE)
    put(store, key("a"), size(8 * PAGE))
    with pytest.raises(WeightsError, match="no room"):
        put(store, key("giant"), size(64 * PAGE))
    assert store.open(key("a")) is not None


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm to fill")
def test_a_full_file_system_is_a_refusal_before_the_first_byte() -> None:
    folder = Path("/dev/shm")
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    contents = Contents(key="k", model="a", data_bytes=aligned(free + (1 << 30)), entries=())
    with pytest.raises(WeightsError, match="no room"):
        WeightStore(folder, budget_bytes=None)._reserve(key(), contents.data_bytes)
    assert not list(folder.glob(f"{key().name}*"))
    (folder / "books.lock").unlink()


def test_two_builders_of_one_model_take_turns(store: WeightStore) -> None:
    begun_r, begun_w = os.pipe()
    done_r, done_w = os.pipe()
    go_r, go_w = os.pipe()

    def first() -> None:
        with store.turn(key()):
            os.write(begun_w, b"x")
            os.read(go_r, 1)
            put(store, key(), size(PAGE))

    def second() -> None:
        with store.turn(key()):
            os.write(done_w, b"1" if store.open(key()) is not None else b"0")

    pids = [in_another_process(first)]
    assert readable(begun_r)
    pids.append(in_another_process(second))
    os.write(go_w, b"x")
    assert readable(done_r) and os.read(done_r, 1) == b"1", "the second finds what the first has built"
    for pid in pids:
        os.waitpid(pid, 0)
    for fd in (begun_r, begun_w, done_r, done_w, go_r, go_w):
        os.close(fd)


def test_a_builder_killed_half_way_leaves_no_image_and_its_room_comes_back(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, budget_bytes=12 * PAGE)
    begun_r, begun_w = os.pipe()

    def half_way() -> None:
        with store.turn(key()):
            store._reserve(key(), 8 * PAGE)
            os.write(begun_w, b"x")
            signal.pause()

    pid = in_another_process(half_way)
    assert readable(begun_r)
    with pytest.raises(WeightsError, match="no room"):
        put(store, key("other"), size(8 * PAGE))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert store.open(key()) is None
    with store.turn(key()):
        put(store, key(), size(8 * PAGE))
    assert store.open(key()) is not None and not list(tmp_path.glob("*.part"))
    os.close(begun_r)
    os.close(begun_w)


def test_a_builder_that_fails_leaves_nothing(store: WeightStore) -> None:
    contents = Contents(key="k", model="a", data_bytes=PAGE, entries=())
    with pytest.raises(RuntimeError):
        store.put(key(), contents, [(PAGE - 1, torch.zeros(2, dtype=torch.uint8))])
    assert store.used_bytes() == 0

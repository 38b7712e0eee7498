"""SGLang's models from shared images: the same tokens as from their files, and no wrong one ever in service.

The engine runs in this very process, so that faults can be planted in it. Imported once, SGLang leaves no process as it
was: `test_in_process.py` runs these in one of their own.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from chimera.engine.api import CannotServe, Leave, Parking, Submission
from chimera.engine.preload import preload
from chimera.msg.stream import Payload, Sampling
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS
from chimera.vmm.host import HostDriver
from chimera.weights.copier import StagingRing
from chimera.weights.image import Canary, Contents, closing
from chimera.weights.site import InMemory
from chimera.weights.store import WeightStore

from tests.worker.stage import model

if TYPE_CHECKING:
    from chimera.engine.sglang.warm import WarmEngine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ARCHITECTURES = ("llama", "qwen3", "gemma2", "mistral", "moe")
PROMPT = (5, 6, 7, 8, 9)
LONG = Sampling(max_new_tokens=200, temperature=0.0, ignore_eos=True)
KV = 4096 * 4096


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ARCHITECTURES:
        make(MODELS[name], folder / name, seed=0)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    folder = tmp_path / "images"
    folder.mkdir()
    return WeightStore(folder)


@pytest.fixture(scope="module")
def bare() -> Any:
    return preload("sglang")()


@pytest.fixture
def engine(bare: Any, store: WeightStore) -> Iterator["WarmEngine"]:
    from chimera.engine.sglang.warm import WarmEngine

    engine = WarmEngine(bare, store)
    yield engine
    engine.deactivate()


@pytest.fixture
def llama(checkpoints: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoints / "llama", tmp_path / "llama"))


def says(engine: "WarmEngine", name: str, folder: Path, **fields: Any) -> tuple[int, ...]:
    engine.activate(model(name, str(folder), **fields), gpu_ids=(0,), kv_bytes=KV)
    said = engine.ask(PROMPT)
    engine.deactivate()
    return said


def says_bare(bare: Any, name: str, folder: Path) -> tuple[int, ...]:
    from chimera.engine.sglang.warm import CANARY_TOKENS, _Question

    bare.activate(model(name, str(folder)), gpu_ids=(0,), kv_bytes=KV)
    question = _Question(PROMPT, CANARY_TOKENS)
    with pytest.raises(Leave):
        bare.serve(question)
    bare.deactivate()
    return tuple(question.said)


def images(store: WeightStore) -> list[Path]:
    return list(store.folder.glob("*.image"))


def rewrite(path: Path, **changes: Any) -> None:
    """Change what an image says of itself, with valid checksums all the same."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[-20:-12])[0]
    contents = msgspec.msgpack.decode(content[-20 - length : -20], type=Contents)
    path.write_bytes(content[: contents.data_bytes] + closing(msgspec.structs.replace(contents, **changes)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_from_its_image_says_what_it_says_from_its_files(
    bare: Any, engine: "WarmEngine", store: WeightStore, checkpoints: Path, name: str
) -> None:
    wanted = says_bare(bare, name, checkpoints / name)
    assert says(engine, name, checkpoints / name) == wanted, "built just now"
    (path,) = images(store)
    before = path.stat().st_ino
    assert says(engine, name, checkpoints / name) == wanted, "built before"
    assert path.stat().st_ino == before, "nothing was built again"
    assert not any(image.contents.unfit for image in [_open(path)])


def test_latent_attention_keeps_what_loading_derives(engine: "WarmEngine", store: WeightStore, tmp_path: Path) -> None:
    """MLA's absorbed projections are no parameters. On a CPU such a model is built and asked nothing."""
    from chimera.engine.sglang.images import witnessed

    make(MODELS["deepseek"], tmp_path / "deepseek", seed=0)
    with witnessed(lambda nbytes: None) as witness:
        engine._bare.activate(model("deepseek", str(tmp_path / "deepseek")), gpu_ids=(0,), kv_bytes=KV)
    engine.deactivate()
    assert witness.survey is not None, witness.unfit
    derived = {entry.name.rpartition(".")[2] for entry in witness.survey.entries if entry.kind == "attribute"}
    assert {"w_kc", "w_vc"} <= derived


def test_tied_embeddings_are_stored_once(engine: "WarmEngine", store: WeightStore, checkpoints: Path) -> None:
    engine.prepare(model("gemma2", str(checkpoints / "gemma2")), gpu_ids=(0,))
    (path,) = images(store)
    files_bytes = (checkpoints / "gemma2" / "model.safetensors").stat().st_size
    contents = _open(path).contents
    rotary_bytes = sum(4 * e.shape[0] * e.shape[1] for e in contents.entries if e.name.endswith("cos_sin_cache"))
    assert contents.data_bytes < files_bytes + rotary_bytes + 512 * len(contents.entries)


def test_two_workers_share_the_bytes(engine: "WarmEngine", store: WeightStore, checkpoints: Path) -> None:
    engine.activate(model("llama", str(checkpoints / "llama")), gpu_ids=(0,), kv_bytes=KV)
    (path,) = images(store)
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if path.name in line]
    assert len(mapped) == 1, "the weights are views of one mapping"
    engine.deactivate()
    assert path.name not in Path("/proc/self/maps").read_text(), "nothing holds the image of a model that has left"


def test_preparing_twice_checks_and_builds_nothing(engine: "WarmEngine", store: WeightStore, checkpoints: Path) -> None:
    spec = model("llama", str(checkpoints / "llama"))
    nbytes = engine.prepare(spec, gpu_ids=(0,))
    (path,) = images(store)
    inode = path.stat().st_ino
    assert engine.prepare(spec, gpu_ids=(0,)) == nbytes > 0
    assert path.stat().st_ino == inode
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff\xff\xff\xff")
    engine.prepare(spec, gpu_ids=(0,))
    (path,) = images(store)
    _open(path).require_intact()


def test_a_model_that_wakes_up_wrong_is_kept_out_of_service(
    engine: "WarmEngine", store: WeightStore, checkpoints: Path
) -> None:
    spec = model("llama", str(checkpoints / "llama"))
    engine.prepare(spec, gpu_ids=(0,))
    (path,) = images(store)
    canary = _open(path).contents.canary
    rewrite(path, canary=Canary(prompt=canary.prompt, tokens=tuple(token + 1 for token in canary.tokens)))
    with pytest.raises(CannotServe, match="woke up wrong") as refused:
        engine.activate(spec, gpu_ids=(0,), kv_bytes=KV)
    assert not refused.value.permanent and not images(store), "its image is gone, so the next attempt builds it anew"
    engine.activate(spec, gpu_ids=(0,), kv_bytes=KV)


def test_a_new_image_that_brings_the_model_back_wrong_is_never_used(
    engine: "WarmEngine", store: WeightStore, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = says(engine, "qwen3", checkpoints / "qwen3")
    for path in images(store):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_wrong", lambda image: "it says nothing")
        assert says(engine, "qwen3", checkpoints / "qwen3") == wanted, "from its files"
    (path,) = images(store)
    assert _open(path).contents.unfit == "it says nothing"


def test_a_canary_that_cannot_be_asked_says_nothing_of_the_image(
    engine: "WarmEngine", store: WeightStore, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = model("llama", str(checkpoints / "llama"))
    engine.prepare(spec, gpu_ids=(0,))
    # A prompt for which there is no room.
    monkeypatch.setattr(engine, "_wrong", lambda image: str(engine.ask(tuple(range(3, 5000)))))
    with pytest.raises(CannotServe, match="could not be asked") as refused:
        engine.activate(spec, gpu_ids=(0,), kv_bytes=1024 * 4096)
    assert not refused.value.permanent and len(images(store)) == 1


def test_exchanged_weights_are_noticed(engine: "WarmEngine", store: WeightStore, checkpoints: Path) -> None:
    spec = model("llama", str(checkpoints / "llama"))
    engine.prepare(spec, gpu_ids=(0,))
    (path,) = images(store)
    content = bytearray(path.read_bytes())
    data_bytes = _open(path).contents.data_bytes
    content[: data_bytes // 2] = content[data_bytes // 2 // 512 * 512 : data_bytes // 2 // 512 * 512 + data_bytes // 2]
    path.write_bytes(content)
    with pytest.raises(CannotServe, match="woke up wrong"):
        engine.activate(spec, gpu_ids=(0,), kv_bytes=KV)


def test_changed_files_are_built_anew(engine: "WarmEngine", store: WeightStore, checkpoints: Path, llama: Path) -> None:
    first = says(engine, "llama", llama)
    make(MODELS["llama"], llama, seed=1)
    second = says(engine, "llama", llama)
    assert second != first and len(images(store)) == 1
    make(MODELS["llama"], llama, seed=0)
    assert says(engine, "llama", llama) == first


def test_files_that_change_while_they_are_read_make_no_image(
    engine: "WarmEngine", store: WeightStore, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = engine.ask

    def meanwhile(prompt: tuple[int, ...]) -> tuple[int, ...]:
        (llama / "model.safetensors").touch()
        return ask(prompt)

    monkeypatch.setattr(engine, "ask", meanwhile)
    with pytest.raises(CannotServe, match="changed while they were read") as refused:
        engine.activate(model("llama", str(llama)), gpu_ids=(0,), kv_bytes=KV)
    assert not refused.value.permanent and not images(store)


def test_a_folder_that_is_gone_is_refused_with_the_reason(engine: "WarmEngine", tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match="folder cannot be read"):
        engine.activate(model("gone", str(tmp_path / "gone")), gpu_ids=(0,), kv_bytes=KV)


def test_a_truncated_checkpoint_is_refused_by_name(engine: "WarmEngine", store: WeightStore, llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CannotServe, match=r"model\.safetensors.*cut short") as refused:
        engine.activate(model("llama", str(llama)), gpu_ids=(0,), kv_bytes=KV)
    assert refused.value.permanent and not images(store)


def test_heads_that_contradict_the_weights_are_refused(engine: "WarmEngine", store: WeightStore, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(CannotServe, match=r"describes") as refused:
        engine.activate(model("llama", str(llama)), gpu_ids=(0,), kv_bytes=KV)
    assert refused.value.permanent and not images(store)


def test_a_tensor_that_is_missing_is_refused(engine: "WarmEngine", store: WeightStore, llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))  # one thing more than it needs
    with pytest.raises(CannotServe, match=r"layers\.1\.mlp\.gate_up_proj") as refused:
        engine.activate(model("llama", str(llama)), gpu_ids=(0,), kv_bytes=KV)
    assert refused.value.permanent and not images(store)


def test_an_unknown_architecture_is_refused(engine: "WarmEngine", store: WeightStore, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"], "model_type": "no_such"}))
    with pytest.raises(CannotServe) as refused:
        engine.activate(model("llama", str(llama)), gpu_ids=(0,), kv_bytes=KV)
    assert refused.value.permanent and str(refused.value) and not images(store)


def test_a_full_store_is_a_reason_and_passes(bare: Any, tmp_path: Path, checkpoints: Path) -> None:
    from chimera.engine.sglang.warm import WarmEngine

    engine = WarmEngine(bare, WeightStore(tmp_path, budget_bytes=1 << 20))
    with pytest.raises(CannotServe, match="no room") as refused:
        engine.activate(model("llama", str(checkpoints / "llama")), gpu_ids=(0,), kv_bytes=KV)
    assert not refused.value.permanent


def test_sglangs_own_loaders_stay(engine: "WarmEngine", store: WeightStore, checkpoints: Path) -> None:
    spec = model("llama", str(checkpoints / "llama"), engine_args={"load_format": "dummy"})
    assert engine.prepare(spec, gpu_ids=(0,)) == 0
    engine.activate(spec, gpu_ids=(0,), kv_bytes=KV)
    assert not images(store)


def test_a_model_that_cannot_come_from_an_image_comes_from_its_files(
    engine: "WarmEngine", store: WeightStore, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chimera.engine.sglang import images as module

    wanted = says(engine, "llama", checkpoints / "llama")
    for path in images(store):
        path.unlink()

    def needs_values(model_config: Any, load_config: Any) -> Any:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    with monkeypatch.context() as patch:
        patch.setattr(module, "skeleton", needs_values)
        assert says(engine, "llama", checkpoints / "llama") == wanted
    (path,) = images(store)
    assert "meta tensor" in _open(path).contents.unfit
    assert says(engine, "llama", checkpoints / "llama") == wanted, "nor is it tried again"


class HostQueue:
    """A device whose memory is some of the host's, so that weights are copied there and leave it."""

    def __init__(self, device: torch.device) -> None:
        self.driver = HostDriver(64 << 10)

    def lock(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def site(self, nbytes: int) -> InMemory:
        return InMemory(self.driver, nbytes, torch.device("cpu"))

    def send(self, staged: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        target.copy_(staged)
        return lambda: None

    def settle(self) -> None:
        """Every copy was over when it was sent."""

    def drain(self) -> None:
        """So is everything else."""


def test_who_watches_hears_of_every_byte_that_is_read_and_copied(
    engine: "WarmEngine", store: WeightStore, checkpoints: Path
) -> None:
    heard = {"read": 0, "copied": 0}

    def watch(doing: str, nbytes: int) -> None:
        heard[doing] += nbytes

    engine.watch(watch)
    engine.prepare(model("llama", str(checkpoints / "llama")), gpu_ids=(0,))
    (path,) = images(store)
    header_bytes = struct.unpack("<Q", (checkpoints / "llama" / "model.safetensors").read_bytes()[:8])[0]
    assert heard["read"] == (checkpoints / "llama" / "model.safetensors").stat().st_size - 8 - header_bytes
    assert _open(path).contents.data_bytes - 512 * 1000 < heard["copied"] <= _open(path).contents.data_bytes
    before = dict(heard)
    engine.prepare(model("llama", str(checkpoints / "llama")), gpu_ids=(0,))
    assert heard == before, "nothing is built that is there"


@pytest.fixture(params=["in place", "copied"])
def parking(bare: Any, store: WeightStore, request: pytest.FixtureRequest) -> Iterator["WarmEngine"]:
    """Keeps two models that have left."""
    from chimera.engine.sglang.warm import WarmEngine

    engine = WarmEngine(bare, store, Parking(models=2))
    if request.param == "copied":
        engine._copier = StagingRing(HostQueue, chunk_bytes=1 << 18, lanes=2)
    yield engine
    engine.deactivate()
    engine._shelf.clear("the test is over")
    assert not torch.distributed.is_initialized(), "nothing is left of any of them"
    assert site_bytes(engine) == 0


def site_bytes(engine: "WarmEngine") -> int:
    """Of weights on the device that stands in for one."""
    queues = getattr(engine._copier, "_queues", {})
    return sum(queue.driver.created_bytes for queue in queues.values())


def visit(engine: "WarmEngine", name: str, folder: Path, tokens: int = 4) -> tuple[int, ...]:
    engine.activate(model(name, str(folder)), gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
    said = engine.ask(PROMPT, tokens)
    engine.deactivate()
    return said


def on_shelf(engine: "WarmEngine") -> set[str]:
    return set(engine.remains(0).models)


def test_a_model_that_returns_is_bound_again_and_not_built(
    parking: "WarmEngine", bare: Any, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {name: visit(parking, name, checkpoints / name) for name in ("llama", "moe")}
    with monkeypatch.context() as patch:
        patch.setattr(bare, "activate", lambda *_, **__: pytest.fail("it was built again"))
        for _ in range(3):
            for name, wanted in first.items():
                assert visit(parking, name, checkpoints / name) == wanted
    assert on_shelf(parking) == {"llama", "moe"}


def test_a_parked_model_has_no_memory_but_for_what_was_built_around_it(parking: "WarmEngine", checkpoints: Path) -> None:
    visit(parking, "llama", checkpoints / "llama")
    (parked,) = parking._shelf.on(0)
    assert parked.what.aside.kv._driver.created_bytes == 0 and site_bytes(parking) == 0
    assert parking._bare.holding() is None
    parking.activate(parked.berth.model, gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
    holding = parking.holding()
    assert holding is not None and 0 < holding.held_bytes <= KV


def test_a_third_model_makes_the_oldest_leave(parking: "WarmEngine", checkpoints: Path) -> None:
    said = {name: visit(parking, name, checkpoints / name) for name in ("llama", "qwen3")}
    for parked in parking._shelf.on(0):
        parked.build_s = 1.0  # equals but for their time here
    visit(parking, "gemma2", checkpoints / "gemma2")
    assert "llama" not in on_shelf(parking) and len(on_shelf(parking)) == 2
    assert visit(parking, "llama", checkpoints / "llama") == said["llama"], "it is built again, and right"


def test_letting_go_of_one_leaves_the_one_that_is_up_alone(parking: "WarmEngine", checkpoints: Path) -> None:
    wanted = visit(parking, "qwen3", checkpoints / "qwen3")
    visit(parking, "moe", checkpoints / "moe")
    parking.activate(model("qwen3", str(checkpoints / "qwen3")), gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
    parking._shelf.clear("room is needed")
    assert not on_shelf(parking) and parking.ask(PROMPT, 4) == wanted
    parking.deactivate()
    assert visit(parking, "qwen3", checkpoints / "qwen3") == wanted


def test_who_leaves_in_the_middle_of_an_answer_is_parked_without_it(parking: "WarmEngine", checkpoints: Path) -> None:
    wanted = visit(parking, "llama", checkpoints / "llama")
    parking.activate(model("llama", str(checkpoints / "llama")), gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
    with pytest.raises(Leave):
        parking.serve(Impatient(after=3))
    assert parking.stats().running == 1
    parking.deactivate()
    assert on_shelf(parking) == {"llama"}
    parking.activate(model("llama", str(checkpoints / "llama")), gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
    assert parking.stats().running == 0 and parking.stats().kv_used_tokens == 0
    assert parking.ask(PROMPT, 4) == wanted


def test_a_parked_model_keeps_no_image_from_making_room_for_another(
    parking: "WarmEngine", store: WeightStore, checkpoints: Path
) -> None:
    wanted = visit(parking, "llama", checkpoints / "llama")
    (path,) = images(store)
    store.budget_bytes = path.stat().st_size + (1 << 20)  # no second one fits
    visit(parking, "qwen3", checkpoints / "qwen3")
    assert path not in images(store) and on_shelf(parking) == {"llama", "qwen3"}
    assert visit(parking, "llama", checkpoints / "llama") == wanted, "over an image that was built anew"


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lie(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[:8] = struct.pack("<Q", len(content))
    weights.write_bytes(content)


def become_unknown(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"], "model_type": "no_such"}))


def contradict(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))


def go(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut, "cut short"),
        (lie, r"model\.safetensors"),
        (become_unknown, "no_such"),
        (contradict, "describes"),
        (go, "cannot be read"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_else_is_touched(
    parking: "WarmEngine",
    bare: Any,
    store: WeightStore,
    checkpoints: Path,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    reason: str,
) -> None:
    wanted = visit(parking, "qwen3", checkpoints / "qwen3")
    before = images(store)
    spoil(llama)
    with pytest.raises(CannotServe, match=reason):
        visit(parking, "llama", llama)
    assert images(store) == before and on_shelf(parking) == {"qwen3"}
    monkeypatch.setattr(bare, "activate", lambda *_, **__: pytest.fail("it was built again"))
    assert visit(parking, "qwen3", checkpoints / "qwen3") == wanted


def test_other_files_are_another_model(parking: "WarmEngine", llama: Path) -> None:
    first = visit(parking, "llama", llama)
    make(MODELS["llama"], llama, seed=1)
    assert visit(parking, "llama", llama) != first


def test_a_parked_model_that_says_something_else_is_not_served(
    parking: "WarmEngine", store: WeightStore, checkpoints: Path
) -> None:
    visit(parking, "llama", checkpoints / "llama")
    path = next(store.folder.glob("*.image"))
    content = bytearray(path.read_bytes())
    half = _open(path).contents.data_bytes // 2 // 512 * 512
    content[:half] = content[half : 2 * half]
    with path.open("r+b") as file:  # where it is mapped it changes too
        file.write(content)
    with pytest.raises(CannotServe, match="woke up wrong"):
        visit(parking, "llama", checkpoints / "llama")
    assert not on_shelf(parking)


class Cached:
    """A post that asks one thing, and hears how much of the prompt was there already."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        sampling = Sampling(max_new_tokens=4, temperature=0.0, ignore_eos=True)
        self._orders: list[Any] = [Submission("r", Payload(input_ids=list(prompt), sampling=sampling))]
        self.said: list[int] = []
        self.cached = 0
        self._over = False

    def collect(self, wait_s: float | None) -> list[Any]:
        if self._over and wait_s != 0.0:
            raise Leave
        orders, self._orders = self._orders, []
        return orders

    def deliver(self, deltas: list[Any]) -> None:
        for delta in deltas:
            self.said += delta.token_ids
            self.cached = delta.cached_tokens
            self._over |= delta.outcome is not None

    def fail(self, request_id: str, code: str, message: str) -> None:
        raise AssertionError(message)

    def give_back(self, request_id: str, reason: str) -> None:
        raise AssertionError(reason)


def asks(engine: "WarmEngine", prompt: tuple[int, ...]) -> Cached:
    post = Cached(prompt)
    with pytest.raises(Leave):
        engine.serve(post)
    return post


COMMON = tuple(range(100, 160))
PROMPTS = [(*COMMON, *range(start, start + 20)) for start in (200, 220, 240)]


@pytest.fixture
def hoarding(bare: Any, store: WeightStore) -> Iterator["WarmEngine"]:
    from chimera.engine.sglang.warm import WarmEngine

    engine = WarmEngine(bare, store, Parking(models=2, host_kv_bytes=1 << 30))
    yield engine
    engine.deactivate()
    engine._shelf.clear("the test is over")


def test_prefixes_are_there_again_when_the_model_returns(hoarding: "WarmEngine", checkpoints: Path) -> None:
    spec = model("llama", str(checkpoints / "llama"))
    for visits in range(3):
        hoarding.activate(spec, gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
        answers = [asks(hoarding, prompt) for prompt in PROMPTS]
        if not visits:
            wanted = [answer.said for answer in answers]
            assert [answer.cached for answer in answers] == [0, 60, 60]
        else:
            assert [answer.cached for answer in answers] == [79, 79, 79]
            assert [answer.said for answer in answers] == wanted
        hoarding.deactivate()


def test_of_prefixes_that_have_no_room_on_the_host_the_last_used_stay(hoarding: "WarmEngine", checkpoints: Path) -> None:
    spec = model("llama", str(checkpoints / "llama"))
    hoarding.activate(spec, gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
    for prompt in PROMPTS:
        asks(hoarding, prompt)
    hoarding._host_kv_bytes = 100 * hoarding._bare._kv._owned_pool.slot_bytes
    hoarding.deactivate()
    hoarding.activate(spec, gpu_ids=(0,), kv_bytes=KV, ceiling_bytes=2 * KV)
    assert [asks(hoarding, prompt).cached for prompt in reversed(PROMPTS)] == [79, 60, 60]


class Impatient:
    """A post that asks for a long answer, and leaves when it has some of it."""

    def __init__(self, after: int) -> None:
        self._orders: list[Any] = [Submission("r", Payload(input_ids=list(PROMPT), sampling=LONG))]
        self._left = after

    def collect(self, wait_s: float | None) -> list[Any]:
        if self._left <= 0:
            raise Leave
        orders, self._orders = self._orders, []
        return orders

    def deliver(self, deltas: list[Any]) -> None:
        self._left -= len(deltas)

    def fail(self, request_id: str, code: str, message: str) -> None:
        raise AssertionError(message)

    def give_back(self, request_id: str, reason: str) -> None:
        raise AssertionError(reason)

    def flushed(self) -> None:
        raise AssertionError("nobody has asked for it")


def _open(path: Path) -> Any:
    from chimera.weights.image import Image

    image = Image.open(path)
    assert image is not None
    return image

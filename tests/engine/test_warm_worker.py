"""Shared images among real workers: two that want one model at once build it once, and both say what it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chimera.msg import events, stream
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.worker.stage import Stage, model, payload

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

KV = 4096 * 4096
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("d"), "sglang", "--images", str(images))
    yield stage
    stage.close()


def test_two_workers_that_want_one_model_at_once_build_it_once(stage: Stage, images: Path, tmp_path: Path) -> None:
    make(MODELS["llama"], tmp_path / "llama", seed=0)
    spec = model("llama", str(tmp_path / "llama"))
    workers = [stage.hire(f"w{i}") for i in range(2)]
    epochs = [worker.activate(spec, kv_limit_bytes=KV) for worker in workers]
    for worker in workers:
        worker.inbox.next(events.ReplicaReady)
    assert len(list(images.glob("*.image"))) == 1 and not list(images.glob("*.part"))
    said = []
    for number, (worker, epoch) in enumerate(zip(workers, epochs, strict=True)):
        stage.new_act()
        worker.submit(f"r{number}", epoch, payload(PROMPT, 4))
        said.append(stage.finished(f"r{number}")[0].tokens)
        worker.dismiss()
    assert said[0] == said[1] and len(said[0]) == 4


def test_a_worker_prepares_a_model_and_stays_empty(stage: Stage, images: Path, tmp_path: Path) -> None:
    make(MODELS["qwen3"], tmp_path / "qwen3", seed=0)
    spec = model("qwen3", str(tmp_path / "qwen3"))
    worker = stage.hire()
    worker.channel.send(stream.Prepare(model=spec))
    prepared = worker.inbox.next(stream.Prepared)
    assert prepared.model == "qwen3" and prepared.host_bytes > 0 and not prepared.fault
    (tmp_path / "qwen3" / "model.safetensors").write_bytes(b"")
    worker.channel.send(stream.Prepare(model=spec))
    assert "model.safetensors" in worker.inbox.next(stream.Prepared).fault
    make(MODELS["qwen3"], tmp_path / "qwen3", seed=0)
    worker.become(spec, kv_limit_bytes=KV)
    worker.dismiss()

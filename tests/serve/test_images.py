"""The whole server with SGLang and shared images: built before they are needed, and gone with the server."""

import json
from pathlib import Path

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import house, until

pytestmark = pytest.mark.slow
START_S = 120.0


def test_models_that_are_off_get_their_images_while_the_others_serve(tmp_path: Path) -> None:
    entries = []
    for name, on in (("llama", True), ("qwen3", False)):
        make(MODELS[name], tmp_path / name, seed=0)
        seat = {"gpu_ids": [0], "on": on, "max_memory_pool_size": 0.05}
        entries.append({"model_name": name, "model_path": str(tmp_path / name), "init_placements": [seat]})
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(entries))
    images = tmp_path / "images"
    with house(file, "--engine", "sglang", "--image-dir", str(images), ready=False) as served:
        until(lambda: served.address[1], "the server to be ready", START_S)
        assert served.complete("llama")[0] == 200
        until(lambda: len(list(images.glob("*.image"))) == 2, "both images", START_S)
        assert "could not prepare" not in (served.log_dir / "agent-local.log").read_text()
    assert not list(images.glob("*.part")) and len(list(images.glob("*.image"))) == 2


def test_a_servers_own_folder_in_shared_memory_goes_with_it(tmp_path: Path) -> None:
    make(MODELS["llama"], tmp_path / "llama", seed=0)
    entry = {"model_name": "llama", "model_path": str(tmp_path / "llama"), "init_placements": [{"gpu_ids": [0]}]}
    file = tmp_path / "placement.json"
    file.write_text(json.dumps([entry]))

    def folders() -> set[Path]:
        return set(Path("/dev/shm").glob("chimera-images-*"))

    before = folders()
    with house(file, "--engine", "sglang", "--enable-worker-pool", "--workers-per-gpu", "2", ready=False) as served:
        until(lambda: served.address[1], "the server to be ready", START_S)
        (mine,) = folders() - before
        assert list(mine.glob("*.image"))
        until(lambda: len(served.workers()) == 3, "one worker at work and two EMPTY ones")
    assert mine not in folders()

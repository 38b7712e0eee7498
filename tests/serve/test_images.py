"""The whole server with SGLang and shared images: built before they are needed, and gone with the server."""

import json
from pathlib import Path
from typing import Any

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
        make(MODELS["gemma2"], tmp_path / "late", seed=0)
        assert served.ask("POST", "/models", {"model_name": "late", "model_path": "late"})[0] == 200
        until(lambda: len(list(images.glob("*.image"))) == 3, "the image of a model that was registered later", START_S)
        assert "could not prepare" not in (served.log_dir / "agent-local.log").read_text()
    assert not list(images.glob("*.part")) and len(list(images.glob("*.image"))) == 3


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


def test_a_folder_deleted_while_its_model_serves_is_no_fault_until_it_is_loaded_again(tmp_path: Path) -> None:
    entries = []
    for name in ("llama", "qwen3"):
        make(MODELS[name], tmp_path / name, seed=0)
        seat = {"gpu_ids": [0], "max_memory_pool_size": 0.05}
        entries.append({"model_name": name, "model_path": str(tmp_path / name), "init_placements": [seat]})
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(entries))
    with house(file, "--engine", "sglang", "--no-enable-cpu-share-memory", ready=False) as served:
        until(lambda: served.address[1], "the server to be ready", START_S)

        def ask(name: str) -> tuple[int, Any]:
            body = {"model": name, "prompt": "hello", "max_tokens": 5, "temperature": 0}
            return served.ask("POST", "/v1/completions", body)

        status, said = ask("llama")
        assert status == 200
        (tmp_path / "llama").rename(tmp_path / "away")
        assert ask("llama")[1]["choices"] == said["choices"], "what is in memory serves"
        assert served.ask("POST", "/models/unload", {"model": "llama"})[0] == 200
        status, told = served.ask("POST", "/models/load", {"model": "llama"})
        assert status == 503 and "llama" in told["error"]["message"]
        assert ask("llama")[0] == 503
        assert ask("qwen3")[0] == 200, "others are left alone"
        (tmp_path / "away").rename(tmp_path / "llama")
        assert served.ask("POST", "/models/load", {"model": "llama"})[0] == 200
        assert ask("llama")[1]["choices"] == said["choices"]

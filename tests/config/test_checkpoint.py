"""A model is found in a folder, in the hub's local cache or on the hub; nothing is waited for that does not answer."""

import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chimera.config import checkpoint, deployment
from chimera.config.checkpoint import download, locate, missing_tokenizer, read_checkpoint
from chimera.core.model import Tastes
from chimera.errors import ConfigError

MakeModel = Callable[..., Path]


def test_a_models_folder_has_config_weights_and_tokenizer(make_model: MakeModel) -> None:
    folder = make_model("llama")
    assert read_checkpoint(folder).shape.architecture == "LlamaForCausalLM"
    assert missing_tokenizer(folder) == ""


def test_everything_that_a_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(tmp_path)
    assert [fault.what for fault in caught.value.faults] == [
        f"{tmp_path.name}: no config.json, so it is not a model's folder",
        f"{tmp_path.name}: no weights as *.safetensors",
    ]
    assert "tokenizer.json" in missing_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [("{", "config.json"), ("[]", "not a JSON object"), ('{"architectures": ["X"]}', "unknown architecture 'X'")],
)
def test_a_config_that_is_not_understood_is_quoted(make_model: MakeModel, config: str, named: str) -> None:
    folder = make_model("llama")
    (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=named):
        read_checkpoint(folder)


def test_how_its_makers_would_pick_tokens_is_read(make_model: MakeModel) -> None:
    folder = make_model("llama")
    assert read_checkpoint(folder).tastes == Tastes()
    told = {"do_sample": True, "eos_token_id": [1, 4], "temperature": 0.6, "top_k": 20, "top_p": None}
    (folder / "generation_config.json").write_text(json.dumps(told))
    assert read_checkpoint(folder).tastes == Tastes(temperature=0.6, top_k=20)


@pytest.mark.parametrize(("told", "named"), [("{", "generation_config.json"), ('{"top_p": 7}', r"\$\.top_p")])
def test_tastes_that_make_no_sense_are_quoted(make_model: MakeModel, told: str, named: str) -> None:
    folder = make_model("llama")
    (folder / "generation_config.json").write_text(told)
    with pytest.raises(ConfigError, match=named):
        read_checkpoint(folder)


def test_other_formats_of_weights_are_told_apart(make_model: MakeModel) -> None:
    folder = make_model("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="the only format that is read"):
        read_checkpoint(folder)


def test_every_part_that_the_index_names_has_to_be_there(make_model: MakeModel) -> None:
    folder = make_model("llama")
    parts = {f"w{n}": f"model-{n % 2}.safetensors" for n in range(4)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (folder / "model-0.safetensors").touch()
    with pytest.raises(ConfigError, match=r"1 files of weights are missing, first model-1\.safetensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["./llama", "/no/such/llama", "~/no/such/llama", "a/b/c", "a..b/c", "a b", "-x", "x" * 300])
def test_what_can_be_neither_folder_nor_hub_id_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        locate(name, [tmp_path])


def test_a_file_that_is_no_model_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("words")
    with pytest.raises(ConfigError, match="is a file"):
        locate("README.md", [tmp_path])


def test_a_model_in_the_hubs_cache_is_found_once_it_is_complete(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = make_model("hub/models--org--llama/snapshots/abc")
    (tmp_path / "hub/models--org--llama/refs").mkdir()
    (tmp_path / "hub/models--org--llama/refs/main").write_text("abc")
    assert locate("org/llama", [tmp_path]) == folder
    assert locate("org/other", [tmp_path]) is None
    (folder / "model.safetensors").unlink()
    assert locate("org/llama", [tmp_path]) is None
    assert locate("org/llama", [tmp_path], weights=False) == folder


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
COMMIT = "a" * 40
FILES = {
    "config.json": json.dumps(LLAMA).encode(),
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "original/model.safetensors": b"twice",
}


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
COMMIT = "a" * 40
FILES = {
    "config.json": json.dumps(LLAMA).encode(),
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "original/model.safetensors": b"twice",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: one model, of three files, and one behind a licence."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        file = path.partition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/org/llama/tree/"):
            listing = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()]
            self._send(200, json.dumps(listing).encode(), body)
        elif path.startswith("/api/models/org/llama"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(200, json.dumps({"id": "org/llama", "sha": COMMIT, "siblings": siblings}).encode(), body)
        elif path.startswith("/api/models/org/gated"):
            self._send(403, b"{}", body, **{"X-Error-Code": "GatedRepo"})
        elif file in FILES:
            self._send(200, FILES[file], body, **{"X-Repo-Commit": COMMIT, "ETag": f'"{file}"'})
        else:
            self._send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, data: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_downloaded_into_the_cache_without_its_second_copy(hub: str, tmp_path: Path) -> None:
    folder = download("org/llama", endpoint=hub, cache=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_placement_file_brings_its_hub_models_with_it(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "download", functools.partial(download, endpoint=hub, cache=tmp_path / "hub"))
    path = tmp_path / "placement.json"
    path.write_text(json.dumps([{"model_name": "a", "model_path": "org/llama"}]))
    (model,) = deployment.load_placement(path, None).models
    assert Path(model.path, "model.safetensors").read_bytes() == b"weights"
    assert model.tokenizer_path == model.path


def test_for_paper_a_hub_model_comes_without_its_weights_and_later_with_them(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr(deployment, "download", functools.partial(download, endpoint=hub, cache=cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    path = tmp_path / "placement.json"
    path.write_text(json.dumps([{"model_name": "a", "model_path": "org/llama"}]))
    (model,) = deployment.load_placement(path, None, weights=False).models
    assert not Path(model.path, "model.safetensors").exists()
    ((split,),) = deployment.load_splits(path, (1,))
    assert split.weight_bytes == model.weight_bytes and not Path(split.path, "model.safetensors").exists()
    (model,) = deployment.load_placement(path, None).models
    assert Path(model.path, "model.safetensors").read_bytes() == b"weights"


def test_models_that_cannot_be_downloaded_are_all_named(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "download", functools.partial(download, endpoint=hub, cache=tmp_path / "hub"))
    path = tmp_path / "placement.json"
    path.write_text(json.dumps([{"model_name": name, "model_path": f"org/{name}"} for name in ("gated", "nothing")]))
    with pytest.raises(ConfigError) as caught:
        deployment.load_placement(path, None)
    assert [fault.where for fault in caught.value.faults] == ["[0].model_path", "[1].model_path"]


def test_the_hubs_refusals_say_what_to_do(hub: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accept its licence"):
        download("org/gated", endpoint=hub, cache=tmp_path)
    with pytest.raises(ConfigError, match="the hub knows no model org/nothing"):
        download("org/nothing", endpoint=hub, cache=tmp_path)


def test_a_network_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ConfigError, match="cannot be downloaded") as caught:
            download("org/llama", endpoint=endpoint, cache=tmp_path)
    assert "or give a folder" in caught.value.faults[0].hint


def test_a_network_that_never_answers_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "REACH_HUB_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.perf_counter()
        with pytest.raises(ConfigError, match="cannot be downloaded"):
            download("org/llama", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", cache=tmp_path)
        assert time.perf_counter() - began < 5

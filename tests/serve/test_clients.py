"""The clients that people have, unmodified, against a whole server; streamed and not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import House, house

pytestmark = pytest.mark.slow

BENCH_SERVING = """
import runpy, sys, types
from chimera import standins
standins.install()
sys.modules.setdefault("datasets", types.SimpleNamespace(load_dataset=None))  # for pictures, which are not asked for
runpy.run_module("sglang.bench_serving", run_name="__main__")
"""
"""SGLang's own benchmark, where packages that it imports and does not need here may be absent."""
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    make(MODELS["llama"], folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[House]:
    """One model, as `sglang.bench_serving` expects it: it names none to `/generate`."""
    entry = {"model_name": "m", "model_path": str(folder), "init_placements": [{"gpu_ids": [0]}]}
    file = folder.parent / "placement.json"
    file.write_text(json.dumps([entry]))
    with house(file) as served:
        yield served


@pytest.fixture
def url(served: House) -> str:
    host, port = served.address
    return f"http://{host}:{port}"


def test_openai(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(model="m", messages=HI, max_tokens=7)
        chunks = client.chat.completions.create(model="m", messages=HI, max_tokens=7, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 7
        assert client.completions.create(model="m", prompt="a", max_tokens=5).usage.completion_tokens == 5
        assert client.responses.create(model="m", input="hi", max_output_tokens=7).output_text == text
        assert [model.id for model in client.models.list()] == ["m"]


def test_anthropic(url: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        whole = client.messages.create(model="m", messages=HI, max_tokens=7)
        with client.messages.stream(model="m", messages=HI, max_tokens=7) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
        assert client.messages.count_tokens(model="m", messages=HI).input_tokens == whole.usage.input_tokens


def test_litellm(url: str) -> None:
    """In a process of its own: it warns of much that is not ours."""
    script = f"""
import litellm
ask = dict(messages={HI!r}, max_tokens=7, api_key="none")
for model, base in (("openai/m", "{url}/v1"), ("anthropic/m", "{url}")):
    whole = litellm.completion(model=model, api_base=base, **ask)
    chunks = litellm.completion(model=model, api_base=base, stream=True, **ask)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text and text == whole.choices[0].message.content, (model, text, whole)
    assert whole.usage.completion_tokens == 7, whole
print("both agree")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "both agree" in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.parametrize("stream", [False, True])
def test_curl(url: str, stream: bool) -> None:
    body = json.dumps({"model": "m", "messages": HI, "max_tokens": 7, "stream": stream})
    command = ["curl", "-sS", "--fail", "-N", "-H", "Content-Type: application/json", "-d", body, f"{url}/v1/chat/completions"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    if stream:
        assert said.startswith("data: {") and said.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(said)["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
def test_bench_serving(url: str, folder: Path, tmp_path: Path, backend: str) -> None:
    words = [
        "--backend",
        backend,
        "--base-url",
        url,
        "--model",
        "m",
        "--tokenizer",
        str(folder),
        "--dataset-name",
        "random-ids",
    ]
    words += ["--num-prompts", "12", "--random-input-len", "16", "--random-output-len", "8", "--random-range-ratio", "1"]
    words += ["--output-file", str(tmp_path / "told.jsonl"), "--disable-tqdm", "--seed", "1"]
    if backend == "sglang-oai-chat":
        words.append("--apply-chat-template")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BENCH_SERVING, *words], capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    told = json.loads((tmp_path / "told.jsonl").read_text())
    assert (told["completed"], told["total_output_tokens"]) == (12, 96)

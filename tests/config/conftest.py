"""Folders that look like models to a reader of configs: a config.json, an empty safetensors file, a tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**SMALL_LLAMA, **changes}))
        (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A placement file beside the models: plain values as JSON, or text as it is."""

    def write_file(contents: Any, name: str = "placement.json") -> Path:
        path = tmp_path / name
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return path

    return write_file

"""Placement files with anything done to them: a deployment or a ConfigError, at once; never another traceback."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chimera.config.deployment import survey_placement
from chimera.config.virtual_gpus import parse_virtual_gpus
from chimera.errors import ConfigError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GPUS = parse_virtual_gpus("4x1GiB")
SOUND: dict[str, Any] = {
    "$schema": "./schema.json",
    "policy": "flexible",
    "gpus": "4x1GiB",
    "models": [
        {
            "model_name": "a",
            "model_path": "llama",
            "tokenizer_path": "llama",
            "tp_size": 2,
            "init_placements": [{"gpu_ids": [0, 1], "on": True, "max_memory_pool_size": 0.1}],
            "aliases": ["x"],
            "slo": {"ttft_ms": 500, "tpot_ms": 50.5},
            "keep_alive": "5m",
            "engine_args": {"kv_cache_dtype": "auto", "nested": {"list": [1, None]}},
        },
        {"model_name": "b", "model_path": "./llama", "pin": True, "quantization": "fp8", "context_length": 64, "dtype": "half"},
        {"model_name": "c", "model_path": "${env.MODEL}", "init_placements": [{"gpu_ids": [3]}, {"gpu_ids": [2], "on": False}]},
    ],
}
WORDS = ["", "a", "b", "auto", "llama", "..", "/", "~", "~root", "\0", "\ud800", "a b", "${env.X}", "${env.MODEL}", "x" * 5000]
WORDS += [
    "5m",
    "-1",
    "8x2GiB",
    "awq",
    "fp8",
    "fp8_e5m2",
    "float32",
    "model_name",
    "gpu_ids",
    "on",
    "tp_size",
    "é",
    "[0]",
    "a\nb",
]
SNIPPETS = [b"[", b"{", b'"', b"&a ", b"*a", b"<<: *a\n", b"!!int ", b"? ", b"- ", b"\xff", b"---\n"]
SOUND_TEXTS = {".json": json.dumps(SOUND, indent=1).encode(), ".yaml": yaml.safe_dump(SOUND).encode()}
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 20)
    | st.integers()
    | st.floats()
    | st.sampled_from([1 << 63, -(1 << 70), 10**30, 1e308])
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
    ),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


@st.composite
def mutated_values(draw: st.DrawFn) -> Any:
    document = {"": copy.deepcopy(SOUND)}
    if draw(st.booleans()):
        document[""] = document[""]["models"]
    for _ in range(draw(st.integers(1, 4))):
        container, key = draw(st.sampled_from(list(places(document))))
        match draw(st.sampled_from(["replace", "remove", "rename", "repeat", "wrap"])):
            case "replace":
                container[key] = draw(values)
            case "remove" if container is not document:
                del container[key]
            case "rename" if isinstance(container, dict) and container is not document:
                container[draw(st.sampled_from(WORDS) | st.text(max_size=8))] = container.pop(key)
            case "repeat" if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case "wrap":
                container[key] = [container[key]]
    return document[""]


@st.composite
def mutated_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name and what is in it: a changed document, or a sound one with changed bytes."""
    suffix = draw(st.sampled_from([".json", ".yaml"]))
    if draw(st.booleans()):
        value = draw(mutated_values())
        text = json.dumps(value) if suffix == ".json" else yaml.safe_dump(value)
        return suffix, text.encode("utf-8", "surrogatepass")
    raw = bytearray(SOUND_TEXTS[suffix])
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(raw)))
        length = draw(st.integers(0, 20))
        raw[start : start + length] = draw(st.binary(max_size=6) | st.sampled_from(SNIPPETS))
    return suffix, bytes(raw)


def survives(folder: Path, suffix: str, raw: bytes) -> None:
    path = folder / f"placement{suffix}"
    path.write_bytes(raw)
    began = time.perf_counter()
    try:
        survey_placement(path, GPUS, elastic=False, environment={"MODEL": "llama"})  # static has the most rules
    except ConfigError as error:
        assert error.faults
        str(error).encode()
    assert time.perf_counter() - began < 10, "a hang by another name"


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    make_model("llama")
    return tmp_path


def test_the_sound_file_is_sound(folder: Path) -> None:
    path = folder / "placement.json"
    path.write_text(json.dumps(SOUND))
    assert len(survey_placement(path, GPUS, environment={"MODEL": "llama"}).checkpoints) == 3


SAME_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=300, deadline=None, suppress_health_check=SAME_FOLDER)
@given(file=mutated_files())
def test_a_mutated_file_is_a_value_or_a_clear_error(folder: Path, file: tuple[str, bytes]) -> None:
    survives(folder, *file)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=SAME_FOLDER)
@given(file=mutated_files())
def test_ten_thousand_mutated_files_are_values_or_clear_errors(folder: Path, file: tuple[str, bytes]) -> None:
    survives(folder, *file)

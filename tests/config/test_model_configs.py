"""Every file that is shipped is read as an operator's would be, and the published schema says what the types say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chimera.config.deployment import load_placement, survey_placement
from chimera.config.placement_file import json_schema
from chimera.config.virtual_gpus import parse_virtual_gpus

FOLDER = Path(__file__).parents[2] / "model_configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json") if path.name != "schema.json")
TINY = [name for name in FILES if name.startswith("cpu_")]
REAL = [name for name in FILES if not name.startswith("cpu_")]
SHAPES = [
    "1_gpu_2_model_colocate_elastic.json",
    "1_gpu_2_model_colocate_static.json",
    "1_gpu_2_model_our.json",
    "4_gpu_2_model.json",
    "8_gpu_18_model_our.json",
]


def contents(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def test_the_schema_is_the_one_of_the_types() -> None:
    assert contents("schema.json") == json_schema(), "chimera check --schema > model_configs/schema.json"


def test_the_files_that_prisms_users_know_are_there() -> None:
    assert REAL == SHAPES
    assert {*TINY, "cpu_1_gpu_2_model.json"} >= {f"cpu_{shape}" for shape in SHAPES if shape != "1_gpu_2_model_our.json"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_to_the_schema_and_to_its_name(name: str) -> None:
    document = contents(name)
    jsonschema.validate(document, json_schema())
    entries = document["models"] if isinstance(document, dict) else document
    gpu_ids = {gpu_id for entry in entries for seat in entry["init_placements"] for gpu_id in seat["gpu_ids"]}
    words = name.removeprefix("cpu_").split("_")
    assert (len(gpu_ids), len(entries)) == (int(words[0]), int(words[2]))


@pytest.mark.parametrize("document", [{}, {"models": [{"model_name": "a"}]}, [{"model_name": "a", "model_path": "b", "x": 1}]])
def test_the_schema_refuses_what_is_no_placement_file(document: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json_schema())


@pytest.mark.parametrize("name", REAL)
def test_a_file_for_gpus_is_sound_on_gpus_of_80_gb(name: str) -> None:
    survey = survey_placement(FOLDER / name, parse_virtual_gpus("8x80GB"), elastic="static" not in name)
    assert set(survey.absent) | {entry.model_path for entry in survey.file.models} == {
        entry.model_path for entry in survey.file.models
    }


@pytest.mark.parametrize("name", TINY)
def test_a_file_for_any_machine_loads_with_the_tiny_models(name: str, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    for kind in ("llama", "qwen3", "gemma2", "mistral", "moe"):
        make_model(f".models/{kind}")
    (tmp_path / "examples").symlink_to(FOLDER.parent / "examples")
    (tmp_path / "model_configs").mkdir()
    shutil.copy(FOLDER / name, tmp_path / "model_configs" / name)
    deployment = load_placement(tmp_path / "model_configs" / name, None, elastic="static" not in name)
    assert len(deployment.gpus) == int(name.split("_")[1])
    assert {seat.replica.model for seat in deployment.placement.seats} <= {model.name for model in deployment.models}
    assert len({model.name for model in deployment.models}) == len(deployment.models)

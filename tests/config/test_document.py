"""Files become plain values, or one clear error; no file is large, deep or clever enough to hang the reader."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chimera.config.document import MOST_VALUES, read_document
from chimera.config.faults import Faults
from chimera.errors import ConfigError

Write = Callable[..., Path]


def read(path: Path, **environment: str) -> Any:
    faults = Faults(str(path))
    value = read_document(path, environment, faults)
    faults.require_none()
    return value


def refusal(path: Path, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **environment)
    return str(caught.value)


def test_yaml_and_json_say_the_same(write: Write) -> None:
    expected = [{"model_name": "a", "init_placements": [{"gpu_ids": [0, 1], "on": False, "max_memory_pool_size": 1.5}]}]
    yaml = "- model_name: a\n  init_placements:\n  - {gpu_ids: [0, 1], on: false, max_memory_pool_size: 1.5}\n"
    assert read(write(expected)) == expected
    assert read(write(yaml, "placement.yaml")) == expected


def test_yaml_keeps_words_that_its_first_version_took_for_truth_values(write: Write) -> None:
    assert read(write("on: true\nname: no\nsize: 010\nwhen: 2024-01-01\nrate: 1e3\n", "a.yml")) == {
        "on": True,
        "name": "no",
        "size": 10,
        "when": "2024-01-01",
        "rate": 1000.0,
    }


def test_yaml_aliases_and_merges_are_welcome(write: Write) -> None:
    text = "base: &base {slo: {ttft_ms: 5}, pin: true}\nother: {<<: *base, pin: false}\n"
    assert read(write(text, "a.yaml"))["other"] == {"slo": {"ttft_ms": 5}, "pin": False}


def test_environment_variables_fill_any_text(write: Write) -> None:
    path = write([{"model_path": "${env.HUB}/llama-${env.SIZE}"}])
    assert read(path, HUB="/models", SIZE="8b") == [{"model_path": "/models/llama-8b"}]


def test_a_variables_own_text_is_not_filled_again(write: Write) -> None:
    assert read(write(["${env.A}"]), A="${env.B}", B="secret") == ["${env.B}"]


def test_missing_variables_are_faults_with_their_place(write: Write) -> None:
    said = refusal(write([{"model_path": "${env.HUB}"}, {"x": ["${env.not a name}"]}]))
    assert "[0].model_path: environment variable HUB is not set" in said
    assert "[1].x[0]: '${env.not a name}' names no environment variable" in said


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", '[{"a": 1,}]', "line 1, column"),
        ("a.json", "", "is not JSON"),
        ("a.json", "[" * 200_000, "nested deeper"),
        ("a.json", "[" * 40 + "]" * 40, "nested deeper"),
        ("a.json", '{"a": 1, "b": 2, "a": 3}', "key 'a' is written twice"),
        ("a.json", "[NaN]", "is not a number to work with"),
        ("a.json", "[1e999]", "is not a number to work with"),
        ("a.json", "[" + "9" * 5000 + "]", "is not JSON"),
        ("a.json", "[99999999999999999999]", "more than 64 bits"),
        ("a.json", r'["\ud800"]', "not valid Unicode"),
        ("a.json", r'["\u0000"]', "a zero byte"),
        ("a.json", r'{"\ud800": 1}', "not valid Unicode"),
        ("a.yaml", "a: [1", "line 1, column"),
        ("a.yaml", "a: 1\nb: 2\na: 3\n", "line 3: key 'a' is written twice"),
        ("a.yaml", "1: x\n", "key 1 is not text"),
        ("a.yaml", "? [a]\n: x\n", "is not YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system ['true']\n", "is not used here"),
        ("a.yaml", "a: !!int x\n", "is not used here"),
        ("a.yaml", "a: &a [*a]\n", "what it is part of"),
        ("a.yaml", "a: *b\n", "undefined alias"),
        ("a.yaml", "- " * 5_000, "nested deeper"),
        ("a.yaml", "a: \x01\n", "is not YAML"),
        ("a.yaml", "--- 1\n--- 2\n", "is not YAML"),
        ("a.toml", "a = 1", "does not end in"),
        ("a.json", "[" + " " * (1 << 20) + "]", "is larger than"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(write: Write, name: str, text: str, named: str) -> None:
    path = write(text, name)
    with pytest.raises(ConfigError, match=named):
        read(path)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    assert "is not UTF-8" in refusal(tmp_path / "a.json")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "a.json")
    (tmp_path / "folder.json").mkdir()
    assert "cannot be read: Is a directory" in refusal(tmp_path / "folder.json")


@pytest.mark.parametrize("join", ["[{}]", "{{<<: [{}]}}"])
def test_a_billion_laughs_cost_no_more_than_their_limit(write: Write, join: str) -> None:
    lines = ["l0: &l0 {a: ha}"] + [f"l{n}: &l{n} " + join.format(", ".join([f"*l{n - 1}"] * 10)) for n in range(1, 12)]
    began = time.perf_counter()
    assert f"more than {MOST_VALUES} values" in refusal(write("\n".join(lines), "a.yaml"))
    assert time.perf_counter() - began < 5


def test_a_large_honest_file_is_read_in_a_moment(write: Write) -> None:
    entries = [{"model_name": f"m{n}", "aliases": ["x", "y"]} for n in range(10_000)]
    began = time.perf_counter()
    assert read(write(entries)) == entries
    assert time.perf_counter() - began < 5

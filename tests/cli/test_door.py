"""Who is let in, as the operator writes it: the keys file, the flags, and the refusal to stand open by mistake."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from chimera.cli import door, main
from chimera.config.keys import client_key, read_keys
from chimera.core.access import hash_of
from chimera.errors import ConfigError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    door.configure(parser)
    return parser.parse_args(words)


def keys_file(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": entries}))
    return path


def test_a_key_is_shown_once_and_its_entry_lets_it_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["keys", "anna", "--admin", "--models", "a,b", "--requests-per-minute", "60"]) == 0
    said = capsys.readouterr()
    key = said.err.split()[-1]
    assert key.startswith("sk-") and len(key) > 40 and key not in said.out
    [entry] = read_keys(keys_file(tmp_path, json.loads(said.out)))
    assert entry.hash == hash_of(key)
    assert (entry.name, entry.models, entry.requests_per_minute, entry.admin) == ("anna", ("a", "b"), 60, True)


def test_keys_are_added_to_a_file_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.jsonl"
    with path.open("a") as file:
        for name in ("anna", "bert"):
            assert main.main(["keys", name]) == 0
            file.write(capsys.readouterr().out)
    assert [entry.name for entry in read_keys(path)] == ["anna", "bert"]
    path.write_text(path.read_text() + '\n{"name": "carl" "hash": ""}\n')
    with pytest.raises(ConfigError, match="line 4, column 17"):
        read_keys(path)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ([], "keys"),
        ([{"name": "a", "hash": "sk-not-a-hash"}], "keys[0].hash"),
        ([{"name": "a", "hash": hash_of("x"), "modles": ["m"]}], "modles"),
        ([{"name": "a", "hash": hash_of("x")}, {"name": "a", "hash": hash_of("y")}], "keys[1].name"),
        ([{"name": "a", "hash": hash_of("x")}, {"name": "b", "hash": hash_of("x")}], "keys[1].hash"),
        ([{"name": "a", "hash": hash_of("x"), "requests_per_minute": 0}], "keys[0].requests_per_minute"),
    ],
)
def test_a_fault_in_the_keys_file_is_named_with_its_place(tmp_path: Path, entries: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_keys(keys_file(tmp_path, *entries))
    assert named in str(refused.value) and "keys.json" in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "some.name", ""])
def test_where_others_can_reach_it_a_key_is_asked_for_unless_told_otherwise(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="no key is asked for"):
        door.access_of(arguments("--host", host))
    assert door.access_of(arguments("--host", host, "--open")).keys == ()
    path = keys_file(tmp_path, {"name": "a", "hash": hash_of("x")})
    assert len(door.access_of(arguments("--host", host, "--keys", str(path))).keys) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_this_machine_alone_no_key_is_needed(host: str) -> None:
    assert door.access_of(arguments("--host", host)).keys == ()


def test_a_certificate_that_cannot_be_used_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    for path in (tmp_path / "cert.pem", tmp_path / "absent.pem"):
        with pytest.raises(ConfigError, match="cannot be used"):
            door.access_of(arguments("--tls-cert", str(path)))
    with pytest.raises(ConfigError, match="--tls-cert names that"):
        door.access_of(arguments("--tls-key", "key.pem"))


def test_a_command_finds_its_own_key_in_the_environment() -> None:
    assert client_key({"CHIMERA_API_KEY": "sk-x"}) == "sk-x"
    assert client_key({"CHIMERA_API_KEY": ""}) is client_key({}) is None

"""Every command that a document shows is run, in a folder like the checkout and beside a server like the document's.

What cannot run here stands in `ELSEWHERE`, with its reason, and is held to what its program says of its flags. A command
that is neither run nor there fails.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from chimera.cli.main import make_parser
from chimera.cli.server_url import DEFAULT_URL
from chimera.core.access import hash_of
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.docs.documents import ROOT, SHELL, documents, fences, flags_of, name_of
from tests.serve.house import House, house, launched

WITHIN_S = 120.0
SHOWN = [(document, language, block) for document in documents() for language, block in fences(document.read_text())]

ELSEWHERE = {
    r"make (serve|install)": "sets up an environment, as whoever runs this has done",
    r"make test$": "is what runs this",
    r"make bench$": "takes ten minutes",
    r"benchmark/gpu/wheelhouse\.sh$": "downloads 1.1 GB",
    r"export \w+=": "only sets a variable",
    r"python3 -m pip ": "wants a registry, or what was carried from one; tests/packages builds the wheel and installs it",
    r"python3 benchmark/gpu/spike\.py ": "asks a GPU; tests/benchmark/test_spike.py rehearses it",
    r"python examples/tiny_models/train\.py ": "takes half an hour",
    r"docker ": "wants Docker's daemon",
    r"helm ": "wants a cluster",
    r"sudo ": "changes the machine; tests/packages/test_deploy.py has systemd read the unit",
}
"""What is not run here, and why."""

SOONER = {"--seconds": "1", "--cases": "2", "--days": "1"}
"""What makes the same command end sooner."""

ENDLESS = {"--watch"}
"""What goes on until Ctrl-C."""

TOO_BUSY = "This machine cannot make that load beside what else it does."
"""With which `chimera bench` ends where what it measured says nothing."""


def lines(block: str) -> list[str]:
    """Each command in one line, without what explains it."""
    whole = block.replace("\\\n", " ").splitlines()
    return [command for line in whole if (command := re.sub(r"(^|\s+)# .*$", "", line).strip())]


COMMANDS = [(document, line) for document, language, block in SHOWN if language in SHELL for line in lines(block)]


def requests_of(document: Path) -> list[object]:
    shown = [json.loads(block) for where, language, block in SHOWN if (where, language) == (document, "json")]
    return [body for body in shown if "messages" in body]


def elsewhere(line: str) -> str | None:
    return next((pattern for pattern in ELSEWHERE if re.match(pattern, line)), None)


# Where a reader stands.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen3"):
        make(MODELS[name], folder / name, seed=0)
    return folder


@pytest.fixture(scope="module")
def hub(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's local cache, as if all that our files name had been fetched: a small model in the place of each."""
    cache = tmp_path_factory.mktemp("hub")
    for file in (ROOT / "model_configs").glob("*_gpu_*.json"):
        for name in re.findall(r'"model_path": "([\w.-]+/[\w.-]+)"', file.read_text()):
            entry = cache / f"models--{name.replace('/', '--')}"
            (entry / "refs").mkdir(parents=True, exist_ok=True)
            (entry / "refs" / "main").write_text("0")
            (entry / "snapshots").mkdir(exist_ok=True)
            if not (entry / "snapshots" / "0").exists():
                (entry / "snapshots" / "0").symlink_to(models / "llama")
    return cache


@pytest.fixture
def folder(models: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout, with the files that a reader of the guides has by then."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "chimera": "-m chimera "}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "models").symlink_to(models)
    entries = [
        {
            "model_name": name,
            "model_path": f"models/{name}",
            "slo": {"ttft_ms": 200, "tpot_ms": 20},
            "init_placements": [{"gpu_ids": [0], "max_memory_pool_size": 0.05}],
        }
        for name in ("llama", "qwen3")
    ]
    (tmp_path / "placement.json").write_text(json.dumps({"gpus": "8x1GiB", "models": entries}))
    rows = [f"{second},{model},16,4" for second in range(5) for model in ("llama-3.2-1b", "llama-3.1-8b")]
    (tmp_path / "trace.csv").write_text("\n".join(["timestamp,model,prompt_tokens,output_tokens", *rows]) + "\n")
    (tmp_path / "keys.jsonl").write_text(json.dumps({"name": "alice", "hash": hash_of("a key")}) + "\n")
    shutil.copy(ROOT / "python" / "chimera" / "config" / "costs" / "h100-80g-like.json", tmp_path / "my-machine.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


# What runs.


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted({document for document, _ in COMMANDS}), ids=name_of)
def test_every_command_of_a_document_runs(document: Path, folder: Path) -> None:
    runs = [line for shown, line in COMMANDS if shown == document and not elsewhere(line)]
    file = "model_configs/cpu_1_gpu_3_model.json" if document.name == "README.md" else "placement.json"
    with ExitStack() as stack:
        beside = functools.cache(lambda: stack.enter_context(house(folder / file, "--policy", "flexible")))
        for line in runs:
            run(line, beside)
        for body in requests_of(document):
            status, told = beside().ask("POST", "/v1/chat/completions", body)
            assert status == 200, told


def run(line: str, beside: Callable[[], House]) -> None:
    """`beside` is the server that a command may talk to."""
    words = shlex.split(line)
    if words[1:2] == ["serve"]:
        with house(Path(words[2]), *words[3:]) as another:
            assert another.address[1]
    elif words[2:3] == ["chimera.launch_multi_model_server"]:
        with launched(Path(words[4]), *words[5:]) as another:
            assert another.address[1]
    else:
        known = told_flags(words)
        words += [word for flag, value in SOONER.items() if flag in known for word in (flag, value)]
        words += ["--url", DEFAULT_URL] if "--url" in known else []
        if any(DEFAULT_URL in word for word in words):
            words = [word.replace(DEFAULT_URL, "http://{}:{}".format(*beside().address)) for word in words]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ENDLESS & set(words):
            assert process.stdout is not None
            assert process.stdout.readline()
            process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 0 or TOO_BUSY in said, f"{line}\n{said}"


def told_flags(words: list[str]) -> set[str]:
    """The flags that a program's own help names."""
    if words[0].removeprefix(".venv/bin/") == "chimera":
        verb = words[1]
        return set(flags_of(make_parser(set() if verb.startswith("-") else {verb})))
    if words[0] in ("curl", "make"):
        return set()
    told = subprocess.run([*itself(words), "--help"], capture_output=True, text=True, timeout=WITHIN_S)
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", told.stdout))


def itself(words: list[str]) -> list[str]:
    """The words that name the program, and its verb where it has verbs."""
    match words:
        case ["sudo", *rest]:
            return itself(rest)
        case ["python" | "python3", "-m", "pip", verb, *_]:
            return [sys.executable, "-m", "pip", verb]
        case ["python" | "python3", "-m", module, *_]:
            return [sys.executable, "-m", module]
        case ["python" | "python3", script, *_]:
            return [sys.executable, str(ROOT / script)]
        case ["docker" | "helm" as name, verb, *_]:
            return [name, verb]
    return words[:1]


# What does not.


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if elsewhere(line)}))
def test_what_cannot_run_here_says_what_its_program_understands(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        planned = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
        return
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word) and word != "-m"}
    if flags:
        name, *_ = itself(words)
        if shutil.which(name) is None:
            pytest.skip(f"not shown: {name} is not installed")
        assert flags <= told_flags(words), f"{' '.join(itself(words))} has no {flags - told_flags(words)}"


def test_every_reason_not_to_run_is_somebodys() -> None:
    assert {elsewhere(line) for _, line in COMMANDS} - {None} == set(ELSEWHERE)


# What is no command.


def test_every_block_is_of_a_kind_that_is_tried() -> None:
    tried = {"json": _is_placement_or_request, "yaml": yaml.safe_load, "python": _is_of_the_tutorial, "text": str.strip}
    for document, language, block in SHOWN:
        assert language in SHELL or tried[language](block), f"{name_of(document)}: {block}"


def _is_placement_or_request(block: str) -> bool:
    """The one is read by test_guides.py, the other is asked above."""
    return "model_path" in block or "messages" in json.loads(block)


def _is_of_the_tutorial(block: str) -> bool:
    """Whose code test_guides.py runs."""
    return block in (ROOT / "docs" / "writing-a-policy.md").read_text()

"""The packages that are handed out: built from what is under version control, installed elsewhere, and serving there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chimera
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

_BUILD = "from setuptools import build_meta as b; print(b.build_{kind}({folder!r}))"


def run(*words: str | Path, cwd: Path) -> str:
    # Without PYTHONPATH: another SGLang, or this checkout, is not to be found by chance.
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=300.0)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def under_version_control() -> list[str]:
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy: setuptools leaves its traces where it builds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in under_version_control():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return out / run(sys.executable, "-c", _BUILD.format(kind="sdist", folder=str(out)), cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that one that lacks a file is found out."""
    tree, out = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(tree, filter="data")
    [source] = tree.iterdir()
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), source, cwd=out)
    [built] = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel; what it depends on is lent from this one."""
    home = tmp_path_factory.mktemp("home") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home.parent)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home.parent).strip())
    # A plain path: the .pth files in there, this checkout's own among them, are not read.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_the_wheel_holds_the_package_and_what_it_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {name.removeprefix("python/") for name in under_version_control() if name.startswith("python/chimera/")}
    assert {"chimera/py.typed", "chimera/cli/main.py"} <= kept
    assert kept - names == set(), "package-data in pyproject.toml leaves them out"
    assert {name.partition("/")[0] for name in names} == {"chimera", f"chimera_serving-{chimera.__version__}.dist-info"}


def test_the_sdist_holds_its_licence_and_no_weights(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"LICENSE", "README.md", "pyproject.toml", "python/chimera/__init__.py"}
    assert not [name for name in names if name.endswith(".safetensors")]


def test_what_is_installed_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "chimera", "--version", cwd=tmp_path) == f"chimera {chimera.__version__}\n"
    where = run(installed / "python", "-c", "import chimera; print(chimera.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_sglang_finds_its_plugin_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    asked = "from importlib.metadata import distribution as d; print([e.value for e in d('chimera-serving').entry_points])"
    assert "chimera.engine.sglang.plugin:register" in run(installed / "python", "-c", asked, cwd=tmp_path)


def test_it_serves_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    run(installed / "chimera", "models", "make", "models", "--only", "llama,qwen3", cwd=tmp_path)
    with serving(installed, tmp_path) as url:
        answer = run(installed / "chimera", "chat", "llama", "-m", "Good morning", "--url", url, cwd=tmp_path)
        assert answer.strip()
        assert re.search(r"qwen3\b.*serving", run(installed / "chimera", "ps", "--url", url, cwd=tmp_path))


@contextmanager
def serving(installed: Path, folder: Path) -> Iterator[str]:
    words = [installed / "chimera", "serve", "models/llama", "models/qwen3", "--engine", "simulated", "--port", "0"]
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if (found := re.search(r"http://\S+", line)) and "ready" in line:
                yield found[0].rstrip(".,")
                break
        else:
            raise AssertionError("".join(said))
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60.0)

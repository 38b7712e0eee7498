"""The images and the unit under `deploy/`, as far as they can be held without a daemon of Docker's or systemd's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chimera.cli.main import make_parser

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
UNIT = ROOT / "deploy" / "systemd" / "chimera.service"


def parsed(words: list[str]) -> Any:
    return make_parser({words[0]}).parse_args(words)


# Images.


def instructions(image: Path) -> list[tuple[str, str]]:
    lines = re.sub(r"^#.*\n", "", image.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there_and_what_its_ignore_file_lets_through(image: Path) -> None:
    ignored = (image.parent / f"{image.name}.dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    sources = [word for name, rest in instructions(image) if name == "COPY" for word in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), f"there is no {source}"
        assert any(source == open_path or source.startswith(f"{open_path}/") for open_path in let_through), source


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_an_image_starts_the_server_as_a_plain_user(image: Path) -> None:
    told = dict(instructions(image))
    assert json.loads(told["ENTRYPOINT"]) == ["chimera"]
    arguments = parsed(json.loads(told["CMD"]))
    assert (arguments.verb, arguments.host) == ("serve", "0.0.0.0")
    assert arguments.keys or arguments.open
    assert told["USER"] in re.findall(r"useradd --uid (\d+) --create-home chimera", image.read_text())
    assert ":latest" not in told["FROM"] and ":" in told["FROM"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_no_fault_in_an_image(image: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("not shown: hadolint is not installed (requirements/dev.txt)")
    told = subprocess.run([hadolint, "--no-color", str(image)], capture_output=True, text=True, timeout=60.0)
    assert told.returncode == 0, told.stdout + told.stderr


def test_the_image_without_a_gpu_serves_what_it_holds() -> None:
    [image] = [path for path in IMAGES if path.name.startswith("cpu")]
    for what in parsed(json.loads(dict(instructions(image))["CMD"])).what:
        assert (ROOT / what / "config.json").is_file()


# The unit.


def test_the_unit_starts_chimera_with_words_that_it_knows() -> None:
    commands = re.findall(r"^ExecStart(?:Pre)?=/opt/chimera/bin/chimera (.+)$", UNIT.read_text(), re.MULTILINE)
    assert [parsed(shlex.split(command)).verb for command in commands] == ["check", "serve"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    here = str(Path(sys.executable).parent)
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("/opt/chimera/bin", here).replace("User=chimera", "User=root"))
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)], capture_output=True, text=True, timeout=60.0
    )
    faults = [line for line in told.stderr.splitlines() if UNIT.name in line]
    assert (told.returncode, faults) == (0, []), told.stderr

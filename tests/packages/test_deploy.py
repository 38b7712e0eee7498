"""The files under `deploy/`, as far as they can be held without Docker, Helm and a cluster."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chimera
import pytest
import yaml
from chimera.cli.main import make_parser
from chimera.config.conform import conform
from chimera.config.faults import Faults
from chimera.config.placement_file import PlacementFile

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
UNIT = ROOT / "deploy" / "systemd" / "chimera.service"
CHART = ROOT / "deploy" / "helm" / "chimera"
TEMPLATES = sorted((CHART / "templates").glob("*.yaml"))


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
    assert told["USER"] == "chimera"
    assert ":latest" not in told["FROM"] and ":" in told["FROM"]


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


# The chart. Nothing renders it here, so its templates keep to lines that are either whole actions or YAML with values in it.


def branches(template: Path) -> Iterator[str]:
    """With every `if` taken, and with none: YAML, each value a plain word."""
    for taken in (True, False):
        kept, open_ifs = [], []
        for line in template.read_text().splitlines():
            action = re.fullmatch(r"\{\{- (if .+|else|end) \}\}", line)
            if action is None:
                if all(open_ifs):
                    kept.append(re.sub(r"\{\{.+?\}\}", "1", line))
            elif action[1] == "end":
                open_ifs.pop()
            elif action[1] == "else":
                open_ifs[-1] = not open_ifs[-1]
            else:
                open_ifs.append(taken)
        assert not open_ifs, "an if without an end"
        yield "\n".join(kept)


def values() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return told


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_template_is_a_kubernetes_object_whichever_way_it_branches(template: Path) -> None:
    for text in branches(template):
        made = yaml.safe_load(text)
        assert {"apiVersion", "kind", "metadata"} <= made.keys()
        assert "1" in str(made["metadata"]["name"])


def test_templates_and_values_name_the_same() -> None:
    used = {name for path in TEMPLATES for name in re.findall(r"\.Values\.([\w.]+)", path.read_text())}
    told = values()
    for name in used:
        place: Any = told
        for part in name.split("."):
            assert part in place, f"values.yaml has no {name}"
            place = place[part]
    assert {name.partition(".")[0] for name in used} == set(told)


def test_the_pod_starts_the_server_with_words_that_it_knows_with_and_without_keys() -> None:
    pods = [yaml.safe_load(text) for text in branches(CHART / "templates" / "deployment.yaml")]
    starts = [parsed([str(word) for word in pod["spec"]["template"]["spec"]["containers"][0]["args"]]) for pod in pods]
    assert [(bool(start.keys), start.open) for start in starts] == [(True, False), (False, True)]


def test_every_mount_of_the_pod_has_its_volume() -> None:
    for text in branches(CHART / "templates" / "deployment.yaml"):
        pod = yaml.safe_load(text)["spec"]["template"]["spec"]
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_placement_in_the_values_is_one_that_the_server_takes() -> None:
    faults = Faults("values.yaml")
    conform(values()["placement"], PlacementFile, "", faults)
    assert not faults, str(faults.error())


def test_the_chart_has_the_packages_version() -> None:
    told = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert told["version"] == told["appVersion"] == chimera.__version__

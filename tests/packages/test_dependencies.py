"""What the package imports is what it says that it needs."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable

from tests.test_layering import PACKAGE, imports_of

PROJECT = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
# Chosen by machine, in requirements/: SGLang and what comes with it.
BY_MACHINE = {"sglang", "torch", "transformers", "zmq"}
# Of an extra, whose room imports it only when it is asked for.
BY_EXTRA = {"opentelemetry": "traces"}
DISTRIBUTION = {
    "cuda": "cuda-bindings",
    "huggingface_hub": "huggingface-hub",
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "pynvml": "nvidia-ml-py",
    "yaml": "pyyaml",
}


def imported() -> set[str]:
    tops = {name.partition(".")[0] for path in PACKAGE.rglob("*.py") for name in imports_of(path.read_text())}
    return {
        DISTRIBUTION.get(top, top)
        for top in tops - BY_MACHINE - BY_EXTRA.keys() - set(sys.stdlib_module_names) - {"chimera", ""}
    }


def named(lines: Iterable[str]) -> set[str]:
    """The distributions that requirements name, without their bounds; those of an extra are not asked for."""
    wanted = (line for line in lines if line and not line.startswith("#") and "extra ==" not in line)
    return {re.split(r"[<>=!~ ;\[(@]", line)[0].lower().replace("_", "-") for line in wanted}


def requirements(machine: str) -> set[str]:
    return named((PACKAGE.parents[1] / "requirements" / f"{machine}.txt").read_text().splitlines())


def test_the_package_depends_on_exactly_what_it_imports() -> None:
    assert named(PROJECT["dependencies"]) == imported()


def test_an_extra_names_what_is_imported_only_with_it() -> None:
    for top, extra in BY_EXTRA.items():
        assert any(name.startswith(top) for name in named(PROJECT["optional-dependencies"][extra]))


def test_the_set_for_a_machine_without_a_gpu_is_complete() -> None:
    """It is installed with --no-deps, so whatever is not in it is missing."""
    assert imported() - requirements("cpu") == set()


def test_the_set_for_a_gpu_names_what_sglang_itself_does_not_ask_for() -> None:
    """The package is installed over it with --no-deps."""
    assert imported() - requirements("cuda") - named(importlib.metadata.requires("sglang") or ()) == set()

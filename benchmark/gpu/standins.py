"""Lets stock SGLang import where packages are absent that it imports but, in this set-up, never calls; files for PYTHONPATH.

SGLang's own processes start from a fresh interpreter, so what helps them must be a file that they find, not an object of ours.
A package that the machine has is left alone; a stand-in's function that is called after all says so. A `sitecustomize` beside
them lets SGLang 0.5.16 register model names that a transformers newer than its pin knows already.
"""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

# package: modules of it that are imported by name
MODULES: dict[str, tuple[str, ...]] = {
    "IPython": ("display",),
    "flashinfer": ("sampling",),
    "xgrammar": (),
}

STANDIN = '''"""A stand-in: this package is not on this machine, and nothing here may call it."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def called(*arguments, **options):
        raise RuntimeError(f"{__name__}.{name} was called, but only a stand-in for it is installed")

    called.__name__ = called.__qualname__ = name
    return called
'''

ACCEPT_KNOWN_NAMES = """
    from transformers.models.auto import auto_factory, configuration_auto

    for mapping in (configuration_auto._LazyConfigMapping, auto_factory._LazyAutoMapping):

        def register(self, key, value, exist_ok=False, register=mapping.register):
            return register(self, key, value, exist_ok=True)

        mapping.register = register
"""
STAND_IN_FOR_A_GPU = """
    from chimera import standins

    standins.install()
"""

SITECUSTOMIZE = '''"""Makes this interpreter fit for SGLang at the moment that it is first asked for."""

import importlib.abc
import runpy
import sys
from pathlib import Path


def prepare():
    {prepare}


class Before(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            sys.meta_path.remove(self)
            prepare()


sys.meta_path.insert(0, Before())

# This file hides the interpreter's own sitecustomize, which must still run.
for folder in sys.path:
    own = Path(folder or ".", "sitecustomize.py").resolve()
    if own != Path(__file__).resolve() and own.is_file():
        runpy.run_path(str(own))
        break
'''


def absent() -> list[str]:
    """The packages of the table that this interpreter does not find."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def write(folder: Path, packages: Iterable[str]) -> None:
    """For a machine with a GPU: the stand-ins of `packages`, and the sitecustomize, under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _prepare_before(folder, "sglang.srt.configs", ACCEPT_KNOWN_NAMES)
    for package in packages:
        home = folder / package
        home.mkdir(exist_ok=True)
        for module in ("__init__", *MODULES[package]):
            (home / f"{module}.py").write_text(STANDIN)


def write_for_cpu(folder: Path) -> None:
    """For a rehearsal: the sitecustomize alone; what stands in for a GPU's packages is the engine's own affair."""
    folder.mkdir(parents=True, exist_ok=True)
    _prepare_before(folder, "sglang", STAND_IN_FOR_A_GPU)


def surroundings(folder: Path, *, rehearse: bool) -> dict[str, str]:
    """The environment in which stock SGLang imports and runs here; the files for it go into `folder`."""
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if rehearse:
        write_for_cpu(folder)
        found["SGLANG_USE_CPU_ENGINE"] = "1"
    else:
        write(folder, absent())
        # Its stand-in must not be taken for the package.
        found["SGLANG_IS_FLASHINFER_AVAILABLE"] = "false"
        # One process talks to itself, on a machine whose name may resolve to nothing.
        found["GLOO_SOCKET_IFNAME"] = found["NCCL_SOCKET_IFNAME"] = "lo"
        if "CUDA_HOME" not in os.environ and Path("/usr/local/cuda/bin/nvcc").exists():
            found["CUDA_HOME"] = "/usr/local/cuda"  # SGLang compiles some kernels when it first needs them
    return found


def _prepare_before(folder: Path, module: str, prepare: str) -> None:
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(module=module, prepare=prepare.strip()))

"""One allow-table holds the architecture: which room may import which, and which third-party packages it may know."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "chimera"

LEAVES = {"errors", "units", "standins"}
# room: (rooms it may import, third-party packages it may import). Leaves are open to all.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "units": (set(), set()),
    "standins": (set(), {"torch", "transformers"}),
    "core": (set(), {"msgspec"}),
    "msg": ({"core"}, {"msgspec"}),
    "wire": ({"core", "msg"}, {"msgspec", "uvloop"}),
    "sched": ({"core", "msg"}, {"msgspec"}),
    "config": ({"core"}, {"msgspec", "yaml", "huggingface_hub", "httpx", "pynvml"}),
    "vmm": (set(), {"cuda"}),
    "kv": ({"core", "vmm"}, {"torch", "msgspec"}),
    "ledger": ({"core", "msg", "wire"}, {"msgspec"}),
    "weights": ({"core", "vmm"}, {"torch", "msgspec"}),
    "engine": ({"core", "msg", "vmm", "kv", "weights"}, {"torch", "sglang", "transformers", "msgspec", "zmq"}),
    "spans": ({"core", "msg"}, {"opentelemetry"}),
    "worker": ({"core", "msg", "wire", "engine", "vmm", "kv", "weights", "spans"}, {"msgspec"}),
    "agent": ({"core", "msg", "wire", "sched", "ledger", "vmm", "weights", "spans"}, {"msgspec", "pynvml", "uvloop"}),
    "control": ({"core", "msg", "wire", "sched", "records", "spans"}, {"msgspec", "uvloop"}),
    "records": ({"core", "msg"}, {"msgspec"}),
    "parsing": ({"core", "msg"}, {"msgspec", "jinja2", "tokenizers", "sglang", "transformers"}),
    "server": (
        {"core", "msg", "wire", "parsing", "records", "spans"},
        {"aiohttp", "msgspec", "prometheus_client", "uvloop"},
    ),
    "trace": ({"core"}, {"msgspec"}),
    "bench": ({"core", "trace", "parsing"}, {"msgspec", "uvloop", "PIL"}),
    "sim": ({"core", "msg", "sched", "trace"}, {"msgspec"}),
    "sizing": ({"bench", "core", "sched", "sim", "trace"}, {"msgspec"}),
    "tiny": (set(), {"numpy", "safetensors", "tokenizers"}),
    # Wiring only: it may see every room, and the third-party packages of the tools it starts.
    "cli": (
        {
            "agent",
            "bench",
            "config",
            "control",
            "core",
            "engine",
            "ledger",
            "msg",
            "parsing",
            "records",
            "sched",
            "server",
            "sim",
            "sizing",
            "trace",
            "vmm",
        }
        | {"tiny", "weights", "wire", "worker"},
        {"aiohttp", "msgspec", "pynvml", "tokenizers", "torch", "transformers", "uvloop"},
    ),
}
# Packages that only some rooms may hold are what the table is for; these modules never appear in pure rooms.
FORBIDDEN_STDLIB = {
    "core": {"asyncio", "logging", "os", "socket", "time"},
    "msg": {"asyncio", "logging", "os", "socket", "time"},
    "sched": {"asyncio", "logging", "os", "random", "socket", "time"},
}
# Top-level modules that are entry points of the `cli` room.
ENTRY_POINTS = {"launch_multi_model_server": "cli", "__main__": "cli"}


def imports_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "chimera":
                yield from (f"chimera.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def violations(room: str, source: str) -> list[str]:
    rooms, packages = ALLOWED[room]
    found = []
    for name in imports_of(source):
        top, _, rest = name.partition(".")
        if top == "chimera":
            target = rest.partition(".")[0]
            if target and target != room and target not in rooms | LEAVES | {"__version__"}:
                found.append(f"{room} imports {name}")
        elif top in sys.stdlib_module_names:
            if top in FORBIDDEN_STDLIB.get(room, set()):
                found.append(f"{room} imports {name}")
        elif top not in packages:
            found.append(f"{room} imports {name}")
    return found


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return ENTRY_POINTS.get(first, first)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may_know(path: Path) -> None:
    assert violations(room_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "planted"),
    [
        ("sched", "import time"),
        ("sched", "def f():\n    from asyncio import sleep"),
        ("sched", "from chimera.wire.codec import encode"),
        ("core", "import torch"),
        ("server", "import sglang.srt"),
        ("ledger", "from chimera.engine import api"),
        ("agent", "import torch"),
        ("vmm", "from chimera.core.gpu import Gpu"),
        ("control", "import aiohttp"),
        ("core", "from chimera import wire"),
    ],
)
def test_a_planted_violation_is_caught(room: str, planted: str) -> None:
    assert len(violations(room, planted)) == 1


def test_every_room_is_in_the_table_and_says_what_it_owns() -> None:
    for folder in sorted(p for p in PACKAGE.iterdir() if (p / "__init__.py").exists()):
        assert folder.name in ALLOWED, f"{folder.name} is a new room: give it a line in the table"
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text, f"{folder.name}/__init__.py says what the room owns and does not know"


MAY_READ_PICKLES = {PACKAGE / "trace" / "prism.py"}
"""Prism's trace is a file; it is read by an unpickler that can make plain data only."""


def test_no_pickle_crosses_our_sockets() -> None:
    for path in set(modules()) - MAY_READ_PICKLES:
        names = {name.partition(".")[0] for name in imports_of(path.read_text())}
        assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path

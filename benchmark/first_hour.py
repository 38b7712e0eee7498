"""A newcomer's first minutes: a fresh clone, `make serve` with nothing set up, and a first chat, a figure for each step.

    python benchmark/first_hour.py --json benchmark/results/first-hour.json

Clones the commit that is checked out into a temporary folder, so the figures are of what is committed. What pip has in its
cache, or finds where it is told to look, it takes from there; the circumstances say how much that is.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: the repository is not a package

from benchmark.report import Figures, parser

ROOT = Path(__file__).parents[1]
ASKED = {"model": "sums", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "stream": True}
WITHIN_S = 300.0


def main() -> int:
    arguments = parser(__doc__).parse_args()
    figures = Figures("the first hour", facts={"pip's cache": f"{cached_bytes() / 1e6:.0f} MB"})
    with tempfile.TemporaryDirectory(prefix="chimera-first-") as folder:
        began_s = time.monotonic()
        clone = cloned(Path(folder))
        cloned_s = time.monotonic()
        subprocess.run(["make", "install"], cwd=clone, env=surroundings(), check=True, stdout=sys.stderr)
        installed_s = time.monotonic()
        ready_s, token_s = first_token(clone)
        installed_bytes = bytes_in(clone / ".venv")
    figures.add("clone", cloned_s - began_s, "s", "told")
    figures.add("what make serve installs", installed_s - cloned_s, "s", "told")
    figures.add("its size", installed_bytes / 1e9, "GB", "told")
    figures.add("then until the server is ready", ready_s - installed_s, "s", "told")
    figures.add("first streamed token of the first chat", token_s - ready_s, "s", "told")
    figures.add("from nothing to the first streamed token", token_s - began_s, "s", at_most=WITHIN_S)
    return figures.finish(arguments.json)


def cloned(folder: Path) -> Path:
    clone = folder / "chimera"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    return clone


def surroundings() -> dict[str, str]:
    """Without what whoever runs this has set up: another environment, make's own words."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def bytes_in(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def cached_bytes() -> int:
    told = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True)
    return bytes_in(Path(told.stdout.strip())) if told.returncode == 0 else 0


def first_token(clone: Path) -> tuple[float, float]:
    """When the server said that it is ready, and when the first piece of an answer was here."""
    words = ["make", "serve", "ARGS=--port 0"]
    server = subprocess.Popen(words, cwd=clone, env=surroundings(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"ready in .*: http://([^:]+):(\d+)", line):
                ready_s = time.monotonic()
                return ready_s, answered_s(found[1], int(found[2]))
        raise RuntimeError("the server does not come up:\n" + "".join(said))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
        server.communicate(timeout=60.0)


def answered_s(host: str, port: int) -> float:
    connection = http.client.HTTPConnection(host, port, timeout=60.0)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(ASKED), {"content-type": "application/json"})
        response = connection.getresponse()
        for line in response:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.monotonic()
        raise RuntimeError("the stream ended without a word")
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

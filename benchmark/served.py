"""A chimera server of a script's own: started on a placement, gone afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS as TINY

MODELS = Path(__file__).parents[1] / ".models"
"""Tiny checkpoints, as `chimera models make .models` writes them; what is not there is made when a script asks for it."""
READY_WITHIN_S = 180.0


@contextmanager
def served(
    placement: dict[str, Any], *flags: str, cores: Collection[int] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The server's address. `cores` are the only ones it may run on, `environment` is beside this process's own."""
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        file = Path(folder) / "placement.json"
        file.write_text(json.dumps(placement))
        words = [sys.executable, "-m", "chimera", "serve", str(file), "--port", "0", "--log-level", "error", *flags]
        pinned = None if cores is None else lambda: os.sched_setaffinity(0, cores)
        variables = {**os.environ, **(environment or {})}
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=pinned, env=variables
        )
        late = threading.Timer(READY_WITHIN_S, process.send_signal, [signal.SIGINT])
        late.start()
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or a stopped script would leave its server behind
        assert process.stdout is not None
        try:
            yield _address(process.stdout, late)
        finally:
            late.cancel()
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGINT)
            process.wait()
            process.stdout.close()
            signal.signal(signal.SIGTERM, before)


def _address(lines: Iterator[str], late: threading.Timer) -> str:
    said = []
    for line in lines:
        said.append(line)
        if (found := re.search(r"ready in (\S+) s: (http://[^\s,]+)", line)) is not None:
            late.cancel()
            print(f"# server ready in {found[1]} s", flush=True)
            return found[2]
    raise RuntimeError("the server does not come up:\n" + "".join(said))


def entry(name: str, kind: str, *seats: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A model of a placement file."""
    if not (MODELS / kind).exists():
        make(TINY[kind], MODELS / kind, seed=0)
    return {"model_name": name, "model_path": str(MODELS / kind), "dtype": "float32", "init_placements": list(seats), **more}

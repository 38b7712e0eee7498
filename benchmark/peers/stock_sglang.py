"""SGLang as it is installed, one server for each model, each with its part of the memory for good.

On a machine without a GPU a few packages that SGLang imports have no build; `chimera.standins` stands in for them, here as in
chimera's own workers. Nothing else of chimera is in these processes. Run as a script this file *is* such a server: SGLang
spawns processes of its own, which begin by importing the script they come from, and so find the stand-ins.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chimera import standins

standins.install()

READY_WITHIN_S = 240.0
_CPU = ("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-cuda-graph")


@contextmanager
def fleet(models: Mapping[str, Path], kv_tokens: Mapping[str, int], *flags: str) -> Iterator[dict[str, str]]:
    """The address of each model's server, once all are ready."""
    with ExitStack() as stack:
        urls = {name: stack.enter_context(server(name, path, kv_tokens[name], *flags)) for name, path in models.items()}
        for name, url in urls.items():
            _wait_for(name, url)
        yield urls


@contextmanager
def server(name: str, path: Path, kv_tokens: int, *flags: str) -> Iterator[str]:
    port = _free_port()
    where = _CPU if not Path("/proc/driver/nvidia/version").exists() else ()
    words = ["--model-path", str(path), "--served-model-name", name, "--port", str(port), "--host", "127.0.0.1"]
    words += ["--max-total-tokens", str(kv_tokens), "--dtype", "float32", "--log-level", "error", *where, *flags]
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"} if where else None
    process = subprocess.Popen([sys.executable, __file__, *words], env=environment, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it has processes of its own, and nothing to save
        process.wait()


def _wait_for(name: str, url: str) -> None:
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"{url}/health_generate", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)  # another process's start; nothing here could tell
    raise RuntimeError(f"stock SGLang for {name} does not come up")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    run_server(prepare_server_args(sys.argv[1:]))

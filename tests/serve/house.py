"""A whole server as its operator has it: `chimera serve` in a process of its own, simulated engines, and a plain client."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

PATIENCE_S = 30.0
T = TypeVar("T")


def placement(folder: Path, model_folder: Path, models: dict[str, dict[str, float]], *, gpus: int = 1) -> Path:
    """A placement file of simulated models, each with its costs."""
    entries = [
        {
            "model_name": name,
            "model_path": str(model_folder),
            "init_placements": [{"gpu_ids": [number % gpus], "max_memory_pool_size": 0.05}],
            "engine_args": costs,
        }
        for number, (name, costs) in enumerate(models.items())
    ]
    path = folder / "placement.json"
    path.write_text(json.dumps(entries))
    return path


class Stream:
    """A streamed completion, read in a thread of its own; each event with the moment it came."""

    def __init__(self, house: House, model: str, tokens: int) -> None:
        self.events: list[str] = []
        self.ended_s = 0.0
        self._first = threading.Event()
        self._connection = http.client.HTTPConnection(*house.address, timeout=PATIENCE_S)
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, "stream": True}
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        self._response = self._connection.getresponse()
        if self._response.status != 200:
            said = self._response.read()
            self._connection.close()
            raise AssertionError(said)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def begun(self) -> Stream:
        assert self._first.wait(PATIENCE_S), "the stream does not begin"
        return self

    def end(self) -> list[str]:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the stream does not end"
        return self.events

    def vanish(self) -> None:
        """As a client whose machine is gone: no word, and no further reading."""
        self._connection.sock.shutdown(socket.SHUT_RDWR)

    @property
    def whole(self) -> bool:
        return self.end()[-1] == "[DONE]"

    @property
    def error(self) -> dict[str, Any] | None:
        last = self.end()[-1]
        found: dict[str, Any] | None = None if last == "[DONE]" else json.loads(last).get("error")
        return found

    def _read(self) -> None:
        try:
            for line in self._response:
                if line.startswith(b"data: "):
                    self.events.append(line[6:].decode().strip())
                    self._first.set()
        except (http.client.HTTPException, OSError):
            self.events.append("cut off")
        self.ended_s = time.monotonic()
        self._connection.close()


class House:
    def __init__(self, process: subprocess.Popen[str], run_dir: Path, log_dir: Path) -> None:
        self.process = process
        self.run_dir = run_dir
        self.log_dir = log_dir
        self.said: list[str] = []
        self.address = ("", 0)
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """What the server has said, or says soon."""
        try:
            return until(lambda: next((m for line in self.said if (m := re.search(pattern, line))), None), pattern)
        except AssertionError as late:
            raise AssertionError(f"{late}\n" + "\n".join([*self.said, *self.logs()])) from None

    def logs(self) -> list[str]:
        """The end of what every process has written."""
        return [f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.log_dir.glob("*.log"))]

    def stream(self, model: str, tokens: int) -> Stream:
        return Stream(self, model, tokens)

    def complete(self, model: str, tokens: int = 3) -> tuple[int, Any]:
        return self.ask("POST", "/v1/completions", {"model": model, "prompt": "hello", "max_tokens": tokens})

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def processes(self, module: str = "") -> list[int]:
        """Everyone who was started for this run directory; workers are forks of the parent and look like it."""
        return [pid for pid, command in commands() if str(self.run_dir) in command and module in command]

    def of(self, module: str) -> int:
        """The eldest process of this module: the parent among its workers, too."""
        return until(lambda: min(self.processes(module), default=None), f"a process of {module}")

    def workers(self) -> list[int]:
        parents = self.processes("chimera.worker.parent")
        return [pid for pid in parents if session_of(pid) == pid]

    def worker_of(self, model: str) -> int:
        """The process that serves `model`, as the agent's log of decisions and the parent's of forks would tell."""
        log = (self.log_dir / "agent-local.log").read_text()
        name = re.findall(rf"ready replica={re.escape(model)}/0 worker=(\S+)", log)[-1]
        return int(re.findall(rf"greeted worker={re.escape(name)} pid=(\d+)", log)[-1])

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            found = re.search(r"ready in .*: http://([^:]+):(\d+)", line)
            if found:
                self.address = (found[1], int(found[2]))
        self.process.stdout.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "chimera", *arguments]


@contextmanager
def launched(file: Path, *flags: str) -> Iterator[House]:
    """A server as Prism's scripts start one; afterwards nothing of it may be left."""
    with TemporaryDirectory(prefix="chimera-test-") as folder:
        words = [sys.executable, "-m", "chimera.launch_multi_model_server", "--model-config-file", str(file), *flags]
        words += ["--engine", "simulated", "--host", "127.0.0.1", "--port", "0", "--log-level", "info"]
        process = subprocess.Popen(
            [*words, "--log-file", f"{folder}/server.log"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": folder},
        )
        made = House(process, Path(folder), Path(folder) / "server")
        try:
            made.wait_for("ready in .*http")
            yield made
        finally:
            if process.poll() is None:
                made.stop()
        until(lambda: not made.processes(), "the end of every process")
        assert not list(Path(folder).glob("chimera-*")), "the run directory is left"


@contextmanager
def house(file: Path, *arguments: str, ready: bool = True, environment: Mapping[str, str] | None = None) -> Iterator[House]:
    """A running server; afterwards it is stopped if it was not, and nothing of it may be left."""
    with TemporaryDirectory(prefix="chimera-test-") as folder:
        run_dir = Path(folder) / "run"
        log_dir = Path(folder) / "log"
        words = ["serve", str(file), "--engine", "simulated", "--port", "0", "--run-dir", str(run_dir), "--log-level", "info"]
        process = subprocess.Popen(
            command(*words, "--log-dir", str(log_dir), *arguments),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        made = House(process, run_dir, log_dir)
        try:
            if ready:
                made.wait_for("ready in .*http")
            yield made
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGINT)
                process.wait(PATIENCE_S)
        until(lambda: not made.processes(), "the end of every process")
        until(lambda: not run_dir.exists(), "the end of the run directory")


def commands() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # gone meanwhile
            continue


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def until(happens: Callable[[], T | None], what: str, within_s: float = PATIENCE_S) -> T:
    """The first true answer. For what another process does, which no event here can tell."""
    deadline_s = time.monotonic() + within_s
    while not (answer := happens()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.01)
    return answer


def cpu_s(pids: Sequence[int]) -> float:
    """The time that these processes have run so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")

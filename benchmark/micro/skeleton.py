"""The whole server with real engines: how soon it is there, what it costs while idle, and how it takes a killed worker.

Eighteen tiny models on eight virtual GPUs, as `model_configs/cpu_8_gpu_18_model_our.json` has them, through `chimera serve`;
then one worker of its own on a bare stage, for the time in which an idle worker takes a request.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.core.replica import Epoch

from benchmark.report import Figures, parser
from tests.serve.house import House, cpu_s, house, until
from tests.worker.stage import Stage, model, payload

ROOT = Path(__file__).parents[2]
FILE = ROOT / "model_configs" / "cpu_8_gpu_18_model_our.json"
"""Its eighteen models start as it says, some on and some off; here all of them are on."""
MODELS = 18


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--idle-s", type=float, default=10.0, help="how long to watch the idle server")
    options.add_argument("--requests", type=int, default=200, help="requests to the idle worker")
    arguments = options.parse_args()
    figures = Figures("the walking skeleton", seed=arguments.seed)
    with all_on(FILE) as file, house(file, "--engine", "sglang", ready=False) as served:
        start_up(served, figures)
        idle(served, figures, arguments.idle_s)
        killed_worker(served, figures)
    pick_up(figures, arguments.requests)
    return figures.finish(arguments.json)


@contextmanager
def all_on(file: Path) -> Iterator[Path]:
    """The file with every model on from the start."""
    document = json.loads(file.read_text())
    del document["$schema"]
    for entry in document["models"]:
        entry["model_path"] = str((file.parent / entry["model_path"]).resolve())
        for seat in entry["init_placements"]:
            seat["on"] = True
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        path = Path(folder) / file.name
        path.write_text(json.dumps(document))
        yield path


def start_up(served: House, figures: Figures) -> None:
    began = time.monotonic()
    until(lambda: len(served.workers()) > 0, "the first worker", 180)
    first_fork = time.monotonic()
    until(lambda: served.address[1], "the server to be ready", 180)
    ready = time.monotonic()
    figures.add("start of the server to the first fork", first_fork - began, "s")
    figures.add("first fork to 18 models serving", ready - first_fork, "s", at_most=40)
    private = [private_mib(pid) for pid in served.workers()]
    assert len(private) == MODELS, f"{len(private)} workers for {MODELS} models"
    figures.add("private memory of a worker, largest of 18", max(private), "MiB", at_most=100)
    figures.add("private memory of a worker, median of 18", statistics.median(private), "MiB")


def idle(served: House, figures: Figures, watch_s: float) -> None:
    pids = served.processes()
    before = cpu_s(pids)
    select.select([], [], [], watch_s)
    used = (cpu_s(pids) - before) / watch_s
    figures.add(f"all {len(pids)} processes idle", 100 * used, "% of a core", at_most=2)


def killed_worker(served: House, figures: Figures) -> None:
    """Killed in the middle of a stream, with another model's stream beside it."""
    broken = served.stream("llama-00", 1500).begun()
    other = served.stream("qwen3-00", 200).begun()
    killed = time.monotonic()
    os.kill(served.worker_of("llama-00"), signal.SIGKILL)
    assert broken.error is not None, "the broken stream says so"
    figures.add("killed worker: its stream ends in one error after", broken.ended_s - killed, "s", at_most=1)
    status, _ = served.complete("llama-00")
    assert status == 200, status
    figures.add("killed worker: its model answers again after", time.monotonic() - killed, "s", at_most=2)
    assert other.whole, "another model's stream is untouched"


def pick_up(figures: Figures, requests: int) -> None:
    """An idle SGLang worker is given a request of an old epoch: it answers as soon as it reads it, without a step."""
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        stage = Stage(Path(folder), "sglang")
        worker = stage.hire()
        epoch, _ = worker.become(model("llama", str(ROOT / ".models" / "llama")), kv_limit_bytes=8 << 20)
        stale = Epoch(epoch.agent_start, epoch.counter - 1)
        taken = []
        for number in range(requests + 1):
            select.select([], [], [], 0.02)  # long enough to be asleep again
            sent = time.perf_counter()
            worker.submit(f"r{number}", stale, payload([1], 1))
            stage.finished(f"r{number}")
            taken.append(1000 * (time.perf_counter() - sent))
        figures.samples("an idle worker takes a request within", taken[1:], "ms", at_most=5)
        figures.add("an idle worker takes a request within, 99th percentile", sorted(taken[1:])[int(requests * 0.99) - 1], "ms")
        worker.channel.close()
        stage.close()


def private_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


if __name__ == "__main__":
    sys.exit(main())

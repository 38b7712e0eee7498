"""How soon a model is there: a warm worker changing models, against a cold `sglang.launch_server`, in one run.

    python benchmark/micro/activation.py

Four architectures take turns in one worker, over real sockets, weights from shared images; each time is from the order to
activate to the first token at the front-end. Private memory is read while the worker is EMPTY. Then they take turns with
elastic memory, so that each is parked when it leaves, and returns. Then, in this process, a
model of 750 MiB beside a tiny one: how long until its tensors are bound, and its first token beside what that cannot be
faster than, faulting the weights in once and one forward. The model files are made on the spot and read from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.core.model import ModelSpec
from chimera.msg import actions, events
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS
from chimera.weights.image import Image
from chimera.weights.store import WeightStore

from benchmark.report import Figures, parser, percentile
from tests.worker.stage import Stage, model, payload

if TYPE_CHECKING:
    from chimera.engine.sglang.warm import WarmEngine

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("llama", "qwen3", "gemma2", "moe")
PROMPT = [5, 6, 7, 8, 9]
KV_BYTES = 8 << 20
PAGE_BYTES = 2 << 20
LEASE = actions.FirstLease(page_bytes=PAGE_BYTES, revision=1, level=KV_BYTES // PAGE_BYTES, ceiling=2 * KV_BYTES // PAGE_BYTES)
LEASE_NEWS = (events.PagesReturned, events.PagesWanted)
PATIENCE_S = 180.0
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 11}
"""Llama's shape with 750 MiB of float32."""


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--changes", type=int, default=100, help="how often the worker becomes another model")
    options.add_argument("--cold", type=int, default=2, help="cold servers started, one after the other")
    options.add_argument("--without-large", action="store_true", help="leave out the 750 MiB model")
    arguments = options.parse_args()
    figures = Figures("activation", seed=arguments.seed)
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="chimera-bench-", dir=shared) as folder:
        measure(figures, Path(folder), arguments)
    return figures.finish(arguments.json)


def measure(figures: Figures, folder: Path, arguments: argparse.Namespace) -> None:
    for name in ARCHITECTURES:
        make(MODELS[name], folder / name, seed=0)
    cold = [cold_server_s(folder / "llama") for _ in range(arguments.cold)]
    figures.samples("cold sglang.launch_server to its first token", cold, "s")
    images = folder / "images"
    images.mkdir()
    warm = warm_worker(figures, folder, images, arguments.changes, random.Random(arguments.seed))
    figures.add("a cold server against a warm worker", percentile(cold, 50) / percentile(warm, 50), "times", at_least=50)
    if not arguments.without_large:
        large_beside_tiny(figures, folder, images)


# A cold server.


def cold_server_s(checkpoint: Path) -> float:
    """From the start of its process to the first token of its first answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"model-path": checkpoint, "port": port, "device": "cpu", "attention-backend": "torch_native"}
    flags |= {"sampling-backend": "pytorch", "dtype": "float32", "max-total-tokens": 4096, "log-level": "error"}
    command = [sys.executable, "-m", "benchmark.micro.cold_server", "--disable-cuda-graph", "--skip-tokenizer-init"]
    command += ["--skip-server-warmup", *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value))]
    shared = Path("/dev/shm")
    before = set(shared.glob("sglang_loads_*"))
    began_s = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            first_token_of_server(port, server)
            return time.monotonic() - began_s
        finally:
            stop(server)
            for left in set(shared.glob("sglang_loads_*")) - before:  # it leaves them behind, however it is stopped
                left.unlink(missing_ok=True)


def stop(server: subprocess.Popen[bytes]) -> None:
    """In order first, then whatever it started."""
    server.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def first_token_of_server(port: int, server: subprocess.Popen[bytes]) -> None:
    settings = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"input_ids": PROMPT, "sampling_params": settings}).encode()
    url = f"http://127.0.0.1:{port}/generate"
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "the cold server has ended"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                assert json.load(response)["output_ids"]
                return
        except urllib.error.URLError:
            select.select([], [], [], 0.05)  # not listening yet
    raise AssertionError(f"the cold server gave no token within {PATIENCE_S} s")


# A warm worker.


def warm_worker(figures: Figures, folder: Path, images: Path, changes: int, dice: random.Random) -> list[float]:
    """Seconds of each change."""
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as sockets:
        stage = Stage(Path(sockets), "sglang", "--images", str(images), "--parked-models", str(len(ARCHITECTURES)))
        try:
            return turns(figures, stage, folder, changes, dice)
        finally:
            stage.close()


def turns(figures: Figures, stage: Stage, folder: Path, changes: int, dice: random.Random) -> list[float]:
    worker = stage.hire()
    first_answers: dict[str, list[int]] = {}
    took_s, freed_s, private_mib, resident_mib = [], [], {}, {}
    for name in ARCHITECTURES:  # the first visit of each builds its image
        change(stage, worker, name, folder, first_answers)
    for number, name in enumerate(order_of(changes, dice), 1):
        seconds, left_s = change(stage, worker, name, folder, first_answers)
        took_s.append(seconds)
        freed_s.append(left_s)
        private_mib[number], resident_mib[number] = memory_mib(worker.pid)
    milliseconds = [1000 * s for s in took_s]
    figures.samples("EMPTY worker to first token", milliseconds, "ms", at_most=150)
    figures.add("EMPTY worker to first token, 99th percentile", percentile(milliseconds, 99), "ms", at_most=400)
    figures.samples("last token to EMPTY, bytes given back", [1000 * s for s in freed_s], "ms", at_most=100)
    if changes > 10:
        figures.add("private memory after 10 changes", private_mib[10], "MiB")
        grown = 100 * (private_mib[changes] / private_mib[10] - 1)
        figures.add(f"private memory after {changes} changes", private_mib[changes], "MiB")
        figures.add(f"growth of private memory from 10 to {changes} changes", grown, "%", at_most=5)
        figures.add(f"resident memory after {changes} changes, shared with the parent mostly", resident_mib[changes], "MiB")
    returns(figures, stage, worker, folder, changes, dice, first_answers)
    worker.channel.close()
    return took_s


def order_of(changes: int, dice: random.Random) -> list[str]:
    """Never the same twice in a row."""
    names: list[str] = []
    while len(names) < changes:
        names.append(dice.choice([name for name in ARCHITECTURES if name not in names[-1:]]))
    return names


def returns(
    figures: Figures,
    stage: Stage,
    worker: Any,
    folder: Path,
    changes: int,
    dice: random.Random,
    first_answers: dict[str, list[int]],
) -> None:
    """The same worker, with a lease: what has left it is parked."""
    first = [change(stage, worker, name, folder, first_answers, lease=LEASE)[0] for name in ARCHITECTURES]
    before_mib, _ = memory_mib(worker.pid)
    took = [change(stage, worker, name, folder, first_answers, lease=LEASE) for name in order_of(changes, dice)]
    after_mib, _ = memory_mib(worker.pid)
    figures.samples("elastic, a first visit to its first token", [1000 * s for s in first], "ms")
    returned = [1000 * seconds for seconds, _ in took]
    figures.samples("elastic, a parked model's return to its first token", returned, "ms", at_most=150)
    figures.add("elastic, a parked model's return, 99th percentile", percentile(returned, 99), "ms", at_most=400)
    figures.samples("elastic, last token to parked, bytes given back", [1000 * s for _, s in took], "ms", at_most=100)
    figures.add("private memory with four models parked", before_mib, "MiB")
    figures.add(f"growth of it over {changes} returns", 100 * (after_mib / before_mib - 1), "%", at_most=5)


def change(
    stage: Stage,
    worker: Any,
    name: str,
    folder: Path,
    first_answers: dict[str, list[int]],
    lease: actions.FirstLease | None = None,
) -> tuple[float, float]:
    """Seconds to the first token, and from the last token to EMPTY."""
    stage.answers.clear()
    spec = model(name, str(folder / name))
    began_s = time.monotonic()
    epoch, _ = worker.become(spec, kv_limit_bytes=None if lease else KV_BYTES, lease=lease)
    worker.submit("r", epoch, payload(PROMPT, 1))
    (answer,) = stage.finished("r")
    ended_s = time.monotonic()
    assert answer.tokens == first_answers.setdefault(name, answer.tokens), f"{name} says something else than before"
    worker.leave(name, epoch)
    worker.inbox.next(events.RequestFinished, past=LEASE_NEWS)
    worker.inbox.next(events.ReplicaStopped, past=LEASE_NEWS)
    return ended_s - began_s, time.monotonic() - ended_s


def memory_mib(pid: int) -> tuple[float, float]:
    """Private and resident."""
    private = resident = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.startswith("Private"):
            private += int(rest.split()[0])
        elif name == "Rss":
            resident = int(rest.split()[0])
    return private / 1024, resident / 1024


# A large model.


def large_beside_tiny(figures: Figures, folder: Path, images: Path) -> None:
    from chimera.engine.preload import preload

    large = folder / "large"
    make_large(folder / "llama", large)
    engine: WarmEngine = preload("sglang", WeightStore(images))()  # type: ignore[assignment]
    tiny_spec, large_spec = (model(path.name, str(path), kv_bytes_per_token=8 << 10) for path in (folder / "llama", large))
    began_s = time.monotonic()
    for spec in (tiny_spec, large_spec):
        engine.prepare(spec, gpu_ids=(0,))
    figures.add("images built, the 750 MiB one and a tiny one", time.monotonic() - began_s, "s")
    bound: dict[str, list[float]] = {"llama": [], "large": []}
    first, faulted, forward = [], [], []
    for _ in range(5):
        for spec in (tiny_spec, large_spec):
            bound[spec.name].append(1000 * bound_s(engine, spec))
            faulted_s = fault_in_s(images, spec)
            ask_s(engine)
            again_s = ask_s(engine, other=1)
            engine.deactivate()
            if spec is large_spec:
                faulted.append(1000 * faulted_s)
                forward.append(1000 * again_s)
                # In a process that has not touched a page of it yet.
                bound_s(engine, spec)
                first.append(1000 * ask_s(engine))
                engine.deactivate()
    figures.samples("a tiny model bound and ready to step", bound["llama"], "ms")
    figures.samples("a 750 MiB model bound and ready to step", bound["large"], "ms")
    apart = percentile(bound["large"], 50) - percentile(bound["llama"], 50)
    figures.add("the 750 MiB model bound later than the tiny one by", apart, "ms", at_most=30)
    figures.samples("its pages faulted in", faulted, "ms")
    figures.samples("one forward of it, everything there", forward, "ms")
    figures.samples("its first token after it is bound", first, "ms")
    floor = percentile(faulted, 50) + percentile(forward, 50)
    figures.add("its first token against fault-in and one forward", percentile(first, 50) / floor, "times", at_most=1.3)


def make_large(tiny: Path, folder: Path) -> None:
    """Random weights in the layout of a Llama checkpoint."""
    import numpy as np
    from safetensors.numpy import save_file

    shutil.copytree(tiny, folder)
    config = json.loads((tiny / "config.json").read_text()) | LARGE
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = config["num_key_value_heads"] * config["head_dim"]
    dice = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    shapes["model.norm"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": (hidden, hidden) for name in ("q", "o")}
        shapes |= {f"{at}.self_attn.{name}_proj": (keys, hidden) for name in ("k", "v")}
        shapes |= {f"{at}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (hidden, inner)}
        shapes |= {f"{at}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    weights = {
        f"{name}.weight": np.ones(shape, np.float32) if len(shape) == 1 else dice.standard_normal(shape, np.float32) * 0.05
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def bound_s(engine: WarmEngine, spec: ModelSpec) -> float:
    began_s = time.monotonic()
    engine.bring_up(spec, gpu_ids=(0,), kv_bytes=KV_BYTES)
    return time.monotonic() - began_s


def fault_in_s(images: Path, spec: ModelSpec) -> float:
    """Reading one byte of every page, through a mapping of its own."""
    opened = (Image.open(path) for path in images.glob("*.image"))
    image = next(image for image in opened if image is not None and image.contents.model == spec.name)
    began_s = time.monotonic()
    image.bytes[::4096].sum()
    return time.monotonic() - began_s


def ask_s(engine: WarmEngine, other: int = 0) -> float:
    """`other` is added to the prompt, so that no prefix is found again."""
    began_s = time.monotonic()
    engine.ask(tuple(token + other for token in PROMPT), tokens=1)
    return time.monotonic() - began_s


if __name__ == "__main__":
    sys.exit(main())

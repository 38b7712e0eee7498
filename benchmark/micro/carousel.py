"""Eighteen models take turns on four workers: a request to a random one every 200 ms, every answer held against its model's.

    python benchmark/micro/carousel.py

The workers are an agent's own pool over real sockets; weights come from shared images. Who gives way is a worker in which
the model is parked, else the one that was used longest ago, never one at work. What each model has to say was asked
beforehand of transformers, from the same files. A switch is counted from the moment a request finds a worker to the first
token: the old model out, the new one in and checked, and its prefill.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.agent.pool import Worker, WorkerPool
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg import actions, events, stream
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS
from chimera.wire.channel import serve
from chimera.wire.codec import Message

from benchmark.report import Figures, parser, percentile
from tests.worker.stage import model, payload

ARCHITECTURES = ("llama", "qwen3", "gemma2", "moe", "mistral")
FRONT = "front-0"
PROMPT = [5, 6, 7, 8, 9]
TOKENS = 4
LEASE = actions.FirstLease(page_bytes=2 << 20, revision=1, level=4, ceiling=8)
PATIENCE_S = 120.0


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--models", type=int, default=18)
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--requests", type=int, default=500)
    options.add_argument("--parked-models", type=int, default=2, help="how many stay in each worker that have left it")
    options.add_argument("--every-ms", type=float, default=200.0, help="time between two requests")
    arguments = options.parse_args()
    figures = Figures("carousel", seed=arguments.seed)
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="chimera-bench-", dir=shared) as folder:
        specs = checkpoints(Path(folder), arguments.models)
        right = {name: reference(Path(spec.path)) for name, spec in specs.items()}
        different = len({tuple(tokens) for tokens in right.values()})
        figures.add("models, all of which say something else", different, "", at_least=arguments.models)
        (Path(folder) / "images").mkdir()
        with parent(Path(folder), arguments.parked_models) as run_dir:
            asyncio.run(
                go_round(
                    figures,
                    Carousel(run_dir, specs, right, arguments.workers),
                    requests=arguments.requests,
                    every_s=arguments.every_ms / 1000,
                    dice=random.Random(arguments.seed),
                )
            )
    return figures.finish(arguments.json)


def checkpoints(folder: Path, count: int) -> dict[str, ModelSpec]:
    specs = {}
    for number in range(count):
        architecture = ARCHITECTURES[number % len(ARCHITECTURES)]
        name = f"{architecture}-{number:02}"
        make(MODELS[architecture], folder / name, seed=number)
        specs[name] = model(name, str(folder / name))
    return specs


def reference(checkpoint: Path) -> list[int]:
    """What transformers says, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    its = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    its.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    told = its.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    tokens: list[int] = told[0, len(PROMPT) :].tolist()
    return tokens


@contextmanager
def parent(folder: Path, parked_models: int) -> Iterator[Path]:
    """The directory of a preloaded parent's socket."""
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as run_dir:
        words = ["--socket", f"{run_dir}/parent.sock", "--engine", "sglang", "--images", str(folder / "images")]
        words += ["--parked-models", str(parked_models)]
        command = [sys.executable, "-m", "chimera.worker.parent", *words, "--log-level", "warning"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            yield Path(run_dir)
        finally:
            process.terminate()
            process.wait()


class Place:
    """Room for one model."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.name = ""
        self.epoch = Epoch(0, 0)
        self.parked: tuple[str, ...] = ()
        self.taken = False
        self.used_s = 0.0


class Carousel:
    def __init__(self, run_dir: Path, specs: dict[str, ModelSpec], right: dict[str, list[int]], places: int) -> None:
        self.specs = specs
        self.right = right
        self.wrong = 0
        self.switch_s: list[float] = []
        self.stay_s: list[float] = []
        self.load_s: list[float] = []
        self.return_s: list[float] = []
        """To the first token, where the model was parked."""
        self._run_dir = run_dir
        self._places = [Place() for _ in range(places)]
        self._moved = asyncio.Condition()
        self._awaited: dict[tuple[type, object], asyncio.Future[Message]] = {}
        self._answers: dict[str, list[int]] = {}
        self._begun: dict[str, float] = {}
        self._epochs = itertools.count(1)
        self._pool = WorkerPool(
            prefix="c",
            socket=run_dir / "agent-c.sock",
            parent_socket=run_dir / "parent.sock",
            on_message=lambda _, message: self._hear(message),
            on_lost=lambda worker, reason: sys.exit(f"lost {worker.name}: {reason}"),
        )

    async def run(self, requests: int, every_s: float, dice: random.Random) -> None:
        front = await serve(self._run_dir / f"{FRONT}.sock", lambda channel: channel.deliver_to(self._hear))
        await self._pool.start()
        for name in self.specs:  # builds every image
            await self.answer(f"first-{name}", name)
        self.switch_s.clear()
        self.stay_s.clear()
        self.load_s.clear()
        self.return_s.clear()
        names = sorted(self.specs)
        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                group.create_task(self.answer(f"r{number}", dice.choice(names)))
                await asyncio.sleep(every_s)
        self._pool._on_lost = lambda worker, reason: None
        await self._pool.stop(0.0)
        await front.close()

    async def answer(self, request_id: str, name: str) -> None:
        place = await self._place_for(name)
        began_s = time.monotonic()
        stays, parked = place.name == name, name in place.parked
        try:
            if not stays:
                await self._switch(place, name)
            assert place.worker is not None
            finished = self._await(stream.Tokens, request_id)
            content = payload(PROMPT, TOKENS)
            place.worker.send(stream.Submit(request_id=request_id, epoch=place.epoch, front=FRONT, payload=content))
            await finished
            self.wrong += self._answers.pop(request_id) != self.right[name]
            took_s = self._begun.pop(request_id) - began_s
            (self.stay_s if stays else self.switch_s).append(took_s)
            if parked and not stays:
                self.return_s.append(took_s)
        finally:
            async with self._moved:
                place.taken, place.used_s = False, time.monotonic()
                self._moved.notify_all()

    async def _place_for(self, name: str) -> Place:
        """Where the model is, once it is free there; else the place that was used longest ago."""
        async with self._moved:
            while True:
                its = [place for place in self._places if place.name == name]
                idle = [place for place in (its or self._places) if not place.taken]
                if idle:
                    place = min(idle, key=lambda place: (name not in place.parked, place.used_s))
                    place.taken = True
                    return place
                await self._moved.wait()

    async def _switch(self, place: Place, name: str) -> None:
        left, place.name = place.name, name
        if place.worker is not None:
            stopped = self._await(events.ReplicaStopped, ReplicaId(left))
            place.worker.send(
                actions.Deactivate(replica=ReplicaId(left), epoch=place.epoch, drain_s=5.0, reason="its turn is over")
            )
            told = await stopped
            assert isinstance(told, events.ReplicaStopped) and told.kept is not None
            place.parked = place.worker.parked = told.kept.models
            self._pool.vacate(place.worker)
        place.epoch = Epoch(1, next(self._epochs))
        ready = self._await(events.ReplicaReady, ReplicaId(name))
        seat = Seat(replica=ReplicaId(name), gpu_ids=(0,))
        order = actions.Activate(model=self.specs[name], seat=seat, epoch=place.epoch, leases=(LEASE,), reason="its turn")
        place.worker = self._pool.employ(order).first
        up = await ready
        assert isinstance(up, events.ReplicaReady)
        self.load_s.append(up.load_s)

    def _await(self, kind: type, of: object) -> asyncio.Future[Message]:
        future = self._awaited[kind, of] = asyncio.get_running_loop().create_future()
        return future

    def _hear(self, message: Message) -> None:
        match message:
            case events.ReplicaReady() | events.ReplicaStopped():
                waiting = self._awaited.pop((type(message), message.replica), None)
                if waiting is not None:  # else it leaves because everything ends
                    waiting.set_result(message)
            case stream.Tokens():
                for delta in message.deltas:
                    self._begun.setdefault(delta.request_id, time.monotonic())
                    said = self._answers.setdefault(delta.request_id, [])
                    said += delta.token_ids
                    if delta.outcome is not None:
                        self._awaited.pop((type(message), delta.request_id)).set_result(message)
            case events.ActivationFailed() | stream.Failed():
                sys.exit(f"{message}")


async def go_round(figures: Figures, carousel: Carousel, *, requests: int, every_s: float, dice: random.Random) -> None:
    await carousel.run(requests, every_s, dice)
    answered = len(carousel.switch_s) + len(carousel.stay_s)
    figures.add("requests answered", answered, "", at_least=requests)
    figures.add("answers of the wrong model", carousel.wrong, "", at_most=0)
    milliseconds = [1000 * s for s in carousel.switch_s]
    figures.add("requests that needed a switch", len(milliseconds), "")
    figures.samples("switch, to the first token", milliseconds, "ms")
    figures.add("switch, to the first token, 99th percentile", percentile(milliseconds, 99), "ms")
    if carousel.return_s:
        figures.samples("of these, where it was parked", [1000 * s for s in carousel.return_s], "ms")
    figures.samples("of a switch, bringing the new model up and checking it", [1000 * s for s in carousel.load_s], "ms")
    figures.samples("no switch, to the first token", [1000 * s for s in carousel.stay_s], "ms")


if __name__ == "__main__":
    sys.exit(main())

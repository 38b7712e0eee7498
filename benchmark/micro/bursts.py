"""Two models on one virtual GPU whose memory is too small for both at their peaks: does sharing it pay, and does it hold?

*It pays*: the models' bursts alternate. The same trace is served twice by real engines, with the memory split half and half
and with leases that follow the need; a request attains its goal if its first token comes within half the time that a burst
takes a model that has all memory to itself, measured first.
*Nothing aborted*: both models at once, more requests in their engines than memory for a part of them, on leases. Every
request must be answered in full; the ledger is read at every change of a lease, and the kernel's count of the two pools'
pages as often as it can be.

    python benchmark/micro/bursts.py [--part pays|crowd]

Control and agent run in this process, workers are real; no HTTP. Requests that had to yield are brought again, as the
front-end does.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.agent.agent import Agent
from chimera.control.exchange import Exchange
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.replica import ReplicaId
from chimera.core.request import Request
from chimera.msg import actions, stream
from chimera.units import KIB, MIB
from chimera.wire.channel import Channel, Server, connect, serve
from chimera.wire.codec import Message

from benchmark.micro.workers import TOKEN_BYTES, content, tiny
from benchmark.report import Figures, parser

PAGE_BYTES = 64 * KIB
MODELS = ("llama", "qwen3")

# It pays: the mix.
BURST = 32
"""Requests at once, of PROMPT + ANSWER tokens; all of memory holds one burst, half of it half a burst."""
PROMPT, ANSWER = 128, 64
BURSTS = 8
PATIENCE = 0.5
"""Of a burst's own time: several times what its prompts take, and less than an answer, so whoever waits for another is late."""

# Nothing aborted: the crowd.
CREDITS = 48
CROWD_PROMPT, CROWD_ANSWER = (40, 240), (8, 40)
SHARE_OF_PEAK = 0.4


class Question:
    """One request, through all its tries."""

    def __init__(self, name: str, model: str, prompt: list[int], tokens: int) -> None:
        self.name = name
        self.model = model
        self.prompt = prompt
        self.wanted = tokens
        self.tokens: list[int] = []
        self.tries = 0
        self.asked_s = 0.0
        self.first_s: float | None = None
        self.error = ""
        self.over = asyncio.Event()

    @property
    def request_id(self) -> str:
        return f"{self.name}.{self.tries}"


class Front:
    """A front-end without HTTP: asks, takes the tokens in, brings again what comes back."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._open: dict[str, Question] = {}
        self._server: Server | None = None
        self._control: Channel | None = None
        self.brought_again = 0

    async def start(self) -> None:
        self._server = await serve(self._run_dir / "front-0.sock", lambda channel: channel.deliver_to(self._hear))
        self._control = await connect(self._run_dir / "control.sock")
        self._control.send(stream.Hello(role="front", name="front-0", pid=os.getpid()))
        self._control.deliver_to(self._hear)

    async def stop(self) -> None:
        assert self._server is not None and self._control is not None
        self._control.close()
        await self._server.close()

    def ask(self, question: Question) -> None:
        if not question.tries:
            question.asked_s = time.monotonic()
        question.tries += 1
        self._open[question.request_id] = question
        left = question.wanted - len(question.tokens)
        prompt = question.prompt + question.tokens
        request = Request(
            request_id=question.request_id,
            model=question.model,
            front="front-0",
            prompt_tokens=len(prompt),
            max_tokens=left,
            arrived_s=question.asked_s,
            emitted_tokens=len(question.tokens),
            tries=question.tries,
        )
        assert self._control is not None
        self._control.send(stream.Enqueue(request=request, payload=content(prompt, left)))

    def _hear(self, message: Message) -> None:
        match message:
            case stream.Tokens(deltas=deltas):
                for delta in deltas:
                    self._extend(delta)
            case actions.Requeue(request_id=request_id) | stream.Failed(request_id=request_id, requeue=True):
                question = self._open.pop(request_id, None)
                if question is not None:
                    self.brought_again += 1
                    self.ask(question)
            case actions.Reject(request_id=request_id, reason=why) | stream.Failed(request_id=request_id, message=why):
                question = self._open.pop(request_id, None)
                if question is not None:
                    question.error = why
                    question.over.set()

    def _extend(self, delta: stream.TokenDelta) -> None:
        question = self._open.get(delta.request_id)
        if question is None:
            return
        question.first_s = question.first_s or time.monotonic()
        question.tokens += delta.token_ids
        if delta.outcome is not None:
            del self._open[delta.request_id]
            question.over.set()


class Tenants:
    """Control, an agent with one virtual GPU, and two models."""

    def __init__(self, run_dir: Path, specs: Sequence[ModelSpec], kv_bytes: int, *, elastic: bool) -> None:
        self.gpu = Gpu(gpu_id=0, capacity_bytes=kv_bytes + len(specs) * PAGE_BYTES, page_bytes=PAGE_BYTES, virtual=True)
        share = None if elastic else kv_bytes // len(specs)
        seats = tuple(Seat(replica=ReplicaId(spec.name), gpu_ids=(0,), kv_limit_bytes=share) for spec in specs)
        self.exchange = Exchange(models=specs, wanted=Placement(seats), socket=run_dir / "control.sock")
        self.agent = Agent(name="local", agent_start=time.time_ns(), gpus=(self.gpu,), run_dir=run_dir, elastic=elastic)
        self.front = Front(run_dir)

    def worker_pids(self) -> list[int]:
        return [worker.vigil.pid for worker in self.agent.workers if worker.vigil is not None]


@asynccontextmanager
async def tenants(parent: Path, specs: Sequence[ModelSpec], kv_bytes: int, *, elastic: bool) -> AsyncIterator[Tenants]:
    """Both models up and warm; afterwards everything down."""
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        run_dir = Path(folder)
        (run_dir / "parent.sock").symlink_to(parent)
        house = Tenants(run_dir, specs, kv_bytes, elastic=elastic)
        await house.exchange.start()
        await house.agent.start()
        await house.front.start()
        try:
            warm = [Question(f"warm-{spec.name}", spec.name, [5] * 20, 4) for spec in specs]
            await answer(house.front, warm)
            yield house
        finally:
            await house.agent.stop(0.0)
            await house.front.stop()
            await house.exchange.stop()


async def answer(front: Front, questions: Sequence[Question]) -> None:
    for question in questions:
        front.ask(question)
    await asyncio.wait_for(asyncio.gather(*(question.over.wait() for question in questions)), 1200)


# It pays.


def burst(number: int, name: str, chance: random.Random) -> list[Question]:
    prompts = ([chance.randrange(3, 2000) for _ in range(PROMPT)] for _ in range(BURST))
    return [Question(f"b{number}-{i}", name, prompt, ANSWER) for i, prompt in enumerate(prompts)]


async def timed(work: Awaitable[None]) -> float:
    began = time.monotonic()
    await work
    return time.monotonic() - began


async def bursts(house: Tenants, chance: random.Random) -> list[Question]:
    """One model's burst after the other's, each as soon as the last is answered."""
    asked: list[Question] = []
    for number in range(BURSTS):
        questions = burst(number, MODELS[number % len(MODELS)], chance)
        await answer(house.front, questions)
        asked += questions
    return asked


async def it_pays(figures: Figures, parent: Path, specs: Sequence[ModelSpec], seed: int) -> None:
    # A little above one burst: SGLang admits against its estimate, and a page is rounded up for each request.
    kv_bytes = round(1.1 * BURST * (PROMPT + ANSWER) * TOKEN_BYTES) // PAGE_BYTES * PAGE_BYTES
    async with tenants(parent, specs[:1], kv_bytes, elastic=False) as house:
        alone = [await timed(answer(house.front, burst(number, specs[0].name, random.Random(seed)))) for number in range(3)]
    within_s = PATIENCE * min(alone)
    figures.samples("a burst alone, with all memory", alone, "s")
    attained: dict[bool, float] = {}
    for elastic in (False, True):
        async with tenants(parent, specs, kv_bytes, elastic=elastic) as house:
            started = time.monotonic()
            asked = await bursts(house, random.Random(seed))
            took_s = time.monotonic() - started
        waits = sorted(q.first_s - q.asked_s for q in asked if q.first_s is not None)
        attained[elastic] = sum(wait <= within_s for wait in waits) / len(asked)
        word = "leases" if elastic else "half and half"
        figures.add(f"{word}, answered in full", sum(len(q.tokens) == q.wanted for q in asked), "requests", at_least=len(asked))
        figures.samples(f"{word}, time to first token", waits, "s")
        figures.add(f"{word}, whole trace", took_s, "s")
        figures.add(f"{word}, first token within {within_s:.2g} s", 100 * attained[elastic], "%")
    figures.add("attainment, leases against half and half", attained[True] / max(1e-9, attained[False]), "×", at_least=1.5)


# Nothing aborted.


def crowd(count: int, chance: random.Random) -> list[Question]:
    return [
        Question(
            f"c{i}",
            chance.choice(MODELS),
            [chance.randrange(3, 2000) for _ in range(chance.randint(*CROWD_PROMPT))],
            chance.randint(*CROWD_ANSWER),
        )
        for i in range(count)
    ]


def pool_bytes(pid: int) -> int:
    """A worker's KV memory by the kernel's count."""
    try:
        smaps = Path(f"/proc/{pid}/smaps").read_text()
    except OSError:
        return 0
    return sum(int(kib) * KIB for kib in re.findall(r"memfd:chimera-pages.*?\nRss: +(\d+) kB", smaps, re.DOTALL))


class Auditor:
    """Reads the ledger and the kernel while others work."""

    def __init__(self, house: Tenants) -> None:
        self._house = house
        self.readings = 0
        self.most_charged = 0.0
        self.most_resident = 0.0

    async def run(self) -> None:
        memory = self._house.agent.memory
        assert memory is not None
        while True:
            for ledger in memory.ledger:
                ledger.check()
                view = ledger.view(time.monotonic())
                self.most_charged = max(self.most_charged, view.charged / view.gpu.pages)
            resident = sum(pool_bytes(pid) for pid in self._house.worker_pids())
            self.most_resident = max(self.most_resident, resident / self._house.gpu.capacity_bytes)
            self.readings += 1
            await asyncio.sleep(0.05)


async def nothing_aborted(figures: Figures, parent: Path, specs: Sequence[ModelSpec], count: int, seed: int) -> None:
    most_tokens = (sum(CROWD_PROMPT) + sum(CROWD_ANSWER)) / 2
    peak_bytes = len(MODELS) * CREDITS * most_tokens * TOKEN_BYTES
    kv_bytes = round(SHARE_OF_PEAK * peak_bytes) // PAGE_BYTES * PAGE_BYTES
    figures.add(
        "KV memory of the GPU", kv_bytes / MIB, "MiB", goal=f"{SHARE_OF_PEAK:.0%} of the {peak_bytes / MIB:.1f} at peak"
    )
    async with tenants(parent, specs, kv_bytes, elastic=True) as house:
        auditor = Auditor(house)
        auditing = asyncio.create_task(auditor.run())
        asked = crowd(count, random.Random(seed))
        started = time.monotonic()
        await answer(house.front, asked)
        took_s = time.monotonic() - started
        auditing.cancel()
        await asyncio.gather(auditing, return_exceptions=True)
        if auditing.done() and not auditing.cancelled() and (fault := auditing.exception()) is not None:
            raise fault
    for question in asked:
        if question.error:
            print(f"# {question.request_id}: {question.error}")
    figures.add("answered in full", sum(len(q.tokens) == q.wanted for q in asked), "requests", at_least=count)
    figures.add("ended in an error", sum(bool(q.error) for q in asked), "requests", at_most=0)
    figures.add("brought again", house.front.brought_again, "times")
    figures.add("whole crowd", took_s, "s")
    figures.add("tokens made", sum(len(q.tokens) for q in asked) / took_s, "per second")
    figures.add("readings of ledger and kernel", auditor.readings, "")
    figures.add("most charged", 100 * auditor.most_charged, "% of the GPU", at_most=100)
    figures.add("most resident", 100 * auditor.most_resident, "% of the GPU", at_most=100)


async def start_parent(folder: Path) -> tuple[asyncio.subprocess.Process, Path]:
    path = folder / "parent.sock"
    words = ["-m", "chimera.worker.parent", "--socket", str(path), "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.DEVNULL)
    while not path.exists():
        if process.returncode is not None:
            raise RuntimeError("the preloaded parent does not come up")
        await asyncio.sleep(0.1)
    return process, path


async def measure(figures: Figures, part: str, count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        specs = [tiny(name, Path(folder), engine_args={"max_running_requests": CREDITS}) for name in MODELS]
        process, parent = await start_parent(Path(folder))
        try:
            if part in ("pays", "both"):
                await it_pays(figures, parent, specs, seed)
            if part in ("crowd", "both"):
                await nothing_aborted(figures, parent, specs, count, seed)
        finally:
            process.terminate()
            await process.wait()


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--part", choices=("pays", "crowd", "both"), default="both")
    options.add_argument("--requests", type=int, default=2000, help="in the crowd (default: 2000)")
    arguments = options.parse_args()
    figures = Figures("two models on one GPU", seed=arguments.seed)
    asyncio.run(measure(figures, arguments.part, arguments.requests, arguments.seed))
    return figures.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())

"""Eighteen models on eight virtual GPUs under a real trace, while a worker is killed every five seconds, and agent, control and
a front-end once each. Nothing may be lost, answered by another model, or left behind.

    python benchmark/chaos.py [--minutes 5] [--engine simulated]

Every model has weights of its own, and so its own greedy answers; they are asked for before anything is killed, and every
answer under fire is held against them, as far as it came. A request ends well when its stream is whole and right, or when
it ends in one error that says why; one that was accepted by the front-end which is killed may be cut off. Memory is read from
the ledger and from /proc. Recovery is the time from a kill to the next answer: of the killed worker's model, or of any.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: the repository is not a package

import aiohttp
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS
from chimera.trace.reader import read_trace
from chimera.trace.trace import Row, Trace, names_for

from benchmark.report import Figures, parser

TRACE = Path(__file__).parents[2] / "shared/traces/arena_prism18.csv.gz"
ARCHITECTURES = ("llama", "qwen3", "gemma2", "mistral", "moe")
GPUS = 8
GPU_MIB = 512
PROMPTS = (6, 20, 48, 96)
"""Lengths of what models are asked; a trace's prompts are taken for the nearest."""
LONGEST = 40
"""Tokens of an answer."""
WORKER_EVERY_S = 5.0
LOOK_EVERY_S = 5.0
ENDS_WITHIN_S = 60.0
START_WITHIN_S = 240.0
STOP_WITHIN_S = 60.0


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--models", type=int, default=18)
    options.add_argument("--rate", type=float, default=0.5, help="requests of the trace that are sent, as a share")
    options.add_argument("--trace", type=Path, default=TRACE)
    options.add_argument("--engine", choices=("sglang", "simulated"), default="sglang")
    options.add_argument("--logs", type=Path, help="keep the server's logs there")
    arguments = options.parse_args()
    figures = Figures("chaos", seed=arguments.seed, facts={"engine": arguments.engine, "trace": arguments.trace.name})
    with tempfile.TemporaryDirectory(prefix="chimera-chaos-") as folder:
        names = checkpoints(Path(folder), arguments.models, arguments.engine)
        trace = load(arguments.trace, names, arguments)
        with served(Path(folder), names, arguments) as server:
            asyncio.run(storm(figures, server, names, trace, random.Random(arguments.seed), 60 * arguments.minutes))
        figures.add("processes left behind", len(server.processes()), "", at_most=0)
        figures.add("sockets left behind", Path("/proc/net/unix").read_text().count(str(server.run_dir)), "", at_most=0)
        figures.add("run directory left behind", float(server.run_dir.exists()), "", at_most=0)
    figures.add("shared memory left behind", sum(path.exists() for path in server.images), "", at_most=0)
    return figures.finish(arguments.json)


# The server.


@dataclass
class Server:
    process: Popen[str]
    run_dir: Path
    url: str = ""
    images: list[Path] = field(default_factory=list)
    """Where it shares weights."""

    def processes(self, module: str = "") -> list[int]:
        """All that were started for this run directory; workers look like the parent that they were forked from."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().decode(errors="replace")
            except OSError:  # gone meanwhile
                continue
            if str(self.run_dir) in command and module in command:
                found.append(int(path.parent.name))
        return sorted(found)

    def workers(self) -> list[dict[str, Any]]:
        try:
            told: list[dict[str, Any]] = json.loads((self.run_dir / "agent-local.workers").read_bytes())
        except FileNotFoundError:
            return []
        return told


def checkpoints(folder: Path, count: int, engine: str) -> list[str]:
    """Each of one of five architectures, with weights of its own; and the placement file."""
    entries = []
    for number in range(count):
        architecture = ARCHITECTURES[number % len(ARCHITECTURES)]
        name = f"{architecture}-{number:02}"
        make(MODELS[architecture], folder / name, number)
        seats = [{"gpu_ids": [number % GPUS]}]
        costs = {"step_s": 0.02} if engine == "simulated" else {}
        entry = {"model_name": name, "model_path": name, "dtype": "float32", "init_placements": seats, "engine_args": costs}
        entries.append(entry)
    (folder / "placement.json").write_text(json.dumps({"gpus": f"{GPUS}x{GPU_MIB}MiB", "models": entries}))
    return [str(entry["model_name"]) for entry in entries]


def load(path: Path, names: Sequence[str], arguments: Any) -> Trace:
    trace = read_trace(path, to_s=60 * arguments.minutes)
    return trace.rate_scaled(arguments.rate, arguments.seed).renamed(names_for(trace, names))


@contextmanager
def served(folder: Path, names: Sequence[str], arguments: Any) -> Iterator[Server]:
    """From its start to its end by Ctrl-C."""
    run_dir, logs = folder / "run", arguments.logs or folder / "logs"
    words = [sys.executable, "-m", "chimera", "serve", str(folder / "placement.json"), "--run-dir", str(run_dir)]
    words += ["--port", "0", "--fronts", "2", "--engine", arguments.engine, "--log-dir", str(logs), "--log-level", "info"]
    process = Popen(words, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True)
    server = Server(process, run_dir)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"# {line.rstrip()}", flush=True)
            if "ready in" in line and "http://" in line:
                server.url = next(word for word in line.split() if word.startswith("http")).rstrip(",")
                break
        assert server.url, "the server did not come up"
        words = Path(f"/proc/{server.processes('chimera.worker.parent')[0]}/cmdline").read_text().split("\0")
        server.images = [Path(folder) for flag, folder in itertools.pairwise(words) if flag == "--images"]
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=STOP_WITHIN_S)


# The load.


@dataclass
class Tally:
    """What became of the requests."""

    ends: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Client:
    def __init__(self, session: aiohttp.ClientSession, names: Sequence[str]) -> None:
        self._session = session
        self.names = names
        self.right: dict[tuple[str, int], str] = {}
        """What each model says to each prompt."""
        self.tally = Tally()
        self.front_killed_s = float("inf")

    async def learn(self) -> int:
        """The answers of a quiet server; how many models have answers of their own."""
        one_at_a_time = asyncio.Semaphore(2)

        async def ask(name: str, length: int) -> None:
            async with one_at_a_time:
                text, end = await self.stream(name, length, LONGEST)
                assert end == "whole", f"{name} does not answer before anything was killed: {end}"
                self.right[name, length] = text

        await asyncio.gather(*(ask(name, length) for name in self.names for length in PROMPTS))
        return len({tuple(self.right[name, length] for length in PROMPTS) for name in self.names})

    async def one(self, row: Row) -> None:
        """A request of the trace, and its judgement."""
        length = min(PROMPTS, key=lambda known: abs(known - row.prompt_tokens))
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(ENDS_WITHIN_S):
                text, end = "", "unheard"
                while end == "unheard":  # a front-end that dies had not taken it: the other one will
                    text, end = await self.stream(row.model, length, min(LONGEST, row.output_tokens))
        except TimeoutError:
            text, end = "", "lost"
        right = self.right[row.model, length]
        if not right.startswith(text) or (end == "whole" and not text):
            others = [name for name in self.names if name != row.model and self.right[name, length].startswith(text)]
            self.tally.faults.append(f"{row.model} was to say {right[: len(text)]!r} and said {text!r}")
            end = "another model's" if others else "wrong"
        if end == "cut" and not sent_s <= self.front_killed_s <= time.monotonic():
            end = "cut without reason"
        if end.startswith("error"):
            self.tally.errors[end.partition(" ")[2]] += 1
            end = "error"
        self.tally.ends[end] += 1

    async def stream(self, name: str, length: int, tokens: int) -> tuple[str, str]:
        """The text, and how it ended: `whole`, `error CODE`, `cut`, or `unheard` when nobody took the request."""
        body = {"model": name, "prompt": prompt(length), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        text, end = "", "unheard"
        try:
            async with self._session.post("/v1/completions", json={**body, "stream": True}) as response:
                end = "cut"
                if response.status != 200:
                    return "", f"error {(await response.json())['error']['code']}"
                async for line in response.content:
                    if line.startswith(b"data: [DONE]"):
                        end = "whole"
                    elif line.startswith(b"data: "):
                        assert end == "cut", f"{name} goes on after {end}"
                        event = json.loads(line[6:])
                        if "error" in event:
                            end = f"error {event['error']['code']}"
                        else:
                            text += "".join(choice["text"] for choice in event["choices"])
        except (aiohttp.ClientError, ConnectionError) as broken:
            print(f"# {name} {end}: {broken!r}", flush=True)
        return text, end

    async def until_answered(self, name: str) -> float:
        """Seconds until the model answers a new request."""
        began_s = time.monotonic()
        async with asyncio.timeout(ENDS_WITHIN_S):
            while (await self.stream(name, PROMPTS[0], 1))[1] != "whole":  # noqa: ASYNC110 - only asking tells
                await asyncio.sleep(0.02)
        return time.monotonic() - began_s


def prompt(length: int) -> list[int]:
    return [3 + (7 * place) % 900 for place in range(length)]


# The storm.


class Killer:
    def __init__(self, server: Server, client: Client, dice: random.Random) -> None:
        self._server = server
        self._client = client
        self._dice = dice
        self.recovered_s: dict[str, list[float]] = {"worker": [], "agent": [], "control": [], "front-end": []}
        self._watched: list[asyncio.Task[None]] = []

    async def kill_workers(self) -> None:
        """One of those that serve, every so often."""
        for number in itertools.count(1):
            await asyncio.sleep(WORKER_EVERY_S)
            busy = [worker for worker in self._server.workers() if worker["gpu_ids"] and worker["settled"]]
            if busy:
                victim = self._dice.choice(busy)
                os.kill(victim["pid"], signal.SIGKILL)
                self._watch("worker", self._client.names[number % len(self._client.names)], victim["replica"])

    async def kill_once(self, kind: str, module: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        victim = self._server.processes(module)[0]
        if kind == "front-end":
            self._client.front_killed_s = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        self._watch(kind, self._dice.choice(self._client.names), "")

    async def all_recovered(self) -> None:
        await asyncio.gather(*self._watched)

    def _watch(self, kind: str, name: str, replica: str) -> None:
        async def watch() -> None:
            self.recovered_s[kind].append(await self._client.until_answered(replica.partition("/")[0] or name))

        self._watched.append(asyncio.create_task(watch()))


class Watcher:
    """Memory, in the ledger and in /proc."""

    def __init__(self, server: Server, session: aiohttp.ClientSession) -> None:
        self._server = server
        self._session = session
        self.looks = 0
        self.most_charged = 0.0
        self.most_resident = 0.0

    async def look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                async with self._session.get("/ledger") as response:
                    ledgers = (await response.json())["gpus"] if response.status == 200 else []
            except aiohttp.ClientError:  # a front-end is away
                continue
            for ledger in ledgers:
                charged = sum(max(entry["lease"]["level"], entry["lease"]["held"]) for entry in ledger["entries"])
                self.most_charged = max(
                    self.most_charged, charged / (ledger["gpu"]["capacity_bytes"] // ledger["gpu"]["page_bytes"])
                )
            resident = await asyncio.to_thread(self._resident_by_gpu)
            self.most_resident = max(self.most_resident, *resident.values(), 0)
            self.looks += 1

    def _resident_by_gpu(self) -> dict[int, float]:
        """The share of each GPU that its workers' pools really take of this host."""
        found: dict[int, float] = {}
        for worker in self._server.workers():
            for gpu_id in worker["gpu_ids"]:
                found[gpu_id] = found.get(gpu_id, 0.0) + pool_bytes(worker["pid"]) / (GPU_MIB << 20)
        return found or {0: 0.0}


def pool_bytes(pid: int) -> int:
    """What is resident of the pages that the host driver has made."""
    total, ours = 0, False
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:  # killed
        return 0
    for line in lines:
        if line[:1] in "0123456789abcdef" and "-" in line.split(" ", 1)[0]:
            ours = "memfd:chimera-pages" in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


async def storm(
    figures: Figures, server: Server, names: Sequence[str], trace: Trace, dice: random.Random, seconds: float
) -> None:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        client = Client(session, names)
        figures.add("models, all of which say something else", await client.learn(), "", at_least=len(client.names))
        killer, watcher = Killer(server, client, dice), Watcher(server, session)
        plagues: list[Callable[[], Awaitable[None]]] = [
            killer.kill_workers,
            watcher.look,
            lambda: killer.kill_once("agent", "chimera.agent", 0.33 * seconds + 2.5),
            lambda: killer.kill_once("control", "chimera.control", 0.5 * seconds + 2.5),
            lambda: killer.kill_once("front-end", "chimera.server", 0.7 * seconds + 2.5),
        ]
        running = [asyncio.ensure_future(plague()) for plague in plagues]
        began_s, requests = time.monotonic(), []
        for row in trace.rows:
            await asyncio.sleep(max(0.0, began_s + row.at_s - time.monotonic()))
            requests.append(asyncio.create_task(client.one(row)))
        await asyncio.sleep(max(0.0, began_s + seconds - time.monotonic()))
        for task in running:
            task.cancel()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await asyncio.gather(*requests)
        await killer.all_recovered()
    tell(figures, client.tally, killer, watcher, len(requests), seconds)


def tell(figures: Figures, tally: Tally, killer: Killer, watcher: Watcher, sent: int, seconds: float) -> None:
    for fault in tally.faults[:5]:
        print(f"# {fault}")
    for code, count in sorted(tally.errors.items()):
        print(f"# errors {code}: {count}")
    figures.add("seconds under fire", seconds, "s")
    figures.add("requests", sent, "")
    figures.add("whole and right", tally.ends["whole"] / max(1, sent), "of them")
    figures.add("ended in one error", tally.ends["error"], "")
    figures.add("cut off by the front-end's death", tally.ends["cut"], "")
    for end in ("lost", "another model's", "wrong", "cut without reason"):
        figures.add(end, tally.ends[end], "", at_most=0)
    figures.add("accounted for", sum(tally.ends.values()), "", at_least=sent)
    for kind, times in killer.recovered_s.items():
        figures.add(f"{kind}s killed", len(times), "", at_least=1)
        if times:
            figures.samples(f"recovery from a killed {kind}", times, "s")
            figures.add(f"slowest recovery from a killed {kind}", max(times), "s", at_most=3.0)
    figures.add("looks at memory", watcher.looks, "", at_least=1)
    figures.add("most that a ledger charged", watcher.most_charged, "of a GPU", at_most=1.0)
    figures.add("most that pools took of the host", watcher.most_resident, "of a GPU", at_most=1.0)


if __name__ == "__main__":
    sys.exit(main())

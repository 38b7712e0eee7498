"""One run from its trace to what came of it: the servers are asked what they are, prompts are written, the load is made, and
the servers are watched meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from chimera.bench.dialect import Dialect
from chimera.bench.load import Ending, Job, Run, Terms
from chimera.bench.prompts import NOTHING_SHARED, Sharing, Writer
from chimera.bench.record import Record
from chimera.bench.stream import Target
from chimera.bench.watch import Sighting, Watcher, fetch, snapshot_of
from chimera.core.model import Slo
from chimera.errors import ChimeraError, ConfigError
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.trace.sharegpt import Exchange
from chimera.trace.trace import Trace

_SETTLED_S = 0.5
_LOOK_S = 0.1


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of one of its models."""

    name: str
    slo: Slo = Slo()
    context_length: int | None = None
    tokenizer_path: str | None = None
    """Where its tokenizer is, if that is on this machine."""


class _Card(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None
    root: str | None = None


class _Cards(msgspec.Struct, frozen=True):
    data: tuple[_Card, ...]


async def known_models(target: Target) -> dict[str, Known]:
    """By name. ConfigError when the server is not there or does not list its models."""
    return {model.name: model for model in await _models_of(target)}


async def _models_of(target: Target) -> tuple[Known, ...]:
    if not await target.is_there():
        raise ConfigError.single(target.url, "no server answers", hint="start one with chimera serve, or give --url")
    snapshot = await snapshot_of(target)
    if snapshot is not None:
        return tuple(
            Known(name=m.name, slo=m.slo, context_length=m.context_length, tokenizer_path=m.tokenizer_path)
            for m in snapshot.models
        )
    body = await fetch(target, "/v1/models")
    try:
        cards = msgspec.json.decode(body or b"", type=_Cards).data
    except msgspec.DecodeError as fault:
        raise ConfigError.single(target.url, f"does not list its models: {fault}") from None
    return tuple(Known(name=card.id, context_length=card.max_model_len, tokenizer_path=card.root) for card in cards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of the servers, whoever they are."""

    trace: Trace
    slos: Mapping[str, Slo]
    concurrency: int | None = None
    """Closed loop with so many at once; the trace's times then say only the order."""
    seed: int = 42
    sharing: Sharing = NOTHING_SHARED
    exchanges: Sequence[Exchange] = ()
    """Real questions; one of the row's length is taken where there is one."""
    terms: Terms = field(default_factory=Terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    records: list[Record]
    ending: Ending
    sighting: Sighting


def prompts_of(load: Load, known: Mapping[str, Known]) -> list[str]:
    """The prompt of each row. The same for every server that is asked."""
    asked = {(exchange.prompt_tokens, exchange.output_tokens): exchange.prompt for exchange in load.exchanges}
    writers = {model: Writer.of(model, _tokenizer(known.get(model)), load.seed, load.sharing) for model in load.trace.models}
    return [
        asked.get((row.prompt_tokens, row.output_tokens)) or writers[row.model].write(number, row.prompt_tokens, row.blocks)
        for number, row in enumerate(load.trace.rows)
    ]


def _tokenizer(known: Known | None) -> ModelTokenizer | None:
    """None where it is not on this machine: words are then taken for tokens, and the server's own count is what is kept."""
    if known is None or known.tokenizer_path is None or not (Path(known.tokenizer_path) / "tokenizer.json").is_file():
        return None
    return ModelTokenizer.load(known.tokenizer_path)


def jobs_of(load: Load, prompts: Sequence[str], dialect: Dialect, target_of: Callable[[str], Target]) -> list[Job]:
    jobs = []
    for number, (row, prompt) in enumerate(zip(load.trace.rows, prompts, strict=True)):
        record = Record(
            request_id=f"r{number:06}",
            model=row.model,
            planned_s=row.at_s,
            prompt_tokens=row.prompt_tokens,
            wanted_tokens=row.output_tokens,
            slo=load.slos.get(row.model, Slo()),
        )
        target = target_of(row.model)
        jobs.append(Job(record, target, target.message(dialect.path, dialect.body(record, prompt))))
    return jobs


async def measured(load: Load, jobs: Sequence[Job], dialect: Dialect) -> Measured:
    """The run. A first Ctrl-C ends it with what it has."""
    run = Run(jobs, dialect, load.terms)
    targets = list({id(job.target): job.target for job in jobs}.values())
    watchers = [Watcher(target, lambda: run.now_s) for target in targets]
    for watcher in watchers:
        await watcher.start()
    for watcher in watchers:
        watcher.begin()
    loop = asyncio.get_running_loop()
    with _on_interrupt(loop, lambda: run.stop("stopped by hand")):
        ending = await (run.open_loop() if load.concurrency is None else run.closed_loop(load.concurrency))
    sightings = [await watcher.stop() for watcher in watchers]
    return Measured(records=[job.record for job in jobs], ending=ending, sighting=_together(sightings))


@contextmanager
def _on_interrupt(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> Iterator[None]:
    try:
        loop.add_signal_handler(signal.SIGINT, act)
    except (ValueError, RuntimeError):  # not the main thread: whoever started this has Ctrl-C
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _together(sightings: Sequence[Sighting]) -> Sighting:
    """Of several servers the GPUs are all there are; samples of the first that tells any."""
    told = [sighting for sighting in sightings if sighting.gpus]
    if len(told) <= 1:
        return told[0] if told else Sighting()
    return Sighting(
        gpus=tuple(gpu for sighting in told for gpu in sighting.gpus),
        samples=told[0].samples,
        switches=tuple(switch for sighting in told for switch in sighting.switches),
        stays=tuple(stay for sighting in told for stay in sighting.stays),
    )


async def choose_policy(target: Target, policy: str, *, settle_s: float = 30.0) -> None:
    """From now on this policy decides; returns when nothing is loading or leaving any more."""
    body = msgspec.json.encode({"policy": policy})
    if await fetch(target, "/policy", body, "PUT") is None:
        raise ChimeraError(f"{target.url} does not change its policy to {policy}")
    await settled(target, within_s=settle_s)


async def settled(target: Target, *, within_s: float) -> None:
    """Until every replica has been up for a moment, or so long."""
    loop = asyncio.get_running_loop()
    deadline_s, quiet_since_s = loop.time() + within_s, loop.time()
    while loop.time() < deadline_s and loop.time() - quiet_since_s < _SETTLED_S:
        snapshot = await snapshot_of(target)
        if snapshot is not None and any(view.state != "serving" for view in snapshot.replicas):
            quiet_since_s = loop.time()
        await asyncio.sleep(_LOOK_S)

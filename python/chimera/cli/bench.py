"""`chimera bench VERB`: send a trace or made-up requests to a server, any server, and say in numbers what came of it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chimera.bench import campaign, outcome, promise
from chimera.bench.campaign import Arm, Campaign
from chimera.bench.dialect import APIS, dialect_named
from chimera.bench.session import known_models
from chimera.bench.stream import Target
from chimera.cli import examples, workload
from chimera.cli.circumstances import circumstances
from chimera.cli.server_url import DEFAULT_URL
from chimera.cli.status import table
from chimera.config.keys import client_key
from chimera.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="bench", metavar="VERB", required=True)
    for name, purpose, run in (
        ("serve", "one run: a trace, an arrival process, or so many requests at a time", _serve),
        ("sweep", "run after run: the highest rate at which so many of a hundred promises are kept", _sweep),
        ("compare", "policies of one server, or several servers, in turn on the same requests", _compare),
        ("calibrate", "what each model takes when it is alone: the SLOs of later runs", _calibrate),
    ):
        verb = _verb(verbs, name, purpose)
        _server_options(verb)
        workload.configure(verb)
        verb.set_defaults(run_bench=run)
        if name in _OPTIONS:
            _OPTIONS[name](verb)
    switch = _verb(verbs, "switch", "how long a model takes to come up, and the first answer of one that is down")
    _server_options(switch)
    switch.add_argument("--models", type=lambda text: text.split(","), default=[], metavar="A,B", help="these (default: all)")
    switch.add_argument("--rounds", type=int, default=5, metavar="N", help="of each model (default: %(default)s)")
    switch.set_defaults(run_bench=_switch)
    report = _verb(verbs, "report", "one HTML page and PNGs of finished runs, side by side")
    report.add_argument("what", nargs="+", type=Path, metavar="DIR|FILE", help="results as the other verbs write them")
    report.add_argument("--out", type=Path, default=Path("bench-report"), metavar="DIR", help="default: %(default)s")
    report.add_argument("--title", default="Replay", help="default: %(default)s")
    report.set_defaults(run_bench=_report)


def run(arguments: argparse.Namespace) -> int:
    status: int = arguments.run_bench(arguments)
    return status


def _verb(verbs: Any, name: str, purpose: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=purpose,
        description=purpose,
        epilog=examples.of(f"bench {name}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    add("--api", choices=APIS, default="completions", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s")
    add("--allow-eos", action="store_true", help="answers may end before their length; they are then shorter than the trace's")
    add("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="where results go (default: %(default)s)")
    add("--name", help="of the run (default: what is run)")
    add("--gpu-price", type=float, metavar="MONEY", help="of one GPU for one hour: gives the cost per 1,000 requests")
    add("--output-details", action="store_true", help="the peers' lists in the result too; the records are written anyway")


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attain", type=float, default=99.0, metavar="PERCENT", help="so many have to be kept (default: 99)")
    parser.add_argument("--promise", choices=("ttft", "tpot", "joint"), default="ttft", help="which (default: ttft)")
    parser.add_argument("--rate-scales", type=_numbers, metavar="A,B", help="only these rate scales, instead of searching")
    parser.add_argument("--most-rate-scale", type=float, default=64.0, metavar="X", help="end of the search (default: 64)")


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policies", type=lambda text: text.split(","), default=[], metavar="A,B", help="of the server at --url"
    )
    parser.add_argument("--servers", nargs="+", default=[], metavar="NAME=URL", help="instead: one run on each")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="so often each; every second round in the opposite order (default: 1)",
    )


_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {"sweep": _sweep_options, "compare": _compare_options}


# The verbs.


def _serve(arguments: argparse.Namespace) -> int:
    async def work(reach: Reach) -> int:
        ready = await _campaign(arguments, reach)
        found = await ready.run(Arm(arguments.name or "run", ready.target))
        return _tell(found, arguments)

    return _run(work)


def _sweep(arguments: argparse.Namespace) -> int:
    async def work(reach: Reach) -> int:
        ready = await _campaign(arguments, reach)
        found = await campaign.sweep(
            ready,
            remade=lambda scale: workload.workload(_with(arguments, rate_scale=scale), ready.known),
            share=arguments.attain / 100,
            promise=arguments.promise,
            scales=arguments.rate_scales,
            most=arguments.most_rate_scale,
        )
        rows = [(f"{p.scale:.2f}", f"{p.rate:.2f}", *(f"{100 * a:.1f}" for a in p.attainments)) for p in found.points]
        print(table(("RATE SCALE", "REQUESTS/S", "TTFT %", "TPOT %", "JOINT %"), rows))
        if found.highest is None:
            print(f"no rate keeps {arguments.attain:g} % of {arguments.promise}")
            return 1
        highest = found.highest
        print(f"rate at {arguments.attain:g} % {arguments.promise}: {highest.scale:.2f} × = {highest.rate:.2f} requests/s")
        return 0

    return _run(work)


def _compare(arguments: argparse.Namespace) -> int:
    async def work(reach: Reach) -> int:
        ready = await _campaign(arguments, reach)
        arms = [Arm(policy, ready.target, policy) for policy in arguments.policies]
        for word in arguments.servers:
            name, _, url = word.partition("=")
            if not url:
                raise ConfigError.single("--servers", f"{word!r} is not NAME=URL")
            arms.append(Arm(name, reach(url)))
        if len(arms) < 2:
            raise ConfigError.single("compare", "names fewer than two: --policies A,B or --servers A=URL B=URL")
        runs = await campaign.compare(ready, arms, arguments.rounds)
        print(campaign.comparison(runs))
        return 0 if all(found.valid and not found.ending.partial for found, _ in runs) else 1

    return _run(work)


def _calibrate(arguments: argparse.Namespace) -> int:
    async def work(reach: Reach) -> int:
        arguments.concurrency = 1
        ready = await _campaign(arguments, reach)
        found, records = await ready.run_with_records(Arm(arguments.name or "calibration", ready.target))
        slos = promise.calibrated(records)
        path = arguments.out / "slos.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(slos), indent=2) + b"\n")
        rows = [(name, _ms(slo.ttft_s), _ms(slo.tpot_s)) for name, slo in slos.items()]
        print(table(("MODEL", "TTFT P95", "TPOT P95"), rows))
        print(f"written to {path}; later runs take it with --slo-file and a scale")
        return int(bool(found.ending.partial) or len(slos) < len(found.by_model))

    return _run(work)


def _switch(arguments: argparse.Namespace) -> int:
    async def work(reach: Reach) -> int:
        target = reach(arguments.url)
        dialect = dialect_named(arguments.api, ignore_eos=not arguments.allow_eos)
        known = await known_models(target)
        names = arguments.models or list(known)
        found = await campaign.switches(target, dialect, names, arguments.rounds)
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"{arguments.name or 'switch'}.json"
        path.write_bytes(
            msgspec.json.format(msgspec.json.encode({"facts": circumstances(), "switches": found}), indent=2) + b"\n"
        )
        print(campaign.switch_table(found))
        return 0

    return _run(work)


def _report(arguments: argparse.Namespace) -> int:
    from chimera.bench import page  # draws, which nothing else here does

    runs = [(outcome.read_outcome(path), campaign.records_beside(path)) for path in campaign.results_in(arguments.what)]
    if not runs:
        raise ConfigError.single(str(arguments.what[0]), "holds no result of a run")
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = page.write(arguments.out, arguments.title, runs)
    print("\n".join(str(path) for path in written))
    return 0


# What they share.


class Reach:
    """The servers that a verb talks to; their connections end with it."""

    def __init__(self) -> None:
        key = client_key()
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._targets: list[Target] = []

    def __call__(self, url: str) -> Target:
        self._targets.append(Target(url, self._headers))
        return self._targets[-1]

    async def close(self) -> None:
        for target in self._targets:
            target.close()
        await asyncio.sleep(0)  # a transport is gone a turn of the loop after it was aborted


def _run(work: Callable[[Reach], Coroutine[Any, Any, int]]) -> int:
    import uvloop

    async def whole() -> int:
        reach = Reach()
        try:
            return await work(reach)
        finally:
            await reach.close()

    status: int = uvloop.run(whole())
    return status


async def _campaign(arguments: argparse.Namespace, reach: Reach) -> Campaign:
    target = reach(arguments.url)
    known = await known_models(target)
    made = workload.workload(arguments, known)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return Campaign(
        target=target,
        known=known,
        load=made.load,
        facts={**circumstances(), **made.facts, "api": arguments.api, "url": target.url},
        dialect=dialect_named(arguments.api, ignore_eos=not arguments.allow_eos, temperature=arguments.temperature),
        out=arguments.out,
        gpu_price=arguments.gpu_price,
        details=arguments.output_details,
        say=lambda line: print(line, flush=True),
    )


def _tell(found: outcome.Outcome, arguments: argparse.Namespace) -> int:
    if not found.valid:
        print(outcome.too_late(found))
        return 1
    rate = "trace" if arguments.trace is not None else f"{arguments.rate * arguments.rate_scale:g}"
    print(outcome.banner(found, rate=rate, concurrency=arguments.concurrency))
    head, *rows = outcome.model_table(found)
    print(table(head, rows))
    return 1 if found.ending.partial or not found.metrics.answered else 0


def _with(arguments: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), **changes})


def _numbers(text: str) -> Sequence[float]:
    return [float(word) for word in text.split(",")]


def _ms(value_s: float | None) -> str:
    return "–" if value_s is None else f"{1000 * value_s:.1f} ms"

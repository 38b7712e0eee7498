"""The options that say what a server is asked: a trace or an arrival process, lengths, promises. And the load they mean."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chimera.bench import promise
from chimera.bench.load import Terms
from chimera.bench.prompts import Sharing
from chimera.bench.session import Known, Load
from chimera.cli.on_paper import mapping
from chimera.core.model import Slo
from chimera.errors import ConfigError
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.trace import generator
from chimera.trace.generator import Recipe
from chimera.trace.reader import read_trace
from chimera.trace.sharegpt import Exchange, read_exchanges
from chimera.trace.trace import Trace, names_for


def configure(parser: argparse.ArgumentParser) -> None:
    trace = parser.add_argument_group("what is asked: a trace …")
    add = trace.add_argument
    add("--trace", type=Path, metavar="FILE", help="CSV (ours, Azure's, BurstGPT's), Mooncake's JSONL, or Prism's .pkl")
    add("--from", dest="from_s", type=float, default=0.0, metavar="S", help="begin here in the trace")
    add("--to", dest="to_s", type=float, default=math.inf, metavar="S", help="end here")
    add("--time-scale", type=float, default=1.0, metavar="X", help="multiplies every moment of the trace (default: 1)")
    add("--rate-scale", type=float, default=1.0, metavar="X", help="so often is each request sent, on average (default: 1)")
    add(
        "--map",
        action="append",
        default=[],
        metavar="TRACE=MODEL",
        help="which of the server's models stands for one of the trace",
    )
    made = parser.add_argument_group("… or made-up requests")
    add = made.add_argument
    add("--rate", type=float, default=2.0, metavar="R", help="requests per second over all models (default: %(default)s)")
    add("--seconds", type=float, default=60.0, metavar="S", help="for so long (default: %(default)s)")
    add("--arrivals", choices=generator.ARRIVALS, default="poisson", help="default: %(default)s")
    add("--cv", type=float, default=1.0, help="burstiness of gamma and weibull: deviation of the gaps in means (default: 1)")
    add("--shape", choices=generator.SHAPES, default="uniform", help="which models are asked when (default: %(default)s)")
    add("--alpha", type=float, default=1.0, help="of the power law (default: %(default)s)")
    add(
        "--prompt-tokens",
        type=_range,
        default=(256, 512),
        metavar="A-B",
        help="of each, any number in between (default: 256-512)",
    )
    add("--output-tokens", type=_range, default=(256, 512), metavar="A-B", help="likewise (default: 256-512)")
    add("--dataset", type=Path, metavar="FILE", help="ShareGPT's JSON: its questions, and the lengths of its answers")
    both = parser.add_argument_group("of both")
    add = both.add_argument
    add(
        "--models", type=lambda text: text.split(","), default=[], metavar="A,B", help="ask only these (default: all there are)"
    )
    add("--concurrency", type=int, metavar="N", help="closed loop: N requests at a time, whatever the times say")
    add("--length-scale", type=float, default=1.0, metavar="X", help="prompts and answers so many times as long (default: 1)")
    add("--most-requests", type=int, metavar="N", help="no more than these")
    add(
        "--prefix-share",
        type=float,
        default=0.0,
        metavar="X",
        help="share of each prompt that others begin with too (default: 0)",
    )
    add(
        "--prefixes", type=int, default=8, metavar="N", help="so many different beginnings of each model (default: %(default)s)"
    )
    add("--seed", type=int, default=42, help="for whatever is random (default: %(default)s)")
    add("--timeout", type=float, default=600.0, metavar="S", help="of one request (default: %(default)s)")
    add(
        "--drain", type=float, default=60.0, metavar="S", help="how long answers may take after the last was sent (default: 60)"
    )
    owed = parser.add_argument_group("what is owed")
    add = owed.add_argument
    add("--slo-ttft-ms", type=float, metavar="MS", help="to the first token, for every model (default: as placed)")
    add("--slo-tpot-ms", type=float, metavar="MS", help="the same, for each token after the first")
    add("--slo-file", type=Path, metavar="FILE", help="SLOs by model, as `chimera bench calibrate` writes them")
    add("--ttft-slo-scale", type=float, default=1.0, metavar="X", help="multiplies those to the first token (default: 1)")
    add("--tpot-slo-scale", type=float, default=1.0, metavar="X", help="multiplies the others (default: 1)")
    add("--goodput", nargs="+", default=[], metavar="WORD:MS", help="as vLLM has it: ttft:500 tpot:50")


@dataclass(frozen=True, slots=True)
class Workload:
    """The load, and what a reader needs to know of how it came to be."""

    load: Load
    facts: dict[str, object]


def workload(arguments: argparse.Namespace, known: Mapping[str, Known]) -> Workload:
    names = [name for name in known if not arguments.models or name in arguments.models]
    for name in arguments.models:
        if name not in known:
            raise ConfigError.single("--models", f"{name!r} is not among {', '.join(known)}")
    exchanges = _exchanges(arguments, known)
    trace = _trace(arguments, names, exchanges)
    whole = len(trace.rows)
    trace = trace.length_scaled(arguments.length_scale) if not exchanges else trace
    if arguments.most_requests is not None:
        trace = Trace(trace.source, trace.rows[: arguments.most_requests])
    trace, cut = trace.clipped({name: model.context_length for name, model in known.items() if model.context_length})
    if not trace.rows:
        raise ConfigError.single(trace.source, "has no request to send")
    load = Load(
        trace=trace,
        slos=_slos(arguments, known, trace.models),
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        sharing=Sharing(share=arguments.prefix_share, prefixes=arguments.prefixes),
        exchanges=exchanges,
        terms=Terms(timeout_s=arguments.timeout, drain_s=arguments.drain),
    )
    facts: dict[str, object] = {
        "trace": Path(trace.source).name,
        "requests": len(trace.rows),
        "left_out": whole - len(trace.rows),
        "cut_to_context": cut,
        "seconds": round(trace.span_s, 3),
        "models": list(trace.models),
        "seed": arguments.seed,
        "rate_scale": arguments.rate_scale,
        "time_scale": arguments.time_scale,
        "length_scale": arguments.length_scale,
        "prefix_share": arguments.prefix_share,
        "concurrency": arguments.concurrency,
    }
    return Workload(load, facts)


def _trace(arguments: argparse.Namespace, names: list[str], exchanges: list[Exchange]) -> Trace:
    if arguments.trace is not None:
        trace = read_trace(arguments.trace, arguments.from_s, arguments.to_s)
        stand_ins = names_for(trace, names, mapping(arguments.map)) if trace.rows else {}
        for theirs, ours in stand_ins.items():
            if theirs != ours:
                print(f"{theirs} of the trace is replayed on {ours}")
        return trace.renamed(stand_ins).time_scaled(arguments.time_scale).rate_scaled(arguments.rate_scale, arguments.seed)
    recipe = Recipe(
        models=tuple(names),
        rate=arguments.rate * arguments.rate_scale,
        seconds=arguments.seconds,
        arrivals=arguments.arrivals,
        cv=arguments.cv,
        shape=arguments.shape,
        alpha=arguments.alpha,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
    )
    return generator.generate(recipe, arguments.seed, exchanges).time_scaled(arguments.time_scale)


def _exchanges(arguments: argparse.Namespace, known: Mapping[str, Known]) -> list[Exchange]:
    if arguments.dataset is None:
        return []
    first = next((model.tokenizer_path for model in known.values() if model.tokenizer_path), None)
    if first is None or not (Path(first) / "tokenizer.json").is_file():
        return read_exchanges(arguments.dataset, lambda text: len(text.split()))
    tokenizer = ModelTokenizer.load(first)
    return read_exchanges(arguments.dataset, lambda text: len(tokenizer.encode(text)))


def _slos(arguments: argparse.Namespace, known: Mapping[str, Known], models: tuple[str, ...]) -> dict[str, Slo]:
    ttft_ms, tpot_ms = arguments.slo_ttft_ms, arguments.slo_tpot_ms
    for word in arguments.goodput:
        name, _, value = word.partition(":")
        if name not in ("ttft", "tpot") or not value.replace(".", "", 1).isdigit():
            raise ConfigError.single("--goodput", f"{word!r} is not ttft:MS or tpot:MS")
        ttft_ms, tpot_ms = (float(value), tpot_ms) if name == "ttft" else (ttft_ms, float(value))
    measured = None
    if arguments.slo_file is not None:
        try:
            measured = promise.read_slos(arguments.slo_file.read_bytes(), str(arguments.slo_file))
        except OSError as fault:
            raise ConfigError.single(str(arguments.slo_file), f"cannot be read: {fault.strerror or fault}") from None
    return promise.promised(
        models,
        {name: model.slo for name, model in known.items()},
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        measured=measured,
        ttft_scale=arguments.ttft_slo_scale,
        tpot_scale=arguments.tpot_slo_scale,
    )


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not low.isdigit() or not (high or low).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not A-B")
    return int(low), int(high or low)

"""`chimera models make`: small models to try things with."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from chimera.errors import ConfigError, Fault
from chimera.units import format_bytes

_PURPOSE = """\
Writes small checkpoints with tokenizer and chat template, without a download. Each takes about 11 MiB and loads in an
instant; the same seed gives the same bytes. The weights are random: their answers are gibberish, on purpose."""


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="models_verb", metavar="VERB", required=True)
    make = verbs.add_parser("make", help="write small checkpoints into a directory", description=_PURPOSE)
    make.add_argument("directory", metavar="DIR", type=Path, help="where; each model becomes a folder in it")
    make.add_argument("--seed", type=int, default=0, help="other weights and words for every number (default: 0)")
    make.add_argument("--only", metavar="NAMES", help="some of them, as in llama,qwen3 (default: all)")


def run(arguments: argparse.Namespace) -> int:
    from chimera.tiny import maker, shapes  # here, so that --help does not wait for numpy

    chosen = _chosen(arguments.only, list(shapes.MODELS))
    for name in chosen:
        model = shapes.MODELS[name]
        folder = arguments.directory / name
        parameters = maker.make(model, folder, arguments.seed)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}  {parameters / 1e6:.1f} M parameters, {format_bytes(size)}: {model.purpose}")
    return 0


def _chosen(only: str | None, known: list[str]) -> list[str]:
    if only is None:
        return known
    names = [name.strip() for name in only.split(",") if name.strip()]
    faults = [Fault("", f"there is no tiny model {name!r}", _nearest(name, known)) for name in names if name not in known]
    if not names:
        faults = [Fault("", "names no model", "they are " + ", ".join(known))]
    if faults:
        raise ConfigError("--only", faults)
    return list(dict.fromkeys(names))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "they are " + ", ".join(known)

"""Finds the verb and hands over. Only the chosen verb's module is imported, so `chimera --help` stays instant."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Container, Sequence
from types import ModuleType

import chimera
from chimera.cli import examples
from chimera.config.faults import nearest
from chimera.errors import ChimeraError, ConfigError

# verb: what it does. Each is a module of this room with `configure(parser)` and `run(arguments) -> exit status`.
VERBS = {
    "serve": "start the server on a placement file or on models",
    "check": "read a placement file and name every fault, starting nothing",
    "chat": "talk to a model of a running server",
    "ps": "the models that are up, a line each",
    "load": "bring a model up on a running server",
    "unload": "take a model down on a running server",
    "pin": "keep a model from leaving once it runs",
    "reload": "have a running server read its placement file again",
    "keys": "make an API key",
    "status": "what a running server holds and does",
    "top": "the same, live: GPUs, models and what is done with them",
    "memory": "who holds how much of each GPU",
    "explain": "why a request, a model or a moment went as it did",
    "policy": "who decides what runs where on a running server, or shall",
    "simulate": "replay a trace on paper under one policy or several",
    "plan": "how few GPUs are enough for a trace and its promises, and what they cost",
    "bench": "replay a trace on a server, compare policies and servers, and report",
    "build-images": "build the weight images of models beforehand, with a bar of bytes",
    "models": "make small models to try things with",
    "doctor": "look at this machine and say what would keep it from serving",
    "replay-decisions": "run a decision log again and compare every action",
    "completion": "what makes a shell complete chimera's words",
}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ChimeraError as fault:
        print(fault, file=sys.stderr)
        return 1
    except BrokenPipeError:  # `chimera status | head`
        return 1
    except KeyboardInterrupt:  # before the verb has its own answer to Ctrl-C, or where it needs none
        return 130


def make_parser(complete: Container[str] = VERBS) -> argparse.ArgumentParser:
    """Of the whole command line. Verbs that are not among `complete` have a name and a purpose, and no options yet."""
    parser = argparse.ArgumentParser(
        prog="chimera",
        description="Elastic sharing of GPUs among many language models, on stock SGLang.",
        epilog=examples.FIRST_STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"chimera {chimera.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, purpose in VERBS.items():
        verb_parser = verbs.add_parser(
            verb,
            help=purpose,
            description=purpose,
            epilog=examples.of(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb in complete:
            _module(verb).configure(verb_parser)
    return parser


def _run(words: list[str]) -> int:
    chosen = next((word for word in words if not word.startswith("-")), "")
    if chosen and chosen not in VERBS:
        raise ConfigError.single(
            "chimera", f"there is no verb {chosen!r}", hint=nearest(chosen, VERBS) or "`chimera --help` lists them"
        )
    arguments = make_parser({chosen}).parse_args(words)
    status: int = _module(arguments.verb).run(arguments)
    return status


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"chimera.cli.{verb.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())

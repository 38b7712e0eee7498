"""`chimera keys NAME`: makes an API key. The key is shown once; the entry that goes into the keys file has only its hash."""

from __future__ import annotations

import argparse
import sys

import msgspec

from chimera.config.keys import KeyEntry, new_key
from chimera.core.access import hash_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it is")
    parser.add_argument("--admin", action="store_true", help="it may load and unload models")
    parser.add_argument("--models", metavar="A,B", help="it may ask only these")
    parser.add_argument("--requests-per-minute", type=int, metavar="N", help="the most that it may ask")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and answers together")


def run(arguments: argparse.Namespace) -> int:
    key = new_key()
    entry = KeyEntry(
        name=arguments.name,
        hash=hash_of(key),
        models=None if arguments.models is None else tuple(arguments.models.split(",")),
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
        admin=arguments.admin,
    )
    given = {name: value for name, value in msgspec.to_builtins(entry).items() if value not in (None, False)}
    print(f"the key, shown this once: {key}", file=sys.stderr)
    print(msgspec.json.encode(given).decode())
    return 0

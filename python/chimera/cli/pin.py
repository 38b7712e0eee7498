"""`chimera pin MODEL`: a model that never leaves once it runs; `--off` lets it."""

from __future__ import annotations

import argparse

from chimera.cli.server_url import DEFAULT_URL, order


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name or alias; `chimera status` lists them")
    parser.add_argument("--off", action="store_true", help="it may leave again")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the answer as it is")


def run(arguments: argparse.Namespace) -> int:
    answer = order(arguments.url, "/models/pin", {"model": arguments.model, "pin": not arguments.off}, as_json=arguments.json)
    if not arguments.json:
        print(f"{answer['model']} {'stays' if answer['pin'] else 'may leave'}")
    return 0

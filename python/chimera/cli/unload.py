"""`chimera unload MODEL`: take a model down on a running server, after its requests or at once."""

from __future__ import annotations

import argparse
from typing import Any

from chimera.cli.server_url import DEFAULT_URL, order


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name or alias; `chimera ps` lists them")
    parser.add_argument("--copy", type=int, metavar="N", help="which copy of it (default: all)")
    parser.add_argument("--now", action="store_true", help="requests under way are served elsewhere or later")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the answer as it is")


def run(arguments: argparse.Namespace) -> int:
    body: dict[str, Any] = {"model": arguments.model}
    if arguments.copy is not None:
        body["index"] = arguments.copy
    if arguments.now:
        body["drain_s"] = 0
    answer = order(arguments.url, "/models/unload", body, as_json=arguments.json)
    if not arguments.json:
        print(f"{answer['model']} is down" if answer["stopped"] else f"{answer['model']} was down already")
    return 0

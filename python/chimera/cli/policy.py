"""`chimera policy [NAME]`: who decides what runs where on a running server; with a name, who decides from now on."""

from __future__ import annotations

import argparse
import json

from chimera.cli.server_url import DEFAULT_URL, request
from chimera.core.snapshot import POLICY_NAMES

_ANSWER_WITHIN_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", choices=POLICY_NAMES, metavar="NAME", help=f"one of {', '.join(POLICY_NAMES)}")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    method, body = ("GET", None) if arguments.name is None else ("PUT", {"policy": arguments.name})
    with request(arguments.url, method, "/policy", body, within_s=_ANSWER_WITHIN_S) as response:
        print(json.loads(response.read())["policy"])
    return 0

"""`chimera policy [NAME] [--local ORDER]`: who decides what runs where on a running server, and in which order requests go;
with names, from now on."""

from __future__ import annotations

import argparse
import json

from chimera.cli.server_url import DEFAULT_URL, request
from chimera.core.snapshot import LOCAL_NAMES, POLICY_NAMES

_ANSWER_WITHIN_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", choices=POLICY_NAMES, metavar="NAME", help=f"one of {', '.join(POLICY_NAMES)}")
    parser.add_argument("--local", choices=LOCAL_NAMES, help="in which order requests go")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    order = {"policy": arguments.name, "local": arguments.local}
    wanted = {field: name for field, name in order.items() if name is not None}
    method, body = ("PUT", wanted) if wanted else ("GET", None)
    with request(arguments.url, method, "/policy", body, within_s=_ANSWER_WITHIN_S) as response:
        told = json.loads(response.read())
    print(told["policy"], f"(requests go by {told['local']})")
    return 0

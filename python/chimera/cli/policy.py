"""`chimera policy [NAME] [--local ORDER]`: who decides what runs where on a running server, and in which order requests go;
with names, from now on."""

from __future__ import annotations

import argparse
import json
from typing import Any

from chimera.cli.server_url import DEFAULT_URL, request
from chimera.cli.status import table
from chimera.core.snapshot import LOCAL_NAMES, POLICY_NAMES

_ANSWER_WITHIN_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", choices=POLICY_NAMES, metavar="NAME", help=f"one of {', '.join(POLICY_NAMES)}")
    parser.add_argument("--local", choices=LOCAL_NAMES, help="in which order requests go")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the answer as it is")


def run(arguments: argparse.Namespace) -> int:
    order = {"policy": arguments.name, "local": arguments.local}
    wanted = {field: name for field, name in order.items() if name is not None}
    method, body = ("PUT", wanted) if wanted else ("GET", None)
    with request(arguments.url, method, "/policy", body, within_s=_ANSWER_WITHIN_S) as response:
        document = response.read()
    print(document.decode() if arguments.json else render(json.loads(document)))
    return 0


def render(told: dict[str, Any]) -> str:
    """What is in force; where that was the question, beside what else there is."""
    head = f"{told['policy']} (requests go by {told['local']})"
    if "policies" not in told:
        return head
    rows = [
        (what, ", ".join(f"[{name}]" if name == told[chosen] else name for name in told[known]))
        for what, chosen, known in (("policy", "policy", "policies"), ("local", "local", "locals"))
    ]
    return "\n\n".join([head, table(("", "THERE ARE"), rows)])

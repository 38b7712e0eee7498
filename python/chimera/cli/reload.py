"""`chimera reload`: have a running server read its placement file again, and say what was different in it."""

from __future__ import annotations

import argparse

from chimera.cli.server_url import DEFAULT_URL, order


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the answer as it is")


def run(arguments: argparse.Namespace) -> int:
    answer = order(arguments.url, "/reload", None, as_json=arguments.json)
    if not arguments.json:
        print("\n".join(answer["changes"]) or "nothing is different")
    return 0

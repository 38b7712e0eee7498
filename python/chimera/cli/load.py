"""`chimera load MODEL`: bring a model up on a running server, and say when it is."""

from __future__ import annotations

import argparse

from chimera.cli.server_url import DEFAULT_URL, order


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name or alias; `chimera status` lists them")
    parser.add_argument("--gpus", metavar="0,1", help="where; else where it stood last, or on the emptiest")
    parser.add_argument("--copy", type=int, default=0, metavar="N", help="which copy of it (default: %(default)s)")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the answer as it is")


def run(arguments: argparse.Namespace) -> int:
    gpu_ids = [] if arguments.gpus is None else arguments.gpus.split(",")
    body = {"model": arguments.model, "index": arguments.copy, "gpu_ids": [int(g) if g.isdigit() else g for g in gpu_ids]}
    answer = order(arguments.url, "/models/load", body, as_json=arguments.json)
    if not arguments.json:
        print(f"{answer['model']} is {answer['state']}: {answer['reason']}")
    return 0

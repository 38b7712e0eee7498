"""`python -m chimera.launch_multi_model_server`: the command line that Prism's scripts know, in front of `chimera serve`.

Every flag of theirs is taken. One whose meaning has gone, because the server does that always or never, says so once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from chimera.cli import serve
from chimera.core.snapshot import POLICY_NAMES
from chimera.errors import ChimeraError

# flag: (takes a value, what has become of it)
_GONE = {
    "--max-mem-usage": (True, "a GPU's memory is counted by a ledger"),
    "--max-memory-pool-size": (True, "each placement has its own max_memory_pool_size"),
    "--use-kvcached-v0": (False, "elastic memory is built in"),
    "--use-emm-v0": (False, "elastic memory is built in"),
    "--enable-controller": (False, "there is always one"),
    "--enable-gpu-scheduler": (False, "there is always one for each GPU"),
    "--abort-exceed-slos": (False, "each model's slo says what is done"),
    "--disable-cuda-graph": (False, "graphs work with elastic memory; engine_args can turn them off"),
    "--disable-radix-cache": (False, "the radix cache works with elastic memory; engine_args can turn it off"),
    "--load-format": (True, "engine_args has it, model by model"),
}
# flag: whether it takes a value. `chimera serve` has them by the same names.
_SAME = {
    "--enable-cpu-share-memory": False,
    "--enable-worker-pool": False,
    "--workers-per-gpu": True,
    "--enable-model-service": False,
    "--num-model-service-workers": True,
    "--async-loading": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    for flag in _GONE:
        if getattr(arguments, _attribute(flag)) not in (None, False):
            print(f"{flag} has no effect: {_GONE[flag][1]}", file=sys.stderr)
    try:
        return serve.run(_translated(arguments))
    except ChimeraError as fault:
        print(fault, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there is a server to stop
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m chimera.launch_multi_model_server", description=__doc__)
    parser.add_argument("--model-config-file", required=True, metavar="FILE", help="the placement file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--num-gpus", type=int, metavar="N", help="use the first N GPUs (virtual ones where there are none)")
    parser.add_argument(
        "--enable-elastic-memory", action="store_true", help="pools share what is free; without it they are reserved"
    )
    parser.add_argument("--policy", choices=POLICY_NAMES, help="who decides what runs where")
    parser.add_argument("--log-file", type=Path, metavar="FILE", help="keep the logs, in the folder FILE without its suffix")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    parser.add_argument("--engine", choices=("sglang", "simulated"), default="sglang")
    parser.add_argument("--virtual-gpus", metavar="8x2GiB", help="memory budgets of this host that stand in for GPUs")
    for flag, takes_value in _SAME.items():
        _add(parser, flag, takes_value, "as of chimera serve")
    parser.add_argument("--keys", metavar="FILE", help="who may ask for what; `chimera keys` makes entries")
    parser.add_argument("--open", action="store_true", help="let in whoever reaches the address, without a key")
    for flag, (takes_value, why) in _GONE.items():
        _add(parser, flag, takes_value, f"no effect: {why}")
    return parser


def _add(parser: argparse.ArgumentParser, flag: str, takes_value: bool, help_text: str) -> None:
    if takes_value:
        parser.add_argument(flag, dest=_attribute(flag), metavar="VALUE", help=help_text)
    else:
        parser.add_argument(flag, dest=_attribute(flag), action="store_true", help=help_text)


def _translated(arguments: argparse.Namespace) -> argparse.Namespace:
    """The same wish in the words of `chimera serve`."""
    words = [arguments.model_config_file, "--host", arguments.host, "--port", str(arguments.port)]
    words += ["--engine", arguments.engine, "--log-level", arguments.log_level]
    if not arguments.enable_elastic_memory:
        words.append("--static")
    if arguments.virtual_gpus is not None:
        words += ["--virtual-gpus", arguments.virtual_gpus]
    if arguments.policy is not None:
        words += ["--policy", arguments.policy]
    if arguments.num_gpus is not None:
        words += ["--num-gpus", str(arguments.num_gpus)]
    if arguments.log_file is not None:
        words += ["--log-dir", str(arguments.log_file.with_suffix(""))]
    for flag, takes_value in _SAME.items():
        value = getattr(arguments, _attribute(flag))
        if value not in (None, False):
            words += [flag, value] if takes_value else [flag]
    if arguments.keys is not None:
        words += ["--keys", arguments.keys]
    if arguments.open:
        words.append("--open")
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    return parser.parse_args(words)


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


if __name__ == "__main__":
    sys.exit(main())

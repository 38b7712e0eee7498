"""The flags about workers: how many are kept ready, what is built beforehand, what stays of models that have left.

A flag that was written and can do nothing here says so, once; it is no fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from chimera.errors import ConfigError
from chimera.units import parse_bytes, parse_seconds


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--enable-worker-pool",
        action=argparse.BooleanOptionalAction,
        help="keep EMPTY workers ready, so that no model waits for a new process (default: no)",
    )
    parser.add_argument(
        "--watchdog-timeout",
        metavar="5m",
        default="5m",
        help="a worker whose step takes longer hangs, and is replaced (default: %(default)s)",
    )
    parser.add_argument("--workers-per-gpu", type=int, metavar="N", help="so many of them (default: 1)")
    parser.add_argument(
        "--enable-model-service",
        action=argparse.BooleanOptionalAction,
        help="with shared weights, build those of models that are off while the others serve (default: where that is possible)",
    )
    parser.add_argument("--num-model-service-workers", type=int, metavar="N", help="so many at a time (default: 1)")
    parser.add_argument(
        "--parked-models",
        type=int,
        metavar="N",
        help="models that have left a worker and stay there without their memory, to return at once (default: 2)",
    )
    parser.add_argument(
        "--parked-bytes", metavar="SIZE", help="how much of a GPU they may keep in each worker (default: by their number)"
    )
    parser.add_argument(
        "--host-kv", metavar="SIZE", help="keep so much of their caches in host memory, for each worker (default: none)"
    )


class Workers:
    """What is asked for, where weights are shared or not, and images can be built beside those that serve or not."""

    def __init__(self, arguments: argparse.Namespace, *, shares: bool, virtual: bool, gpus: int) -> None:
        self.spare = (arguments.workers_per_gpu or 1) * gpus if arguments.enable_worker_pool else 0
        # On a real GPU an image is built in the memory of that GPU, which nobody has set aside for it before an activation.
        self.beforehand = arguments.enable_model_service is not False and shares and virtual
        self.at_once = arguments.num_model_service_workers or 1
        parks = shares and not arguments.static
        self.parked_models = (2 if arguments.parked_models is None else arguments.parked_models) if parks else 0
        self.parked_bytes = _bytes("--parked-bytes", arguments.parked_bytes)
        self.host_kv_bytes = (_bytes("--host-kv", arguments.host_kv) or 0) if self.parked_models else 0
        self.silent_s = _silent_s(arguments.watchdog_timeout)
        self._arguments = arguments
        self._why_not_beforehand = "an image is built in a GPU's own memory" if shares else "weights are not shared"
        self._parks = parks

    def tell_what_is_idle(self, say: Callable[[str], None]) -> None:
        arguments = self._arguments
        if arguments.workers_per_gpu is not None and not arguments.enable_worker_pool:
            say("--workers-per-gpu has no effect without --enable-worker-pool")
        if not self.beforehand:
            off = "it is switched off" if arguments.enable_model_service is False else self._why_not_beforehand
            if arguments.enable_model_service:
                say(f"--enable-model-service has no effect: {off}")
            if arguments.num_model_service_workers is not None:
                say(f"--num-model-service-workers has no effect: {off}")
        if not self._parks and (arguments.parked_models or arguments.parked_bytes is not None):
            why = "fixed pools stay with their models" if arguments.static else "weights are not shared"
            say(f"--parked-models and --parked-bytes have no effect: {why}")
        if arguments.host_kv is not None and not self.parked_models:
            say("--host-kv has no effect: no model stays parked")


def require_sensible(arguments: argparse.Namespace) -> None:
    for flag, least in (("--workers-per-gpu", 1), ("--num-model-service-workers", 1), ("--parked-models", 0)):
        count = getattr(arguments, flag[2:].replace("-", "_"))
        if count is not None and not least <= count <= 64:
            raise ConfigError.single(flag, f"{count}: {least} to 64 are possible")
    _bytes("--parked-bytes", arguments.parked_bytes)
    _bytes("--host-kv", arguments.host_kv)
    _silent_s(arguments.watchdog_timeout)


def _bytes(flag: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as fault:
        raise ConfigError.single(flag, str(fault)) from None


def _silent_s(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError as fault:
        raise ConfigError.single("--watchdog-timeout", str(fault)) from None
    if not seconds > 0:
        raise ConfigError.single("--watchdog-timeout", f"{text}: it has to be above zero")
    return seconds

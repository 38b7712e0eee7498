"""`python -m chimera.control`: control's process, from its arguments to its exit status."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from chimera.control.charge import Charge
from chimera.control.exchange import Exchange
from chimera.wire import process


def main() -> int:
    parser = argparse.ArgumentParser(prog="chimera.control", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the sockets are")
    parser.add_argument("--deployment", type=Path, required=True, help="the models and where they are wanted, as JSON")
    parser.add_argument("--decisions", type=Path, help="append every decision to this file")
    parser.add_argument("--log-level", default="info")
    arguments = parser.parse_args()
    process.start_logging("control", arguments.log_level)
    charge = Charge.read(arguments.deployment)

    async def live(stop: asyncio.Event) -> None:
        exchange = Exchange(models=charge.models, wanted=charge.wanted, socket=arguments.run_dir / "control.sock")
        await exchange.start()
        await stop.wait()
        await exchange.stop()

    return process.run(live)


if __name__ == "__main__":
    sys.exit(main())

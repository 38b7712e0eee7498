"""`python -m chimera.control`: control's process, from its arguments to its exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chimera.control.charge import Charge
from chimera.control.exchange import Exchange
from chimera.control.witness import Witness
from chimera.records.keeper import Keeper
from chimera.units import MIB
from chimera.wire import process

if TYPE_CHECKING:
    from chimera.spans.decisions import DecisionSpans

DAY_S = 86_400.0
LAST_OUT_S = 60.0
"""How long the others, told to drain as well, may take to be gone."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="chimera.control", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the sockets are")
    parser.add_argument("--deployment", type=Path, required=True, help="the models and where they are wanted, as JSON")
    parser.add_argument("--decisions", type=Path, help="write every decision to this file")
    parser.add_argument("--records", type=Path, help="keep what happens to requests and replicas in this file")
    parser.add_argument("--records-bytes", type=int, default=256 * MIB, help="the most that file may hold")
    parser.add_argument("--records-days", type=float, default=7.0, help="how long what it holds is kept")
    parser.add_argument("--traces", metavar="EXPORTER", help="send spans of decisions by this exporter of OpenTelemetry's")
    parser.add_argument("--no-metrics", action="store_true", help="count nothing and keep no records")
    parser.add_argument("--log-level", default="info")
    arguments = parser.parse_args()
    process.start_logging("control", arguments.log_level)
    charge = Charge.read(arguments.deployment)

    witness = None if arguments.no_metrics else Witness(_keeper(arguments))
    spans = None if arguments.traces is None else _spans(arguments.traces)
    decisions = None if arguments.decisions is None else process.fresh_log(arguments.decisions)

    def charge_of(exchange: Exchange) -> Charge:
        """What the next control begins with, should this one die: what the operator has said meanwhile included."""
        scheduler = exchange.scheduler
        return msgspec.structs.replace(
            charge, models=exchange.models, wanted=scheduler.filed, policy=scheduler.policy, local=scheduler.fleet.local_asked
        )

    async def live(stop: asyncio.Event) -> None:
        exchange = Exchange(
            models=charge.models,
            wanted=charge.wanted,
            policy=charge.policy,
            local=charge.local,
            costs=charge.costs,
            warm=charge.warm,
            socket=arguments.run_dir / "control.sock",
            decisions=decisions,
            witness=witness,
            spans=spans,
            on_change=lambda: charge_of(exchange).write(arguments.deployment),
        )
        starter = os.getppid()
        await exchange.start()
        await stop.wait()
        orphaned = os.getppid() != starter
        if orphaned:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(exchange.wait_until_alone(), LAST_OUT_S)
        await exchange.stop()
        if orphaned:  # whoever made the directory was killed; the last one out removes it
            shutil.rmtree(arguments.run_dir, ignore_errors=True)

    status = process.run(live)
    if spans is not None:
        spans.close()
    return status


def _spans(exporter: str) -> DecisionSpans:
    from chimera.spans.decisions import DecisionSpans  # of an extra, and slow to import
    from chimera.spans.spans import exported

    return DecisionSpans(exported("control", exporter))


def _keeper(arguments: argparse.Namespace) -> Keeper | None:
    if arguments.records is None:
        return None
    return Keeper(arguments.records, limit_bytes=arguments.records_bytes, keep_s=arguments.records_days * DAY_S)


if __name__ == "__main__":
    sys.exit(main())

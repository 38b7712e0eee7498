"""`python -m chimera.agent`: one agent's process, from its arguments to its exit status."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chimera.agent.agent import DRAIN_S, Agent
from chimera.agent.watchdog import SILENT_S
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.sched.cost import CostTable
from chimera.wire import process

if TYPE_CHECKING:
    from chimera.spans.tries import TrySpans


def main() -> int:
    parser = argparse.ArgumentParser(prog="chimera.agent", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the sockets are")
    parser.add_argument("--name", default="local", help="unique among the agents of one control")
    parser.add_argument("--gpus", type=Path, required=True, help="the node's GPUs, as JSON")
    parser.add_argument(
        "--drain-s", type=float, default=DRAIN_S, help="how long requests may take to end when it is told to stop"
    )
    parser.add_argument("--costs", type=Path, metavar="FILE", help="what work costs here, as JSON")
    parser.add_argument("--elastic", action="store_true", help="replicas share what a GPU has beside their weights")
    parser.add_argument("--spare-workers", type=int, default=0, metavar="N", help="keep so many EMPTY workers ready")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="models, as JSON, to prepare while nothing is loading")
    parser.add_argument("--prepare-at-once", type=int, default=1, metavar="N", help="so many of them at a time")
    parser.add_argument("--silent-s", type=float, default=SILENT_S, help="a worker whose step takes longer is killed")
    parser.add_argument("--decisions", type=Path, help="write every decision to this file")
    parser.add_argument("--traces", metavar="EXPORTER", help="send a span of each try by this exporter of OpenTelemetry's")
    parser.add_argument("--log-level", default="info")
    arguments = parser.parse_args()
    process.start_logging(f"agent/{arguments.name}", arguments.log_level)
    gpus = msgspec.json.decode(arguments.gpus.read_bytes(), type=tuple[Gpu, ...])
    costs = None if arguments.costs is None else msgspec.json.decode(arguments.costs.read_bytes(), type=CostTable | None)
    prepare: tuple[ModelSpec, ...] = ()
    if arguments.prepare is not None:
        prepare = msgspec.json.decode(arguments.prepare.read_bytes(), type=tuple[ModelSpec, ...])
    decisions = None if arguments.decisions is None else process.fresh_log(arguments.decisions)

    spans = None if arguments.traces is None else _spans(arguments.name, arguments.traces)

    async def live(stop: asyncio.Event) -> None:
        agent = Agent(
            name=arguments.name,
            agent_start=time.time_ns(),
            gpus=gpus,
            run_dir=arguments.run_dir,
            elastic=arguments.elastic,
            spare_workers=arguments.spare_workers,
            prepare=prepare,
            prepare_at_once=arguments.prepare_at_once,
            costs=costs,
            decisions=decisions,
            spans=spans,
            silent_s=arguments.silent_s,
        )
        await agent.start()
        await stop.wait()
        await agent.stop(arguments.drain_s)

    status = process.run(live)
    if spans is not None:
        spans.close()
    return status


def _spans(name: str, exporter: str) -> TrySpans:
    from chimera.spans.spans import exported  # of an extra, and slow to import
    from chimera.spans.tries import TrySpans

    return TrySpans(exported(f"agent-{name}", exporter))


if __name__ == "__main__":
    sys.exit(main())

"""`chimera serve FILE | MODEL…`: reads what is asked for and hands it to the supervisor."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import msgspec

from chimera.cli import costs, door, images, keeping, workers
from chimera.cli.filing import Filing, roots_of
from chimera.cli.service import Service
from chimera.cli.supervisor import Supervisor
from chimera.config.deployment import Deployment, deployment_of_models, load_placement
from chimera.config.nvml import read_nvml
from chimera.config.virtual_gpus import PAGE_BYTES, default_virtual_gpus, parse_virtual_gpus
from chimera.core.gpu import Gpu
from chimera.core.snapshot import LOCAL_NAMES, POLICY_NAMES
from chimera.errors import ConfigError
from chimera.sched.policies.policy import WarmRules
from chimera.units import parse_seconds

PLACEMENT_FILES = (".json", ".yaml", ".yml")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="+", metavar="FILE|MODEL", help="one placement file (JSON, YAML), or models: folders, hub ids"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes one that is free (default: %(default)s)")
    parser.add_argument("--virtual-gpus", metavar="8x2GiB", help="memory budgets of this host that stand in for GPUs")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="use the first N GPUs (virtual ones where there are none)")
    policies = f"who decides what runs where: {', '.join(POLICY_NAMES)} (default: the file's, or static)"
    parser.add_argument("--policy", choices=POLICY_NAMES, metavar="NAME", help=policies)
    parser.add_argument(
        "--local", choices=LOCAL_NAMES, help="in which order requests go (default: the file's, or goodput, which is ours)"
    )
    parser.add_argument("--costs", metavar="TABLE", help="what work costs here, for policies (default: by the kind of machine)")
    parser.add_argument("--static", action="store_true", help="KV pools are reserved, so their sums have to fit")
    parser.add_argument("--engine", choices=("sglang", "simulated"), default="sglang", help="default: %(default)s")
    parser.add_argument("--fronts", type=int, default=1, help="front-end processes that share the port (default: %(default)s)")
    parser.add_argument("--drain", metavar="30s", default="30s", help="how long open answers may go on after Ctrl-C")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    parser.add_argument("--log-dir", type=Path, help="keep a log of each process, and every decision, in this folder")
    keeping.configure(parser)
    parser.add_argument("--run-dir", type=Path, help="where the sockets go (default: a new private folder)")
    parser.add_argument(
        "--model-root",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="where models may lie that are registered over HTTP (default: beside those it starts with)",
    )
    parser.add_argument(
        "--async-loading", action="store_true", help="say where it listens as soon as it does; requests wait for their models"
    )
    workers.configure(parser)
    images.configure(parser)
    door.configure(parser)


def run(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.fronts <= 64:
        raise ConfigError.single("--fronts", f"{arguments.fronts} front-ends: 1 to 64 are possible")
    workers.require_sensible(arguments)
    door.access_of(arguments)  # a fault in it is told before models are looked at
    deployment = deployment_of(arguments)
    _make_log_dir(arguments.log_dir)
    with images.images_of(arguments, deployment.models, _say) as shared:
        return asyncio.run(_supervise(_service(arguments, deployment, shared)))


def _service(arguments: argparse.Namespace, deployment: Deployment, shared: images.Images | None) -> Service:
    seated = {seat.replica.model for seat in deployment.placement.seats}
    policy, local = arguments.policy or deployment.policy or "static", arguments.local or deployment.local
    file = _placement_file(arguments)
    virtual = all(gpu.virtual for gpu in deployment.gpus)
    settled = {
        "policy": arguments.policy is not None,
        "local": arguments.local is not None,
        "filed_gpus": not virtual or bool(arguments.virtual_gpus) or arguments.num_gpus is not None,
    }
    asked = workers.Workers(arguments, shares=shared is not None, virtual=virtual, gpus=len(deployment.gpus))
    asked.tell_what_is_idle(_say)
    filing = Filing(
        in_force=msgspec.structs.replace(deployment, policy=policy, local=local),
        file=file,
        elastic=not arguments.static,
        roots=roots_of(arguments.model_root, file, deployment),
        flags=frozenset(name for name, flagged in settled.items() if flagged),
        beforehand=asked.beforehand,
    )
    return Service(
        models=deployment.models,
        wanted=deployment.placement,
        gpus=deployment.gpus,
        policy=policy,
        local=local,
        warm=_warm_rules(deployment),
        costs=costs.table_named(arguments.costs or _kind_of(deployment)),
        engine=arguments.engine,
        elastic=not arguments.static,
        host=arguments.host,
        port=arguments.port,
        fronts=arguments.fronts,
        drain_s=_seconds(arguments.drain),
        log_level=arguments.log_level,
        log_dir=arguments.log_dir,
        run_dir=arguments.run_dir,
        keeping=keeping.of(arguments),
        images=shared,
        async_loading=arguments.async_loading,
        filing=filing,
        access=door.access_of(arguments),
        parked_models=asked.parked_models,
        parked_bytes=asked.parked_bytes,
        host_kv_bytes=asked.host_kv_bytes,
        spare_workers=asked.spare,
        prepare_at_once=asked.at_once,
        silent_s=asked.silent_s,
        prepare=tuple(model for model in deployment.models if asked.beforehand and model.name not in seated),
    )


def _warm_rules(deployment: Deployment) -> WarmRules:
    warm = deployment.warm
    most_bytes = None if warm.max_memory is None else round(warm.max_memory * 10**9)
    return WarmRules(order=warm.order, most_models=warm.max_models, most_bytes=most_bytes)


def _kind_of(deployment: Deployment) -> str:
    return "cpu" if all(gpu.virtual for gpu in deployment.gpus) else "h100-80g-like"


async def _supervise(service: Service) -> int:
    return await Supervisor(service, _say).run()


def _say(line: str) -> None:
    print(f"chimera: {line}", flush=True)


def deployment_of(arguments: argparse.Namespace) -> Deployment:
    gpus = _gpus(arguments)
    file = _placement_file(arguments)
    if file is None:
        return deployment_of_models(arguments.what, gpus)
    if len(arguments.what) > 1:
        raise ConfigError.single("serve", f"one placement file, or models; not {file} and {arguments.what[1]}")
    return load_placement(file, gpus, elastic=not arguments.static)


def _placement_file(arguments: argparse.Namespace) -> Path | None:
    first = Path(arguments.what[0])
    return first if first.suffix.lower() in PLACEMENT_FILES and not first.is_dir() else None


def _gpus(arguments: argparse.Namespace) -> tuple[Gpu, ...] | None:
    """The GPUs to serve on; `None` leaves it to the placement file on a machine that has none."""
    count: int | None = arguments.num_gpus
    if count is not None and count < 1:
        raise ConfigError.single("--num-gpus", f"{count} GPUs: there must be one at least")
    if arguments.virtual_gpus:
        gpus: tuple[Gpu, ...] = parse_virtual_gpus(arguments.virtual_gpus, source="--virtual-gpus")
    else:
        gpus = _real_gpus()
    if not gpus:
        return None if count is None else default_virtual_gpus(count)
    if count is not None and count > len(gpus):
        raise ConfigError.single("--num-gpus", f"{count} GPUs: there are {len(gpus)}")
    return gpus[:count]


def _real_gpus() -> tuple[Gpu, ...]:
    return tuple(
        Gpu(gpu_id=gpu.index, capacity_bytes=gpu.total_bytes // PAGE_BYTES * PAGE_BYTES, page_bytes=PAGE_BYTES, name=gpu.name)
        for gpu in read_nvml().gpus
    )


def _make_log_dir(folder: Path | None) -> None:
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError.single("--log-dir", f"{folder}: {fault.strerror}") from None


def _seconds(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as fault:
        raise ConfigError.single("--drain", str(fault)) from None

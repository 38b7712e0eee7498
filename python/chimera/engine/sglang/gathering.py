"""Where the processes of a gang find each other: one process group, whatever SGLang asks for, and no network.

SGLang makes nine groups of two kinds for every model. A gloo group keeps a thread that wakes a hundred times a second, so all
of SGLang's gloo groups with the same members are one here, and those of one member are nobody's (`solitude.py`); SGLang uses
them from one thread, so nothing can get mixed up. Other kinds, NCCL's, stay as SGLang makes them. The ranks meet in a file
instead of at a port, and gloo connects them over the loopback device alone: they share a machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

from chimera.msg.actions import Place

_FOR_EVER = timedelta(days=3650)
"""A rank waits for the next step in a broadcast, and an idle model may have none for days. A lost one's connections close."""


@contextlib.contextmanager
def gathered(place: Place, size: int) -> Iterator[None]:
    """Groups made in here are of the gang whose rank `place` is."""
    init_process_group, new_group = torch.distributed.init_process_group, torch.distributed.new_group
    made: dict[tuple[int, ...], Any] = {}

    def init_gathered(backend: str, *, world_size: int, rank: int, pg_options: Any = None, **_: Any) -> None:
        assert (world_size, rank) == (size, place.rank), f"rank {rank} of {world_size} is not rank {place.rank} of {size}"
        store = torch.distributed.FileStore(place.meeting, size)
        init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_FOR_EVER, pg_options=pg_options)
        if backend == "gloo":
            made[tuple(range(size))] = torch.distributed.group.WORLD

    def new_gathered(ranks: list[int] | None = None, backend: str | None = None, **named: Any) -> Any:
        members = tuple(range(size) if ranks is None else ranks)
        if len(members) == 1:
            return new_group(members, backend="fake")
        if backend != "gloo":
            return new_group(ranks, backend=backend, **named)
        if members not in made:
            made[members] = new_group(ranks, backend=backend, **(named | {"timeout": _FOR_EVER}))
        return made[members]

    with _standing_in(init_process_group=init_gathered, new_group=new_gathered), _environment(_settings(size)):
        yield


@contextlib.contextmanager
def parted() -> Iterator[None]:
    """What was several groups to SGLang is destroyed once."""
    destroy_process_group = torch.distributed.destroy_process_group

    def destroy_once(group: Any = None) -> None:
        if group is None or group in distributed_c10d._world.pg_map:
            destroy_process_group(group)

    with _standing_in(destroy_process_group=destroy_once):
        yield


def _settings(size: int) -> dict[str, str]:
    """Loopback for gloo; and each rank's share of the cores, which SGLang only knows to give by NUMA node."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank * len(cores) // size : (rank + 1) * len(cores) // size] or cores for rank in range(size)]
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in shares),
        # Megabytes of shared memory for a queue that a gang over one mailbox does not use.
        "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "false",
    }


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """These variables too, where nobody has set them otherwise."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _standing_in(**stand_ins: Any) -> Iterator[None]:
    real = {name: getattr(torch.distributed, name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(torch.distributed, name, stand_in)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(torch.distributed, name, function)

"""Where the supported releases of SGLang differ in how a scheduler is told who it is. One branch each; nothing else differs by
release in this package without saying so here."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from sglang.srt import runtime_context

S = TypeVar("S")


def build(scheduler: type[S], arguments: Any, ports: Any, device: int, rank: int) -> S:
    """The scheduler of one tensor-parallel rank."""
    publish = getattr(runtime_context, "publish", None)
    if publish is None:  # up to 0.5.16: settings are a global of their own module
        from sglang.srt.server_args import set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(arguments)
    elif "ranks" in inspect.signature(publish).parameters:  # 0.5.23: ranks are part of the settings
        publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=device))
        return scheduler(arguments, ports)  # type: ignore[call-arg]
    else:
        publish(arguments, role="scheduler")
    return scheduler(arguments, ports, device, rank, 0, 0, 0, 0, None)  # type: ignore[call-arg]

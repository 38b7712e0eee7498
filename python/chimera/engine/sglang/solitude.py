"""A process group of one, without the network.

SGLang makes nine process groups for every model, also when the world is one process. With gloo each keeps a thread that
wakes a hundred times a second, and the rendezvous needs a port: eighteen idle models took 14 % of a core. With one member
every collective is the identity, which is just what torch's `fake` backend does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Groups made in here, of a world of one, talk to nobody. A larger world is none of this module's business."""
    init_process_group, new_group = torch.distributed.init_process_group, torch.distributed.new_group

    def init_alone(*args: Any, world_size: int = -1, **kwargs: Any) -> None:
        assert world_size == 1, f"a world of {world_size} is not alone"
        init_process_group(backend="fake", store=FakeStore(), rank=0, world_size=1)

    def new_alone(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    def nobody_to_wait_for(*args: Any, **kwargs: Any) -> None:
        """In place of `monitored_barrier`, which only gloo has."""

    stand_ins = {"init_process_group": init_alone, "new_group": new_alone, "monitored_barrier": nobody_to_wait_for}
    real = {name: getattr(torch.distributed, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(torch.distributed, name, stand_in)
        yield
    finally:
        for name, function in real.items():
            setattr(torch.distributed, name, function)

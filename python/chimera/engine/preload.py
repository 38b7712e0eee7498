"""Everything slow about an engine that does not depend on a model, done once in the process that workers fork from."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

from chimera.engine.api import NO_PARKING, CannotServe, Engine, Parking
from chimera.weights.store import WeightStore

log = logging.getLogger(__name__)

NAMES = ("sglang", "simulated")


def preload(name: str, images: WeightStore | None = None, parking: Parking = NO_PARKING) -> Callable[[], Engine]:
    """Import engine `name`; returns how a forked worker makes its own. Must not touch a device: forks could not use it.

    With `images`, weights come from there where the engine has any, and models that leave are parked as `parking` says.
    """
    make: Callable[[], Engine]
    match name:
        case "simulated":
            from chimera.engine.simulated import SimulatedEngine as make
        case "sglang":
            make = _preload_sglang(images, parking)
        case _:
            raise CannotServe(f"there is no engine called {name!r}; there are {', '.join(NAMES)}", permanent=True)
    # What is imported now is never garbage: children neither scan it nor unshare its pages by scanning.
    gc.collect()
    gc.freeze()
    return make


def _preload_sglang(images: WeightStore | None, parking: Parking) -> Callable[[], Engine]:
    from chimera import standins
    from chimera.engine.sglang import versions

    versions.require_supported()
    _hush_sglang()
    standins.install()
    import torch

    if not torch.accelerator.is_available():
        # Many workers share few cores; a pool of threads each would only take turns. Set before the first operation,
        # so that no thread exists when workers are forked.
        torch.set_num_threads(1)
        # What little SGLang compiles would take a C++ compiler half a minute, in each worker.
        torch.compiler.set_stance("force_eager")
    import sglang.srt.models.registry  # noqa: F401 - imports every architecture
    from sglang.srt.model_loader import weight_utils
    from sglang.srt.plugins import load_plugins

    from chimera.engine.sglang import plugin
    from chimera.engine.sglang.engine import SglangEngine
    from chimera.engine.sglang.once import ask_once
    from chimera.engine.sglang.warm import WarmEngine

    weight_utils.tqdm = _without_bar(weight_utils.tqdm)
    load_plugins()
    ask_once()
    plugin.activate()
    if torch.cuda.is_initialized():
        raise CannotServe("importing SGLang has initialised CUDA, and a forked worker could not use it", permanent=True)
    if threading.active_count() > 1:
        log.warning("threads alive before the first fork: %s", ", ".join(t.name for t in threading.enumerate()))
    return SglangEngine if images is None else lambda: WarmEngine(SglangEngine(), images, parking)


def _hush_sglang() -> None:
    """SGLang tells of every kernel and architecture that a machine misses: errors will do."""
    warnings.filterwarnings("ignore", module=r"sglang\.|torch\.")
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("sglang").setLevel(logging.ERROR)


def _without_bar(tqdm: type) -> type:
    """A worker's standard error is a log: no place for a bar of a fraction of a second for every file."""

    class NoBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return NoBar

"""`chimera build-images FILE | MODEL…`: builds the weight images of models beforehand, with a bar of bytes; serves nothing."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TextIO

from chimera.cli.serve import deployment_of
from chimera.errors import ChimeraError, ConfigError
from chimera.units import format_bytes

_WIDTH = 30
_REDRAW_S = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="+", metavar="FILE|MODEL", help="one placement file, or models: folders, hub ids")
    parser.add_argument("--image-dir", type=Path, required=True, help="where they go; `chimera serve --image-dir` finds them")
    parser.add_argument("--cpu-share-memory", metavar="SIZE", help="how much they may take: 64GiB (default: what is free)")
    parser.set_defaults(num_gpus=None, virtual_gpus="1x1TiB", static=False)


def run(arguments: argparse.Namespace) -> int:
    from chimera.cli.images import budget_of
    from chimera.engine.preload import preload
    from chimera.weights.store import WeightStore

    models = deployment_of(arguments).models
    budget_bytes = budget_of(arguments.cpu_share_memory)
    try:
        arguments.image_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError.single("--image-dir", f"{arguments.image_dir}: {fault.strerror}") from None
    engine = preload("sglang", WeightStore(arguments.image_dir.absolute(), budget_bytes))()
    from chimera.engine.sglang.warm import WarmEngine  # now that SGLang is there as it should be

    assert isinstance(engine, WarmEngine), "with a store it is"
    failed = 0
    for model in models:
        bar = Bar(model.name, model.weight_bytes, sys.stderr)
        engine.watch(bar.advance)
        try:
            nbytes = engine.prepare(model, gpu_ids=(0,))
        except ChimeraError as fault:
            bar.end(f"refused: {fault}")
            failed += 1
        else:
            bar.end(f"{format_bytes(nbytes)} in its image" if nbytes else "loads from its files each time")
    return 1 if failed else 0


class Bar:
    """One line for one model: what is done with its bytes, how far it is, how fast. Redrawn on a terminal only."""

    def __init__(self, name: str, total_bytes: int, to: TextIO) -> None:
        self._name = name
        self._total_bytes = max(1, total_bytes)
        self._to = to
        self._doing = ""
        self._done_bytes = 0
        self._began_s = self._since_s = time.monotonic()
        self._drawn_s = 0.0

    def advance(self, doing: str, nbytes: int) -> None:
        """`nbytes` more of them are read, copied."""
        now = time.monotonic()
        if doing != self._doing:
            self._doing, self._done_bytes, self._since_s, self._drawn_s = doing, 0, now, 0.0
        self._done_bytes += nbytes
        if self._to.isatty() and now - self._drawn_s >= _REDRAW_S:
            self._drawn_s = now
            print(f"\r\x1b[K{self.line(now)}", end="", file=self._to, flush=True)

    def line(self, now: float) -> str:
        # An image has more than its files (rotary tables), and a quantised one less.
        part = min(1.0, self._done_bytes / self._total_bytes)
        full = "█" * round(part * _WIDTH)
        speed = format_bytes(self._done_bytes / max(1e-3, now - self._since_s))
        done, total = format_bytes(self._done_bytes), format_bytes(self._total_bytes)
        return f"{self._name} {self._doing} {full:░<{_WIDTH}} {part:4.0%} {done} of {total}, {speed}/s"

    def end(self, what: str) -> None:
        start = "\r\x1b[K" if self._to.isatty() else ""
        print(f"{start}{self._name}: {what} ({time.monotonic() - self._began_s:.1f} s)", file=self._to, flush=True)

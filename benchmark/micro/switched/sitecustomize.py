"""A switch for a benchmark, in processes that run with this folder on their path: SIGUSR2 has a front-end and control count
and tell nothing from now on, as with `--no-metrics`, and SIGUSR1 has them begin again.

Two servers that differ in nothing run up to a tenth unlike, by how their memory happens to lie; one server with a switch is
compared with itself. Each turn is acknowledged by a line on a file that the environment names. (What stays on is the count
of answers by HTTP status.)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

switched: list[Callable[[bool], None]] = []


def remember(kind: Any, *places: str) -> None:
    """What an instance of `kind` has in these places is taken away, and given back."""
    make = kind.__init__

    def making(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        had = {place: getattr(self, place) for place in places}

        def switch(on: bool) -> None:
            for place, what in had.items():
                setattr(self, place, what if on else None)

        switched.append(switch)

    kind.__init__ = making


def turn(on: bool, number: int, frame: object) -> None:
    for switch in switched:
        switch(on)
    with Path(os.environ["CHIMERA_SWITCHED"]).open("a") as acknowledged:
        acknowledged.write(f"{os.getpid()} {'on' if on else 'off'}\n")


if "chimera.server" in sys.orig_argv:
    from chimera.server.app import App
    from chimera.server.desk import Desk

    remember(App, "_account")
    remember(Desk, "_count")
elif "chimera.control" in sys.orig_argv:
    from chimera.control.exchange import Exchange

    remember(Exchange, "_witness")
if {"chimera.server", "chimera.control"} & set(sys.orig_argv):
    signal.signal(signal.SIGUSR1, partial(turn, True))
    signal.signal(signal.SIGUSR2, partial(turn, False))

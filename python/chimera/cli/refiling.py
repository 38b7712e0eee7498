"""Carries out the order to read the operator's files again: reads them aside, tells control the difference, and answers.

One order at a time, in the order in which they came. Knows no HTTP and decides nothing; whoever ordered it over HTTP is
answered through control, whoever sent a signal on the server's own output, and there everybody's is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from chimera.cli.filing import Filing
from chimera.config.change import Change
from chimera.errors import ConfigError
from chimera.msg.events import PlacementChanged, PolicyChosen
from chimera.msg.stream import EntryFiled, Prepare, Refiled, ReloadWanted
from chimera.wire.link import Link

Order = ReloadWanted | EntryFiled | None
"""The last for a signal."""


class Refiling:
    def __init__(self, filing: Filing | None, control: Link, say: Callable[[str], None]) -> None:
        self._filing = filing
        self._control = control
        self._say = say
        self._turn = asyncio.Lock()
        self._at_work: set[asyncio.Task[None]] = set()

    def order(self, order: Order) -> None:
        task = asyncio.create_task(self._obey(order))
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)

    async def close(self) -> None:
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    async def _obey(self, order: Order) -> None:
        async with self._turn:
            try:
                change = await self._carry_out(order)
            except ConfigError as refusal:
                self._say(f"{_called(order)}: nothing is changed\n{refusal}")
                self._answer(order, faults=[str(fault) for fault in refusal.faults])
                return
        told = "; ".join(change.words) or "nothing is different"
        self._say(f"{_called(order)}: {told}")
        self._answer(order, changes=change.words)

    async def _carry_out(self, order: Order) -> Change:
        filing = self._filing
        if filing is None:
            raise ConfigError.single("reload", "whoever started the server keeps no files for it")
        if isinstance(order, EntryFiled):
            change = await asyncio.to_thread(filing.admit, order.entry)
            self._tell_control(filing, change, "the operator registered it")
            return change
        fresh, change = await asyncio.to_thread(filing.read_again)
        self._tell_control(filing, change, "the placement file has changed")
        filing.in_force = fresh
        return change

    def _tell_control(self, filing: Filing, change: Change, reason: str) -> None:
        if not self._control.up:
            raise ConfigError.single("reload", "the server's control process is away", hint="try again in a moment")
        if change.models or change.removed or change.seats or change.unseated:
            self._control.send(
                PlacementChanged(
                    models=change.models,
                    removed=change.removed,
                    seats=change.seats,
                    unseated=change.unseated,
                    reason=reason,
                )
            )
        if change.policy is not None or change.local is not None:
            self._control.send(PolicyChosen(policy=change.policy, local=change.local))
        for model in filing.to_prepare(change):
            self._control.send(Prepare(model=model))

    def _answer(self, order: Order, *, changes: Sequence[str] = (), faults: Sequence[str] = ()) -> None:
        if order is not None:
            self._control.send(Refiled(order=order.order, front=order.front, changes=tuple(changes), faults=tuple(faults)))


def _called(order: Order) -> str:
    return "a model filed by request" if isinstance(order, EntryFiled) else "the placement file, read again"

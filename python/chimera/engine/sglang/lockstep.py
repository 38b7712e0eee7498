"""What makes SGLang's schedulers in several processes, one for each GPU of a model, one engine.

Before each step SGLang's first rank hands the requests that it has read to the others. What we want of all of them goes with
those, as a call of SGLang's own kind, and is taken out again before SGLang looks at it: so a level of KV memory changes, and
the model leaves, before the same step on every rank. All ranks then do the same with the same slots, because they have had the
same requests and nothing here asks a clock of its own. What they could do differently, how much memory a driver gives and when
it is gone, they compare.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import zmq
from sglang.srt.distributed import get_tp_group
from sglang.srt.managers.io_struct import RpcReqInput

from chimera.engine.api import Holding, Leave, Limit
from chimera.engine.sglang.elastic import ElasticKv, GiveBack
from chimera.engine.sglang.mailbox import Mailbox

_OURS = "chimera"


class Lockstep:
    """On every rank. On the first it is the mailbox's `Memory`: what that is told, all are told."""

    def __init__(self, kv: ElasticKv | None) -> None:
        self._kv = kv
        self._moving = kv is not None
        """Some rank is not at its level yet, as all ranks know."""
        self._most_held_bytes = 0
        # On the first rank only.
        self._order: Limit | None = None
        self._told: tuple[int, bool] | None = None
        self._in_flight = False
        self._leaves = False
        self._give_back: GiveBack = _leave_that_to_the_first
        if kv is not None:
            kv.agree = _least_of_all

    def begin(self) -> None:
        """All are about to step again."""
        self._leaves = False

    # The first rank's memory, as its mailbox sees it.

    @property
    def stalled(self) -> bool:
        return self._kv is not None and self._kv.stalled

    @property
    def restless(self) -> bool:
        return self._in_flight or (self._kv is not None and self._kv.restless)

    def limit(self, order: Limit) -> None:
        self._order = order

    def breathe(self, give_back: GiveBack) -> None:
        """Not by itself: with all others, in `obey`."""
        self._give_back = give_back

    # Between the first rank's mailbox and SGLang.

    def read(self, mailbox: Mailbox) -> Any:
        """The next that all ranks are to hear of."""
        if self._leaves:
            raise zmq.Again
        if (order := self._untold()) is not None:
            return order
        try:
            return mailbox.recv_pyobj()
        except Leave:
            self._leaves = True
            return RpcReqInput(method=_OURS, parameters={"leaves": True})
        except zmq.Again:
            if (order := self._untold()) is None:
                raise
            return order

    def _untold(self) -> RpcReqInput | None:
        """The newest level, and again when the time has come that requests yield for it."""
        if self._order is None:
            return None
        by_s = self._order.retract_by_s
        told = (self._order.kv_bytes, by_s is not None and time.monotonic() >= by_s)
        if told == self._told:
            return None
        self._told, self._in_flight = told, True
        return RpcReqInput(method=_OURS, parameters={"kv_bytes": told[0], "retracts": told[1]})

    # On every rank, before each step.

    def obey(self, requests: Sequence[Any]) -> list[Any]:
        """Do what is ours among what all ranks have heard; the rest is SGLang's."""
        others = []
        for request in requests:
            if not isinstance(request, RpcReqInput) or request.method != _OURS:
                others.append(request)
            elif request.parameters.get("leaves"):
                raise Leave
            elif self._kv is not None:
                # Whether its time has come, the first rank's clock has said.
                by_s = -math.inf if request.parameters["retracts"] else None
                self._kv.limit(Limit(request.parameters["kv_bytes"], by_s))
                self._in_flight, self._moving = False, True
        if self._kv is not None:
            self._kv.breathe(self._give_back)
            if self._moving:
                self._compare(self._kv)
        return others

    def _compare(self, kv: ElasticKv) -> None:
        state = torch.tensor([kv.held_bytes, kv.restless])
        torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group)
        self._most_held_bytes, restless = state.tolist()
        self._moving = bool(restless)

    def holding(self, kv: ElasticKv) -> Holding:
        """The most that any rank has."""
        own = kv.holding()
        return Holding(held_bytes=max(own.held_bytes, self._most_held_bytes), wanted_bytes=own.wanted_bytes)


class NoForms:
    """A `Forms`: SGLang would have each rank compile a grammar in its own time, and wait for all of them in every step."""

    fault = "a model over several GPUs cannot hold its answers to a form"

    def are_ready(self) -> bool:
        return True

    def resume(self, rid: str, tokens: int) -> None:
        raise AssertionError("no request with a form comes so far")


def _leave_that_to_the_first(rid: str, why: str) -> None:
    """The first rank gives requests back, and has the others abort them."""


def _least_of_all(number: int) -> int:
    least = torch.tensor([number])
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return int(least)

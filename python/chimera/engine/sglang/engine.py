"""Stock SGLang's scheduler, built in this process for one model after another.

SGLang says of its process-wide settings that a later publication wins, "which is what lets one process rebuild an engine
after shutting the previous one down"; that is what happens here. The scheduler is subclassed in one place, where it
would open sockets.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import zmq
from sglang.srt.managers import io_struct
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.utils.watchdog import Watchdog

from chimera.core.model import ModelSpec
from chimera.core.shape import shape_of
from chimera.engine.api import CannotServe, Holding, Leave, Order, Post, Remains, Stats, Vitals
from chimera.engine.sglang.arguments import server_arguments
from chimera.engine.sglang.elastic import ElasticKv
from chimera.engine.sglang.gathering import gathered
from chimera.engine.sglang.grammars import Grammars
from chimera.engine.sglang.lockstep import Lockstep, NoForms
from chimera.engine.sglang.mailbox import Mailbox
from chimera.engine.sglang.plugin import elastic_memory
from chimera.engine.sglang.prefixes import Prefixes
from chimera.engine.sglang.releases import build
from chimera.engine.sglang.solitude import alone
from chimera.engine.sglang.surroundings import Surroundings, forget
from chimera.errors import WeightsError
from chimera.msg.actions import Place
from chimera.msg.stream import TokenDelta

log = logging.getLogger(__name__)

_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_SETTLE_WITHIN_S = 0.1
"""What SGLang may take to let go of requests that are given up; a model that takes longer is not worth keeping."""


class _Mailboxed(scheduler_module.Scheduler):  # type: ignore[misc]
    """SGLang's scheduler with a mailbox where its sockets would be."""

    kv: ElasticKv | None = None
    grammars: Grammars | None = None
    lockstep: Lockstep | None = None
    is_first = True
    """Of the ranks that serve the model together."""
    _results: deque[Any] | None = None

    @property
    def result_queue(self) -> deque[Any]:
        """The steps whose results are still to be read."""
        return self._results if self._results is not None else deque()

    @result_queue.setter
    def result_queue(self, fresh: deque[Any]) -> None:
        """SGLang's loop begins with none. Ours is left and entered again, and what was under way still is."""
        if not self._results:
            self._results = fresh

    def _add_request_to_queue(self, req: Any, *further: Any, **named: Any) -> None:
        """As SGLang's own; here every request passes once its grammar is there."""
        if self.grammars is not None:
            self.grammars.catch_up(req)
        super()._add_request_to_queue(req, *further, **named)

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """As SGLang's own, with what is ours taken out."""
        super().process_input_requests(recv_reqs if self.lockstep is None else self.lockstep.obey(recv_reqs))

    def on_idle(self) -> None:
        """As SGLang's own, whose leak check reads a capacity that may have moved since the last step."""
        if self.kv is not None:
            self.kv.show_settled()
        super().on_idle()

    def flush_cache(self, empty_cache: bool = True) -> bool:
        """SGLang's own gives up while anything runs; here what runs goes on, and every prefix goes that it does not use."""
        self.tree_cache.evict(EvictParams(num_tokens=sys.maxsize, swa_num_tokens=sys.maxsize))
        return True

    def init_ipc_channels(self, port_args: PortArgs) -> None:
        later = _Later()
        self.ipc_channels = SimpleNamespace(
            recv_from_tokenizer=later,
            recv_from_rpc=_Silent(),
            send_to_tokenizer=later,
            send_to_detokenizer=later,
            send_metrics_from_scheduler=None,
        )
        self.later = later
        self.recv_from_tokenizer = later
        self.load_snapshot_writer = None

    def init_soft_watchdog(self, *_: Any) -> None:
        """None: its thread would hold the scheduler for ever, and would kill our parent process when a step is slow."""

    def init_watch_dog_memory_saver_input_blocker(self) -> None:
        """As SGLang's own, with its watchdog left out: the agent watches over workers."""
        watchdog = scheduler_module.create_scheduler_watchdog
        scheduler_module.create_scheduler_watchdog = lambda scheduler, **settings: Watchdog.create(
            debug_name="none", watchdog_timeout=None
        )
        try:
            super().init_watch_dog_memory_saver_input_blocker()
        finally:
            scheduler_module.create_scheduler_watchdog = watchdog


class _Later:
    """A mailbox that SGLang may hold on to before there is anybody to deliver to."""

    mailbox: Mailbox | None = None
    lockstep: Lockstep | None = None
    """Where others step with this one."""

    def recv(self, flags: int = 0) -> bytes:
        encoded: bytes = io_struct.msgpack_encode(self.recv_pyobj(flags))
        return encoded

    def recv_pyobj(self, flags: int = 0) -> Any:
        assert self.mailbox is not None, "steps are taken only inside serve()"
        return self.mailbox.recv_pyobj(flags) if self.lockstep is None else self.lockstep.read(self.mailbox)

    def send_output(self, output: Any, recv_obj: object = None) -> None:
        if self.mailbox is not None:
            self.mailbox.send_output(output, recv_obj)


class _Silent:
    """A socket on which nothing ever comes."""

    def recv(self, flags: int = 0) -> bytes:
        raise zmq.Again

    recv_pyobj = recv


@dataclass(slots=True)
class Aside:
    """A model that was up and may be again, with all that SGLang made for it but the memory of its cache."""

    scheduler: _Mailboxed
    grammars: Grammars
    kv: ElasticKv
    surroundings: Surroundings
    nbytes: int
    """By how much the process is larger for it."""
    prefixes: Prefixes | None
    """On the host; may be let go of."""


class SglangEngine:
    def __init__(self) -> None:
        self._on_cpu = not torch.accelerator.is_available()
        self._scheduler: _Mailboxed | None = None
        self._grammars: Grammars | None = None
        self._kv: ElasticKv | None = None
        self._empty_bytes = 0
        """What the process had when the model came, and what that had kept while it was set aside."""

    def activate(
        self,
        model: ModelSpec,
        *,
        gpu_ids: tuple[int, ...],
        kv_bytes: int | None,
        ceiling_bytes: int | None = None,
        place: Place | None = None,
    ) -> Vitals:
        if place is not None:
            _require_divisible(model, len(gpu_ids))
        started = time.perf_counter()
        self._empty_bytes = _taken_bytes(on_cpu=self._on_cpu)
        try:
            self._scheduler = self._build(model, gpu_ids, kv_bytes, ceiling_bytes, place)
        except CannotServe:
            self._forget()
            raise
        except Exception as fault:
            # Loaders and models raise whatever they meet; all of it is the reason why this model is not there.
            log.warning("SGLang could not build model=%s", model.name, exc_info=True)
            self._forget()
            passing = isinstance(fault, MemoryError | torch.OutOfMemoryError) or _is_a_peers(fault)
            passing |= isinstance(fault, WeightsError) and fault.passing
            raise CannotServe(f"SGLang could not build it: {type(fault).__name__}: {fault}", permanent=not passing) from fault
        log.info("built model=%s seconds=%.3f", model.name, time.perf_counter() - started)
        return self._vitals()

    def _vitals(self) -> Vitals:
        scheduler = self._require()
        return Vitals(
            credits=scheduler.max_running_requests,
            kv_tokens=scheduler.max_total_num_tokens,
            context_length=scheduler.model_config.context_len,
        )

    def _build(
        self,
        model: ModelSpec,
        gpu_ids: tuple[int, ...],
        kv_bytes: int | None,
        ceiling_bytes: int | None,
        place: Place | None,
    ) -> _Mailboxed:
        most_bytes = kv_bytes if ceiling_bytes is None else ceiling_bytes
        arguments = ServerArgs(**server_arguments(model, on_cpu=self._on_cpu, kv_bytes=most_bytes))
        rank = 0 if place is None else place.rank
        device = rank if self._on_cpu else gpu_ids[rank]
        if ceiling_bytes is not None:
            self._kv = ElasticKv(
                level_bytes=ceiling_bytes if kv_bytes is None else kv_bytes,
                ceiling_bytes=ceiling_bytes,
                on_cpu=self._on_cpu,
                in_lockstep=place is not None,
            )
        with elastic_memory(self._kv), alone() if place is None else gathered(place, len(gpu_ids)):
            scheduler = build(_Mailboxed, arguments, PortArgs.init_new(arguments), device, rank)
        if self._kv is not None:
            self._kv.bind(scheduler)
            scheduler.kv = self._kv
        if place is None:
            self._grammars = Grammars(model.tokenizer_path, on_cpu=self._on_cpu)
            self._grammars.bind(scheduler)
            scheduler.grammars = self._grammars
        else:
            scheduler.lockstep = Lockstep(self._kv)
            scheduler.is_first = rank == 0
        return scheduler

    def prepare(self, model: ModelSpec, *, gpu_ids: tuple[int, ...]) -> int:
        return 0  # weights are read from the model's files each time

    def serve(self, post: Post, *, abandon: bool = False) -> None:
        """With `abandon`, whatever SGLang still has from an earlier post is given up first."""
        scheduler = self._require()
        lockstep = scheduler.lockstep
        if lockstep is not None:
            lockstep.begin()
        if scheduler.is_first:
            scheduler.later.lockstep = lockstep
            scheduler.later.mailbox = mailbox = Mailbox(
                post,
                idle=scheduler.is_fully_idle,
                memory=self._kv if self._kv is None or lockstep is None else lockstep,
                grammars=self._grammars if lockstep is None else NoForms(),
                embeds=not scheduler.is_generation,
            )
            if abandon:
                mailbox.abandon()
        try:
            scheduler.run_event_loop()
        finally:
            scheduler.later.mailbox = None

    def stats(self) -> Stats:
        scheduler = self._require()
        allocator = scheduler.token_to_kv_pool_allocator
        total = scheduler.max_total_num_tokens if self._kv is None else self._kv.live_slots
        free = allocator.available_size() + scheduler.tree_cache.evictable_size()
        return Stats(
            running=len(scheduler.running_batch.reqs),
            queued=len(scheduler.waiting_queue),
            kv_tokens=total,
            kv_used_tokens=total - free,
            lost_cached_tokens=0 if self._kv is None else self._kv.lost_cached_tokens,
        )

    def remains(self, gpu_id: int) -> Remains:
        return Remains()  # whoever sets a model aside has it

    def let_go(self, gpu_id: int, most_bytes: int, reason: str) -> None:
        """There is nothing."""

    def holding(self) -> Holding | None:
        if self._kv is None:
            return None
        lockstep = self._require().lockstep
        return self._kv.holding() if lockstep is None else lockstep.holding(self._kv)

    def deactivate(self) -> None:
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is None:
            return
        if self._grammars is not None:
            self._grammars.close()
            self._grammars = None
        release = getattr(scheduler, "release_host_resources", None)
        if release is not None:
            release()
        del scheduler, release  # the method holds it too
        self._forget()

    # A model between two visits.

    def set_aside(self, most_prefix_bytes: int = 0) -> Aside | None:
        """Take the model out of the process as it is, with the memory of its cache given back; EMPTY afterwards.

        As much of its prefixes as that goes to the host.

        `None`, with the model still up, where it cannot be: its cache is not elastic, or SGLang does not come to rest.
        """
        scheduler, kv, grammars = self._require(), self._kv, self._grammars
        if kv is None or grammars is None or not self._settle():
            return None
        grammars.settle()
        prefixes = kv.take_down(most_prefix_bytes)
        scheduler.flush_cache()
        kv.park()
        self._scheduler = self._kv = self._grammars = None
        grown = max(0, _taken_bytes(on_cpu=self._on_cpu) - self._empty_bytes)
        return Aside(scheduler, grammars, kv, Surroundings(), grown, prefixes)

    def resume(self, aside: Aside, kv_bytes: int) -> Vitals:
        """It is up again, as it was but for its cache."""
        self._empty_bytes = _taken_bytes(on_cpu=self._on_cpu) - aside.nbytes
        self._scheduler, self._grammars, self._kv = aside.scheduler, aside.grammars, aside.kv
        aside.surroundings.put_back()
        try:
            aside.kv.wake(kv_bytes)
        except CannotServe:
            self.deactivate()
            raise
        return self._vitals()

    def plant(self, prefixes: Prefixes) -> None:
        """What it had cached when it left, it has again, and nothing else; for a model that is up and at rest."""
        assert self._kv is not None, "what is set aside has elastic memory"
        self._require().flush_cache(empty_cache=False)
        tokens = self._kv.plant(prefixes)
        log.info("planted prefixes tokens=%d bytes=%d", tokens, prefixes.nbytes)

    def discard(self, aside: Aside) -> None:
        """It will not be wanted again. Another model may be up meanwhile."""
        up = self._scheduler, self._grammars, self._kv, self._empty_bytes, Surroundings()
        self._scheduler, self._grammars, self._kv = aside.scheduler, aside.grammars, aside.kv
        aside.surroundings.put_back()
        self.deactivate()
        self._scheduler, self._grammars, self._kv, self._empty_bytes, surroundings = up
        surroundings.put_back()

    def _settle(self) -> bool:
        """Have SGLang let go of whatever requests it has; whether it has come to rest."""
        scheduler = self._require()
        if not scheduler.is_fully_idle():
            with contextlib.suppress(Leave):
                self.serve(_Closing(time.monotonic() + _SETTLE_WITHIN_S), abandon=True)
        return bool(scheduler.is_fully_idle())

    def _require(self) -> _Mailboxed:
        assert self._scheduler is not None, "the worker activates before it serves"
        return self._scheduler

    def _forget(self) -> None:
        forget()
        gc.collect()
        kv, self._kv = self._kv, None
        if kv is not None:
            kv.close()  # now that nobody is left to touch its tensors


class _Closing:
    """A post without orders, that leaves as soon as the engine is at rest, or the time is up."""

    def __init__(self, until_s: float) -> None:
        self._until_s = until_s

    def collect(self, wait_s: float | None) -> Sequence[Order]:
        if wait_s != 0.0 or time.monotonic() >= self._until_s:
            raise Leave
        return ()

    def deliver(self, deltas: list[TokenDelta]) -> None:
        """Nobody is left to want them."""

    def fail(self, request_id: str, code: str, message: str) -> None:
        """Nor to be told."""

    def flushed(self) -> None:
        """Nor is anybody left who asked for it."""

    def give_back(self, request_id: str, reason: str) -> None:
        """All were given back before."""


def _taken_bytes(*, on_cpu: bool) -> int:
    """Of the memory that models run in: on a GPU what torch has taken from it, else what this process alone has."""
    if not on_cpu:
        return int(torch.cuda.memory_reserved())
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * _PAGE_BYTES


def _require_divisible(model: ModelSpec, ranks: int) -> None:
    """Before the ranks meet, so that each says it by itself and none waits for another."""
    try:
        shape = shape_of(json.loads((Path(model.path) / "config.json").read_bytes()))
    except (OSError, ValueError):
        return  # SGLang may know more architectures, and says what is wrong with the others
    try:
        shape.require_divisible(ranks)
    except ValueError as fault:
        raise CannotServe(str(fault), permanent=True) from fault


def _is_a_peers(fault: Exception) -> bool:
    """Another rank was lost while this one waited for it: no fault of the model's."""
    return isinstance(fault, RuntimeError) and any(name in str(fault) for name in ("gloo", "NCCL"))

"""Stock SGLang's scheduler, built in this process for one model after another.

SGLang says of its process-wide settings that a later publication wins, "which is what lets one process rebuild an engine
after shutting the previous one down"; that is what happens here. The scheduler is subclassed in one place, where it
would open sockets.
"""

from __future__ import annotations

import gc
import logging
import time
from types import SimpleNamespace
from typing import Any

import torch
import zmq
from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.runtime_context import reset_context
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.utils.watchdog import Watchdog

from chimera.core.model import ModelSpec
from chimera.engine.api import CannotServe, Holding, Post, Stats, Vitals
from chimera.engine.sglang.arguments import server_arguments
from chimera.engine.sglang.elastic import ElasticKv
from chimera.engine.sglang.grammars import Grammars
from chimera.engine.sglang.mailbox import Mailbox
from chimera.engine.sglang.plugin import elastic_memory
from chimera.engine.sglang.releases import build
from chimera.engine.sglang.solitude import alone
from chimera.msg.actions import Place

log = logging.getLogger(__name__)


class _Mailboxed(scheduler_module.Scheduler):  # type: ignore[misc]
    """SGLang's scheduler with a mailbox where its sockets would be."""

    kv: ElasticKv | None = None
    grammars: Grammars | None = None

    def _add_request_to_queue(self, req: Any, *further: Any, **named: Any) -> None:
        """As SGLang's own; here every request passes once its grammar is there."""
        if self.grammars is not None:
            self.grammars.catch_up(req)
        super()._add_request_to_queue(req, *further, **named)

    def on_idle(self) -> None:
        """As SGLang's own, whose leak check reads a capacity that may have moved since the last step."""
        if self.kv is not None:
            self.kv.show_settled()
        super().on_idle()

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

    def recv(self, flags: int = 0) -> bytes:
        assert self.mailbox is not None, "steps are taken only inside serve()"
        return self.mailbox.recv(flags)

    def recv_pyobj(self, flags: int = 0) -> Any:
        assert self.mailbox is not None, "steps are taken only inside serve()"
        return self.mailbox.recv_pyobj(flags)

    def send_output(self, output: Any, recv_obj: object = None) -> None:
        if self.mailbox is not None:
            self.mailbox.send_output(output, recv_obj)


class _Silent:
    """A socket on which nothing ever comes."""

    def recv(self, flags: int = 0) -> bytes:
        raise zmq.Again

    recv_pyobj = recv


class SglangEngine:
    def __init__(self) -> None:
        self._on_cpu = not torch.accelerator.is_available()
        self._scheduler: _Mailboxed | None = None
        self._grammars: Grammars | None = None
        self._kv: ElasticKv | None = None

    def activate(
        self,
        model: ModelSpec,
        *,
        gpu_ids: tuple[int, ...],
        kv_bytes: int | None,
        ceiling_bytes: int | None = None,
        place: Place | None = None,
    ) -> Vitals:
        if len(gpu_ids) > 1:
            raise CannotServe(
                "a model over several GPUs needs a gang of workers, which this release cannot form", permanent=True
            )
        started = time.perf_counter()
        try:
            self._scheduler = self._build(model, gpu_ids, kv_bytes, ceiling_bytes)
        except CannotServe:
            self._forget()
            raise
        except Exception as fault:
            # Loaders and models raise whatever they meet; all of it is the reason why this model is not there.
            log.warning("SGLang could not build model=%s", model.name, exc_info=True)
            self._forget()
            short = isinstance(fault, MemoryError | torch.OutOfMemoryError)
            raise CannotServe(f"SGLang could not build it: {type(fault).__name__}: {fault}", permanent=not short) from fault
        log.info("built model=%s seconds=%.3f", model.name, time.perf_counter() - started)
        return Vitals(
            credits=self._scheduler.max_running_requests,
            kv_tokens=self._scheduler.max_total_num_tokens,
            context_length=self._scheduler.model_config.context_len,
        )

    def _build(self, model: ModelSpec, gpu_ids: tuple[int, ...], kv_bytes: int | None, ceiling_bytes: int | None) -> _Mailboxed:
        most_bytes = kv_bytes if ceiling_bytes is None else ceiling_bytes
        arguments = ServerArgs(**server_arguments(model, on_cpu=self._on_cpu, kv_bytes=most_bytes))
        device = 0 if self._on_cpu else gpu_ids[0]
        if ceiling_bytes is not None:
            level_bytes = ceiling_bytes if kv_bytes is None else kv_bytes
            self._kv = ElasticKv(level_bytes=level_bytes, ceiling_bytes=ceiling_bytes, on_cpu=self._on_cpu)
        with elastic_memory(self._kv), alone():
            scheduler = build(_Mailboxed, arguments, PortArgs.init_new(arguments), device)
        if self._kv is not None:
            self._kv.bind(scheduler)
            scheduler.kv = self._kv
        self._grammars = Grammars(model.tokenizer_path, on_cpu=self._on_cpu)
        self._grammars.bind(scheduler)
        scheduler.grammars = self._grammars
        return scheduler

    def prepare(self, model: ModelSpec, *, gpu_ids: tuple[int, ...]) -> int:
        return 0  # weights are read from the model's files each time

    def serve(self, post: Post) -> None:
        scheduler = self._require()
        scheduler.later.mailbox = Mailbox(
            post,
            idle=scheduler.is_fully_idle,
            memory=self._kv,
            grammars=self._grammars,
            embeds=not scheduler.is_generation,
        )
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

    def holding(self) -> Holding | None:
        return None if self._kv is None else self._kv.holding()

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

    def _require(self) -> _Mailboxed:
        assert self._scheduler is not None, "the worker activates before it serves"
        return self._scheduler

    def _forget(self) -> None:
        _forget_process_state()
        gc.collect()
        kv, self._kv = self._kv, None
        if kv is not None:
            kv.close()  # now that nobody is left to touch its tensors


def _forget_process_state() -> None:
    """SGLang's process groups, settings and tables outlive its scheduler; the next model makes its own."""
    destroy_model_parallel()
    destroy_distributed_environment()
    reset_context()

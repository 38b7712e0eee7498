"""One model's KV memory under SGLang: a level that moves while requests run.

SGLang is told the most there could ever be; its allocator hands out what there is. A level that rises is mapped at once. One
that falls goes in the order of what it costs: slots that nobody has, prefixes that SGLang values least, and the requests
that must yield when the time to do so has come; whatever else lies in the way is moved, so a level never waits for a request
merely because of where its cache lies. Between two steps, on the thread of the step loop, and never below what the step
after this one needs.

Knows SGLang's scheduler object, and stripes; does not know leases, nor who else wants the memory.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from chimera.engine.api import CannotServe, Holding, Limit
from chimera.engine.sglang.allocator import ElasticAllocator
from chimera.engine.sglang.occupants import Occupants, live_requests
from chimera.engine.sglang.prefixes import Prefixes, plant, take_down
from chimera.errors import DriverError
from chimera.kv.budget import Budget
from chimera.kv.fence import Passed, after_stream, immediate
from chimera.kv.layout import STRIPE_BYTES, KvKind, PerLayer
from chimera.kv.pool import ElasticPool
from chimera.kv.reserve import Reserve
from chimera.units import KIB, MIB, ceil_div, format_bytes
from chimera.vmm.driver import Driver

_STRIPES_AIMED_AT: Final = 64
"""A pool small enough to have fewer at the usual size gets smaller stripes."""
_SMALL_GRANULE_BYTES: Final = 64 * KIB
_STARVED_S: Final = 10.0
"""How long a request may lie in an engine that has nothing else to do, for want of memory, before it is told so."""
_WANTED_EVERY_S: Final = 0.02

_OUT_OF_MEMORY: Final = (errno.ENOMEM, 2)
"""As the kernel says it, and as CUDA does."""

GiveBack = Callable[[str, str], None]


class ElasticKv:
    """From before SGLang's scheduler is built (`furnish`, `allocator`) until after it is gone (`close`)."""

    def __init__(self, *, level_bytes: int, ceiling_bytes: int, on_cpu: bool, in_lockstep: bool = False) -> None:
        """`in_lockstep`: other ranks must have the same slots in every step, so nothing happens at a device's own pace."""
        self.ceiling_bytes = ceiling_bytes
        self.agree: Callable[[int], int] = _as_it_is
        """What all ranks can have, when this one can have so much."""
        self._in_lockstep = in_lockstep
        self.restless = False
        """Not at its level yet, which may take no step but time."""
        self.stalled = False
        """Requests wait for memory, and nothing runs whose end would free any."""
        self._on_cpu = on_cpu
        self._level_bytes = level_bytes
        self._retract_at_s = math.inf
        self._is_there = False
        """At its level, with nothing under way: nothing to do in a step."""
        self._driver = _driver(ceiling_bytes, on_cpu=on_cpu)
        self._pool: ElasticPool | None = None
        self._budget = Budget(0)
        self._allocator: ElasticAllocator | None = None
        self._scheduler: Any = None
        self._shown = -1
        self._wanted_tokens = 0
        self._wanted_due_s = 0.0
        self._stalled_since_s = math.inf
        self.lost_cached_tokens = 0
        """Prefixes that went because memory was recalled."""

    # While SGLang is built.

    def furnish(self, kind: KvKind, *, slots: int, page_size: int, device: str) -> dict[str, list[torch.Tensor]]:
        """The tensors of a pool of up to so many slots, by plane and layer; memory is under the level's part of them."""
        if self._pool is not None:
            raise CannotServe("a model with two KV pools cannot have elastic memory: set elastic to false", permanent=True)
        stripe_bytes = min(STRIPE_BYTES, max(self._driver.granularity, self.ceiling_bytes // _STRIPES_AIMED_AT))
        # As SGLang itself lays it out: its CUDA kernels take a row's stride from its shape, and a CPU reads it faster.
        layout = PerLayer(
            kind, slots=slots, granularity=self._driver.granularity, block_slots=page_size, stripe_bytes=stripe_bytes
        )
        reserve = Reserve(
            self._driver,
            handle_bytes=layout.handle_bytes,
            handles_per_stripe=layout.handles_per_stripe,
            budget=self._budget,
            low=0 if self._on_cpu or self._in_lockstep else 1,
            high=0 if self._on_cpu or self._in_lockstep else 4,
        )
        if not self._on_cpu and not self._in_lockstep:
            reserve.start()
        where = torch.device(device)
        if where.type == "cuda":
            where = torch.device("cuda", torch.cuda.current_device())  # a tensor over addresses must say which device's
        self._pool = ElasticPool(layout, reserve, block_slots=page_size, device=where, fence=self._fence)
        self._take_first()
        return self._pool.tensors()

    def allocator(self, *, size: int, page_size: int, dtype: torch.dtype, kvcache: Any) -> ElasticAllocator:
        if self._pool is None:
            what = type(kvcache).__name__
            raise CannotServe(f"{what} cannot hold elastic KV memory: set elastic to false for this model", permanent=True)
        self._allocator = ElasticAllocator(self._pool.slots, size=size, page_size=page_size, dtype=dtype, kvcache=kvcache)
        self._allocator.kv = self
        return self._allocator

    def bind(self, scheduler: Any) -> None:
        """SGLang is built: from here on its requests and prefixes are within reach."""
        if self._allocator is None or scheduler.token_to_kv_pool_allocator is not self._allocator:
            raise CannotServe("SGLang built its KV pool without the elastic plug-in", permanent=True)
        self._scheduler = scheduler
        self._show()

    # While it serves.

    def limit(self, order: Limit) -> None:
        """The newest level counts; one that rises again calls off what was under way."""
        self._is_there = False
        self._level_bytes = order.kv_bytes
        self._retract_at_s = math.inf if order.retract_by_s is None else order.retract_by_s
        self._budget.limit_bytes = max(order.kv_bytes, self._owned_pool.stripe_bytes)

    def breathe(self, give_back: GiveBack) -> None:
        """Bring the pool towards its level, as far as it can go now."""
        if not self._is_there:
            self._move_level(give_back)
            self._show()
            pool = self._owned_pool
            self._is_there = pool.present_stripes == pool.staying_stripes == self._wanted_stripes
            self.restless = not self._is_there
            if self._is_there:
                self._retract_at_s = math.inf
        self.stalled = self._is_stalled()
        if self.stalled:
            self._turn_away_the_starved(give_back)

    @property
    def retracts(self) -> bool:
        return time.monotonic() >= self._retract_at_s

    def allows(self, new_tokens: int, requests_left: int) -> bool:
        """Whether the running requests may go on together; asked by SGLang's decode gate after its own check.

        Not until those that are left fit into the level; the last is not ours to refuse.
        """
        if requests_left <= 1:
            return True
        return self._locked_slots() + new_tokens <= self._wanted_stripes * self._owned_pool.layout.slots_per_stripe

    @property
    def live_slots(self) -> int:
        """What SGLang may count on now: free, cached and in use together."""
        slots = self._owned_pool.slots
        return slots.total - slots.withheld

    @property
    def held_bytes(self) -> int:
        return self._budget.held_bytes

    def holding(self) -> Holding:
        now = time.monotonic()
        if now >= self._wanted_due_s:
            self._wanted_due_s = now + _WANTED_EVERY_S
            scheduler = self._scheduler
            requests = [*live_requests(scheduler), *scheduler.waiting_queue]
            self._wanted_tokens = sum(map(_final_tokens, {id(r): r for r in requests}.values()))
        pool = self._owned_pool
        stripes = ceil_div(self._wanted_tokens + 2 * pool.slots.block_slots, pool.layout.slots_per_stripe)
        return Holding(
            held_bytes=self._budget.held_bytes,
            wanted_bytes=min(max(1, stripes), pool.layout.stripes) * pool.stripe_bytes,
        )

    # While it is parked.

    def take_down(self, most_bytes: int) -> Prefixes | None:
        """Cached prefixes, to the host; before it is parked."""
        return take_down(self._scheduler.tree_cache, self._owned_pool, most_bytes) if most_bytes > 0 else None

    def plant(self, prefixes: Prefixes) -> int:
        """The tokens of those that are cached again."""
        return plant(self._scheduler.tree_cache, self._owned_pool, prefixes)

    def park(self) -> None:
        """Give all memory back; addresses stay, and with them the tensors and graphs that SGLang has over them.

        For an idle engine that has forgotten its prefixes.
        """
        if not self._on_cpu:
            torch.cuda.synchronize()
        self._budget.limit_bytes = 0
        self._owned_pool.vacate()
        self._shown, self._is_there, self.stalled = -1, False, False
        self._stalled_since_s = math.inf

    def wake(self, level_bytes: int) -> None:
        """Memory again, as at the start."""
        self._level_bytes, self._retract_at_s = level_bytes, math.inf
        self.lost_cached_tokens = 0
        self._take_first()
        self._show()

    def close(self) -> None:
        """Give everything back. Nobody may touch the tensors any more."""
        if self._allocator is not None:
            self._allocator.kv = None
        self._scheduler = self._allocator = None
        if self._pool is not None:
            self._pool.close()
            self._pool.reserve.close()
            self._pool = None
        self._driver.close()

    # How a level is reached.

    def _take_first(self) -> None:
        """What there is to be at the start."""
        pool = self._owned_pool
        self._budget.limit_bytes = max(self._level_bytes, pool.stripe_bytes)
        try:
            pool.grow(self._wanted_stripes)
        except DriverError as refusal:
            raise CannotServe(f"its first KV memory was refused: {refusal}", permanent=False) from refusal

    @property
    def _owned_pool(self) -> ElasticPool:
        assert self._pool is not None, "a pool is furnished while SGLang is built"
        return self._pool

    @property
    def _wanted_stripes(self) -> int:
        """The level in stripes. The first stays whatever the level: slot 0 is where padding is written."""
        pool = self._owned_pool
        return max(1, min(pool.layout.stripes, self._level_bytes // pool.stripe_bytes))

    def _move_level(self, give_back: GiveBack) -> None:
        pool = self._owned_pool
        if self._wanted_stripes < pool.staying_stripes and self.retracts:
            self._give_back_the_too_large(give_back)
        goal = max(self._wanted_stripes, self._needed_stripes())
        if goal > pool.staying_stripes:
            self._grow(goal - pool.staying_stripes)
        elif goal < pool.staying_stripes:
            self._evict_down_to(goal * pool.layout.slots_per_stripe)
            pool.shrink(pool.staying_stripes - goal)
        if pool.leaving:
            self._clear_the_leaving()
        pool.tick()
        if self._in_lockstep and pool.leaving:
            pool.slots.settle()

    def _grow(self, stripes: int) -> None:
        pool = self._owned_pool
        if self._in_lockstep:
            # Created first, where a driver may refuse it, so that mapping it brings the same stripes everywhere.
            created = pool.reserve.stock(stripes - len(pool.leaving))
            pool.grow(min(stripes, len(pool.leaving) + self.agree(created)))
            pool.reserve.trim()
            return
        try:
            pool.grow(stripes)
        except DriverError as refusal:
            if refusal.code not in _OUT_OF_MEMORY:
                raise
            # Short for now, as the holding says: the next look tries again.

    def _needed_stripes(self) -> int:
        """Below this SGLang could not take its next steps: it aborts a lone request, and raises in a chunked prefill."""
        pool, scheduler = self._owned_pool, self._scheduler
        live = [request for request in live_requests(scheduler) if not request.finished()]
        page = pool.slots.block_slots
        chunked = scheduler.chunked_req
        # A chunked prefill is scheduled whether there is room or not, and one step ahead of us.
        rest = _final_tokens(chunked) + page if chunked is not None else 0
        next_step = self._locked_slots() + rest + 2 * page * len(live)
        largest = max((ceil_div(_final_tokens(request), page) * page + 2 * page for request in live), default=0)
        return ceil_div(max(next_step, largest) + page, pool.layout.slots_per_stripe)

    def _locked_slots(self) -> int:
        """In use by running requests: neither free nor a prefix that could go."""
        evictable: int = self._scheduler.tree_cache.evictable_size()
        return self._owned_pool.slots.used - evictable

    def _evict_down_to(self, slots: int) -> None:
        """Prefixes go by SGLang's own measure of their value, wherever they lie."""
        excess = self._owned_pool.slots.used + self._owned_pool.slots.block_slots - slots
        if excess > 0:
            before = self._owned_pool.slots.used
            self._scheduler.tree_cache.evict(EvictParams(num_tokens=excess))
            self.lost_cached_tokens += before - self._owned_pool.slots.used

    def _clear_the_leaving(self) -> None:
        """Move what lies on leaving stripes to slots that stay; what finds no room waits for its request to end."""
        slots = self._owned_pool.slots
        in_the_way = slots.to_free()
        if not len(in_the_way):
            return
        if not self._on_cpu:
            # The step in flight still writes the slots that it was given.
            torch.cuda.current_stream().wait_stream(self._scheduler.forward_stream)
        occupants = Occupants(self._scheduler)
        named = torch.zeros(self._owned_pool.layout.stripes * slots.slots_per_stripe, dtype=torch.bool, device=slots.device)
        held = occupants.slots()
        named[held] = True
        # Whole blocks, so that the unused end of a page goes with it; and only what somebody is known to have.
        page = slots.block_slots
        blocks = named.view(-1, page).any(1)
        movable = in_the_way[blocks[in_the_way // page]][: slots.available // page * page]
        if not len(movable):
            return
        new = self._owned_pool.move(movable)
        if new is None:
            return
        number = torch.arange(len(named), dtype=torch.int64, device=slots.device)
        number[movable] = new
        occupants.rename(number)

    def _give_back_the_too_large(self, give_back: GiveBack) -> None:
        """Requests that can never end within the level leave first: SGLang would keep them until it has to abort them."""
        pool = self._owned_pool
        room = self._wanted_stripes * pool.layout.slots_per_stripe
        for request in live_requests(self._scheduler):
            if _final_tokens(request) + 3 * pool.slots.block_slots > room and not request.finished():
                give_back(request.rid, "its KV memory was recalled, and less is left than it needs in the end")

    def _fence(self) -> Passed:
        if self._on_cpu:
            return immediate()
        stream = torch.cuda.current_stream()
        stream.wait_stream(self._scheduler.forward_stream)
        if self._in_lockstep:
            stream.synchronize()
            return immediate()
        return after_stream(stream)()

    # What SGLang sees.

    def _show(self) -> None:
        """SGLang's statistics and its leak check take the capacity from two objects, one of them frozen."""
        live = self.live_slots
        if live == self._shown:
            return
        if live > self._shown:
            # SGLang remembers that a batch was full until one of its requests ends; it does not expect room to come otherwise.
            self._scheduler.running_batch.batch_is_full = False
        self._shown = live
        for reader in (self._scheduler.pool_stats_observer, self._scheduler.invariant_checker):
            object.__setattr__(reader, "max_total_num_tokens", live)

    def show_settled(self) -> None:
        """Before a leak check: exactly, waiting for the device if stripes are on their way out."""
        if self._owned_pool.leaving:
            self._owned_pool.slots.settle()
        self._show()

    # Requests that wait for memory.

    def _is_stalled(self) -> bool:
        scheduler = self._scheduler
        running = not scheduler.running_batch.is_empty() or scheduler.chunked_req is not None
        last = scheduler.last_batch
        if running or not scheduler.waiting_queue or (last is not None and not last.is_empty()):
            self._stalled_since_s = math.inf
            return False
        if math.isinf(self._stalled_since_s):
            self._stalled_since_s = time.monotonic()
            return False  # they may have come just now
        return True

    def _turn_away_the_starved(self, give_back: GiveBack) -> None:
        if time.monotonic() - self._stalled_since_s < _STARVED_S:
            return
        self._stalled_since_s = time.monotonic()
        room = self.live_slots
        for request in list(self._scheduler.waiting_queue):
            need = _final_tokens(request)
            if need + self._owned_pool.slots.block_slots > room:
                give_back(
                    request.rid,
                    f"it needs {need} tokens of KV memory; the model has {room} "
                    f"({format_bytes(self._budget.held_bytes)}) and was given no more in {_STARVED_S:g} s",
                )


def _final_tokens(request: Any) -> int:
    """The most slots a request can ever need."""
    tokens: int = len(request.origin_input_ids) + request.sampling_params.max_new_tokens
    return tokens


def _as_it_is(number: int) -> int:
    return number


def _driver(ceiling_bytes: int, *, on_cpu: bool) -> Driver:
    if on_cpu:
        from chimera.vmm.host import HUGE_PAGE_BYTES, HostDriver

        big = ceiling_bytes >= _STRIPES_AIMED_AT * 2 * MIB
        return HostDriver(HUGE_PAGE_BYTES if big else _SMALL_GRANULE_BYTES)
    from chimera.vmm.cuda import CudaDriver

    return CudaDriver(torch.cuda.current_device())

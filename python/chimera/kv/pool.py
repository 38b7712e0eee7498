"""A KV pool that grows and shrinks in stripes under tensors that never move.

Owns which stripes are present, and the way out of each: chosen, withheld, empty, fenced, gone. Knows no engine: it says
which slots must be freed, and whoever holds them frees them. Everything here is called by one thread, the engine's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import torch

from chimera.core.lease import LeaseClass
from chimera.errors import DriverError
from chimera.kv.arena import Arena
from chimera.kv.fence import Fence, Passed, immediate
from chimera.kv.layout import Layout
from chimera.kv.reserve import Departure, Reserve
from chimera.kv.slots import SlotAllocator
from chimera.kv.victims import Chooser, StripeState, StripeView, emptiest
from chimera.units import MIB

_MOVED_AT_ONCE_BYTES: Final = 16 * MIB


class ElasticPool:
    """Stripes of one layout from one reserve. Several pools whose reserves share a budget live under one lease.

    The first stripe to come is number 0, and it stays until `close`: slot 0 is where engines write what nobody reads.

    A shrink takes its time: `shrink` chooses stripes and withholds their free slots, `slots.on_leaving` tells the engine
    what is in the way, and `tick`, called once per step and when idle, lets go of what has become empty after the last step
    that could have read it. A `grow` meanwhile first calls back stripes that are still leaving.

    What is in the way is moved. In a pool that has turned over a few times every prefix touches most stripes, and evicting
    all that touch half of them empties the cache (benchmark/micro/pool.py: 2 tokens lost for each one given back). So an
    engine evicts what it values least, wherever it lies, until the rest fits, and moves the rest: exactly 1.
    """

    def __init__(
        self,
        layout: Layout,
        reserve: Reserve,
        *,
        block_slots: int = 1,
        device: torch.device | str = "cpu",
        fence: Fence = immediate,
        lease_class: LeaseClass = LeaseClass.KV,
        checked: bool = False,
    ) -> None:
        if (reserve.handle_bytes, reserve.handles_per_stripe) != (layout.handle_bytes, layout.handles_per_stripe):
            raise ValueError(
                f"the reserve makes stripes of {reserve.handles_per_stripe} × {reserve.handle_bytes} bytes, "
                f"the layout wants {layout.handles_per_stripe} × {layout.handle_bytes}"
            )
        self.layout = layout
        self.reserve = reserve
        self.slots = SlotAllocator(
            stripes=layout.stripes,
            slots_per_stripe=layout.slots_per_stripe,
            block_slots=block_slots,
            device=device,
            checked=checked,
        )
        self._arena = Arena(reserve.driver, layout.range_bytes, lease_class=lease_class, device=torch.device(device))
        self._fence = fence
        self._states = [StripeState.ABSENT] * layout.stripes
        self._fenced: dict[int, Passed] = {}
        """Stripes found empty, and the fence each waits for."""
        self._departures: list[tuple[Departure, list[int]]] = []

    @functools.cached_property
    def _rows(self) -> list[torch.Tensor]:
        dtype = self.layout.kind.dtype
        rows = self.layout.rows(
            lambda offset, shape, strides: self._arena.tensor(offset=offset, shape=shape, strides=strides, dtype=dtype)
        )
        return [row.view(_widest(row.shape[1] * dtype.itemsize)) for row in rows]

    @property
    def stripe_bytes(self) -> int:
        return self.reserve.stripe_bytes

    @property
    def staying_stripes(self) -> int:
        """Present, and not asked to leave: the pool's level."""
        return self._states.count(StripeState.MAPPED)

    @property
    def present_stripes(self) -> int:
        """With memory under them, on their way out or not."""
        return self.layout.stripes - self._states.count(StripeState.ABSENT)

    @property
    def leaving(self) -> frozenset[int]:
        return self.slots.leaving

    @property
    def mapped_bytes(self) -> int:
        return self.present_stripes * self.stripe_bytes

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """By plane, one tensor per layer over all slots that could ever be. Reading an absent stripe is a fault."""
        self._require_open()
        dtype = self.layout.kind.dtype
        return self.layout.views(
            lambda offset, shape, strides: self._arena.tensor(offset=offset, shape=shape, strides=strides, dtype=dtype)
        )

    def census(self, evictable: torch.Tensor | None = None) -> list[StripeView]:
        """Every stripe as it is now; `evictable` are slots that could be freed at once. Waits for the device."""
        self._require_open()
        return self._views(self.slots.count(), evictable)

    def grow(self, stripes: int) -> int:
        """Up to this many more stripes staying; how many it became is the answer.

        Fewer come when the budget is used up, when the reserved addresses are, or while the addresses of departing stripes
        are not yet free again. What the driver refuses is raised, and nothing has changed then.
        """
        self._require_open()
        self._collect()
        if stripes <= 0:
            return 0
        called_back = self._call_back(stripes)
        absent = [stripe for stripe, state in enumerate(self._states) if state is StripeState.ABSENT]
        return called_back + self._bring(absent[: stripes - called_back])

    def shrink(self, stripes: int, choose: Chooser = emptiest, *, evictable: torch.Tensor | None = None) -> list[int]:
        """Ask up to this many stripes to leave; those that shall are the answer. Waits for the device, to count.

        Stripe 0 is never asked. `evictable` are the slots that the caller could free or move at once: the chooser is told
        how many of them each stripe has. What the chosen ones still hold is the caller's to clear away.
        """
        self._require_open()
        stripes = min(stripes, self.staying_stripes - 1)
        if stripes <= 0:
            return []

        def choose_from(free_blocks: list[int]) -> list[int]:
            views = self._views(free_blocks, evictable)
            candidates = [view for view in views if view.state is StripeState.MAPPED and view.stripe != 0]
            chosen = list(choose(candidates, stripes))[:stripes]
            if not {view.stripe for view in candidates}.issuperset(chosen):
                raise ValueError(f"{chosen} are not stripes that may be emptied")
            return chosen

        chosen = self.slots.withhold(choose_from)
        for stripe in chosen:
            self._states[stripe] = StripeState.LEAVING
        return chosen

    def move(self, slots: torch.Tensor) -> torch.Tensor | None:
        """Copy whole blocks to slots that stay, free the old ones; the new slots are the answer, or None if they are short.

        For blocks that no step in flight writes and whose numbers the caller can exchange. The copy is queued on the current
        stream, which must be behind the steps that wrote them.
        """
        self._require_open()
        new = self.slots.alloc(len(slots))
        if new is None:
            return None
        for rows in self._rows:
            portion = self._portion(rows)
            for here, there in zip(slots.split(portion), new.split(portion), strict=True):
                rows[there] = rows[here]
        self.slots.free(slots)
        return new

    @property
    def slot_bytes(self) -> int:
        """Of one token in all layers."""
        nbytes: int = sum(rows.shape[1] * rows.itemsize for rows in self._rows)
        return nbytes

    def lift(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """What lies on these slots, copied to the host; waits for the device."""
        self._require_open()
        lifted = []
        for rows in self._rows:
            content = torch.empty((len(slots), rows.shape[1]), dtype=rows.dtype, pin_memory=rows.is_cuda)
            for here, there in zip(slots.split(self._portion(rows)), content.split(self._portion(rows)), strict=True):
                there.copy_(rows[here])
            lifted.append(content)
        return lifted

    def lower(self, slots: torch.Tensor, contents: Sequence[torch.Tensor]) -> None:
        """What was lifted, to other slots."""
        self._require_open()
        for rows, content in zip(self._rows, contents, strict=True):
            for here, there in zip(content.split(self._portion(rows)), slots.split(self._portion(rows)), strict=True):
                rows[there] = here.to(rows.device, non_blocking=True)

    def _portion(self, rows: torch.Tensor) -> int:
        """Slots to copy at once: for a moment a portion is in memory twice more."""
        row_bytes: int = rows.shape[1] * rows.itemsize
        return max(1, _MOVED_AT_ONCE_BYTES // row_bytes)

    def resize(self, stripes: int, choose: Chooser = emptiest) -> int:
        """Grow or begin to shrink towards a level; the level reached is the answer."""
        level = self.staying_stripes
        if stripes > level:
            self.grow(stripes - level)
        elif stripes < level:
            self.shrink(level - stripes, choose)
        return self.staying_stripes

    def tick(self) -> int:
        """Bring everyone who is leaving a step further, without waiting; how many stripes have gone since the last call."""
        self._require_open()
        if self.slots.finish_count():
            self.slots.begin_count()
            self.slots.finish_count()
        if self.slots.leaving:
            self._fence_the_empty()
            self._see_off()
        if not self.reserve.has_thread:
            self.reserve.work()
        gone = self._collect()
        self.reserve.check()
        return gone

    def vacate(self) -> None:
        """Give back every stripe, used or not, and keep the addresses: nothing is present, and `grow` begins anew.

        For a moment in which nobody has a slot and no step is in flight.
        """
        self._require_open()
        self.reserve.settle()
        self._collect()
        self.slots.vacate()
        self._fenced.clear()
        self._states = [StripeState.ABSENT] * self.layout.stripes
        self.reserve.put(self._arena.unmap_all())
        self.reserve.trim()

    def close(self) -> None:
        """Give back every stripe, used or not, and the addresses. The tensors are dead from here on."""
        if not self._arena.is_open:
            return
        self.reserve.settle()
        self.slots.close()
        handles = self._arena.unmap_all()
        self._states = [StripeState.ABSENT] * self.layout.stripes
        self._arena.close()
        self.reserve.put(handles)

    def _bring(self, stripes: Sequence[int]) -> int:
        handles = self.reserve.take(len(stripes))
        stripes = stripes[: len(handles) // self.layout.handles_per_stripe]
        offsets = sorted(offset for stripe in stripes for offset in self.layout.offsets(stripe))
        try:
            # Both ascending: neighbours in memory become neighbours in addresses, which a driver maps in one call.
            self._arena.map(dict(zip(offsets, handles, strict=True)))
        except DriverError:
            self.reserve.put(handles)
            raise
        for stripe in stripes:
            self._states[stripe] = StripeState.MAPPED
        self.slots.add(stripes)
        return len(stripes)

    def _call_back(self, stripes: int) -> int:
        """Those with the most in use first: they would have been the last to go."""
        if not self.slots.leaving:
            return 0
        free = self.slots.count()
        back = sorted(self.slots.leaving, key=lambda stripe: free[stripe])[:stripes]
        self.slots.restore(back)
        for stripe in back:
            self._states[stripe] = StripeState.MAPPED
            self._fenced.pop(stripe, None)
        return len(back)

    def _fence_the_empty(self) -> None:
        new = [stripe for stripe in self.slots.emptied() if stripe not in self._fenced]
        if new:
            self._fenced.update(dict.fromkeys(new, self._fence()))

    def _see_off(self) -> None:
        """Stripes whose fence has passed leave together, so that neighbours share a call."""
        passed = [stripe for stripe, fence in self._fenced.items() if fence()]
        if not passed:
            return
        self.slots.drop(passed)
        for stripe in passed:
            del self._fenced[stripe]
            self._states[stripe] = StripeState.DEPARTING
        offsets = [offset for stripe in passed for offset in self.layout.offsets(stripe)]
        self._departures.append((self.reserve.depart(self._arena, offsets), passed))

    def _collect(self) -> int:
        """Take note of departures that have ended. One that was refused leaves its stripes usable."""
        gone = 0
        for entry in list(self._departures):
            departure, stripes = entry
            if not departure.done and departure.error is None:
                continue
            self._departures.remove(entry)
            state = StripeState.ABSENT if departure.done else StripeState.MAPPED
            for stripe in stripes:
                self._states[stripe] = state
            if departure.error is not None:
                self.slots.add(stripes)
                raise departure.error
            gone += len(stripes)
        return gone

    def _views(self, free_blocks: Sequence[int], evictable: torch.Tensor | None) -> list[StripeView]:
        could_go = [0] * self.layout.stripes if evictable is None else self.slots.tally(evictable).tolist()
        size = self.slots.block_slots
        return [self._view(stripe, free * size, could_go[stripe]) for stripe, free in enumerate(free_blocks)]

    def _view(self, stripe: int, free_slots: int, evictable_slots: int) -> StripeView:
        state = self._states[stripe]
        usable = self.layout.slots_per_stripe - (self.slots.block_slots if stripe == 0 else 0)
        present = state in (StripeState.MAPPED, StripeState.LEAVING)
        return StripeView(
            stripe=stripe,
            state=state,
            used_slots=usable - free_slots if present else 0,
            free_slots=free_slots,
            evictable_slots=evictable_slots,
        )

    def _require_open(self) -> None:
        if not self._arena.is_open:
            raise ValueError("the pool is closed")


def _widest(row_bytes: int) -> torch.dtype:
    """The largest integers that a row is made of: bytes are copied alike whatever they mean, and wide ones faster."""
    return next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if row_bytes % dtype.itemsize == 0)

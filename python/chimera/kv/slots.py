"""Which token slots are free, handed out so that full stripes stay full and empty ones stay empty.

Owns free lists that live where the tensors live. Handing out and taking back never wait for the device: the host counts,
the device holds the numbers. What only the device knows, how many free slots each stripe has, is used on the device to
order the list, and read back only while stripes are being emptied. Knows no memory: a stripe here is a row of numbers.

Three places hold the free blocks. `_ready` is the list that is handed out from its head. `_freed` are the pieces that came
back since; they are appended to the list when it runs out, and every so many calls everything is put in order, fullest stripe
first. `_map`, one flag per block, is where ordering happens; between calls it holds just the free blocks that are
withheld because their stripe is being emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from chimera.units import ceil_div

_CALLS_BETWEEN_ORDERINGS: Final = 128
_BLOCKS_PER_FURTHER_CALL: Final = 512
_FREED_BETWEEN_ORDERINGS: Final = 1 / 16
"""Ordering costs a CPU about 100 µs and 12 ns a block, taking back 3 µs. Spread over 128 calls and one more for every 512
blocks, and not before this part of the free list is out of order, it stays in the shade of the rest."""


class SlotAllocator:
    """Slots `0 … stripes × slots_per_stripe − 1`, in blocks of `block_slots`; only those of present stripes are handed out.

    Block 0 is never handed out: engines write the dummy tokens of padded batches to slot 0.
    `checked=True` verifies every free at once, which waits for the device; else a slot freed twice is found by the next
    ordering on a CPU, and stops the device's stream with an assertion on a GPU.
    """

    def __init__(
        self,
        *,
        stripes: int,
        slots_per_stripe: int,
        block_slots: int = 1,
        device: torch.device | str = "cpu",
        checked: bool = False,
    ) -> None:
        if slots_per_stripe % block_slots:
            raise ValueError(f"a stripe of {slots_per_stripe} slots is not whole blocks of {block_slots}")
        self.block_slots = block_slots
        self.slots_per_stripe = slots_per_stripe
        self.device = torch.device(device)
        self._rows = slots_per_stripe // block_slots
        self._on_host = self.device.type == "cpu"
        self._map = torch.zeros(stripes, self._rows, dtype=torch.bool, device=self.device)
        self._flat = self._map.view(-1)
        self._numbers = torch.arange(stripes * self._rows, dtype=torch.int64, device=self.device).view(stripes, -1)
        self._leaving = torch.zeros(stripes, dtype=torch.bool, device=self.device)
        self._within = torch.arange(block_slots, dtype=torch.int64, device=self.device)
        self._none = torch.empty(0, dtype=torch.int64, device=self.device)
        self._out = torch.zeros_like(self._flat) if checked else None
        self._present: set[int] = set()
        self._withheld: dict[int, int] = {}
        """Stripes being emptied, and their free blocks as last counted."""
        self._ready = self._none
        self._at = 0
        self._left = 0
        self._freed: list[torch.Tensor] = []
        self._freed_blocks = 0
        self._used_blocks = 0
        self._calls = 0
        self.calls_between_orderings = _CALLS_BETWEEN_ORDERINGS + stripes * self._rows // _BLOCKS_PER_FURTHER_CALL
        self._unordered_blocks = 0
        self._counting: _Counting | None = None
        self._closed = False

    # What there is. Slots, as engines count.

    @property
    def total(self) -> int:
        """Slots of present stripes that may ever be handed out, those being withheld included."""
        return self._total_blocks * self.block_slots

    @property
    def used(self) -> int:
        """Handed out and not yet freed."""
        return self._used_blocks * self.block_slots

    @property
    def withheld(self) -> int:
        """Free slots in stripes that are being emptied, as last counted."""
        return sum(self._withheld.values()) * self.block_slots

    @property
    def available(self) -> int:
        """What may be handed out now. Exact, except while stripes are being emptied: then what came back since the last
        count is left out until it is known where it lies (`settle` finds out at once)."""
        blocks = self._left if self._withheld else self._left + self._freed_blocks
        return blocks * self.block_slots

    @property
    def leaving(self) -> frozenset[int]:
        return frozenset(self._withheld)

    # Handing out and taking back: what engines call in every step.

    def alloc(self, slots: int) -> torch.Tensor | None:
        """This many slots, in whole blocks, or None."""
        if self.block_slots == 1:
            return self._take(slots)
        blocks = self._take(ceil_div(slots, self.block_slots))
        if blocks is None:
            return None
        return (blocks.unsqueeze(1) * self.block_slots + self._within).view(-1)

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        last_loc: torch.Tensor,
        *,
        new_tokens: int,
        new_blocks: int,
    ) -> torch.Tensor | None:
        """A slot for each token from `prefix_lens` up to `seq_lens` of every request, or None if blocks are short.

        A request first fills the block of its last token (at slot `last_loc`), then takes new ones. The two totals are the
        host's to know (`blocks_to_extend`); reading them from the device would wait for it.
        """
        fresh = self._take(new_blocks)
        if fresh is None:
            return None
        size = self.block_slots
        old_blocks = (prefix_lens + (size - 1)) // size
        added = (seq_lens + (size - 1)) // size - old_blocks
        lengths = seq_lens - prefix_lens
        before = lengths.cumsum(0) - lengths
        # What turns a token's number into its position, a position's block into one of `fresh`, a position into an old slot.
        to_position = prefix_lens - before
        to_fresh = added.cumsum(0) - added - old_blocks
        to_old = last_loc + 1 - prefix_lens
        per_token = torch.stack((to_position, to_fresh, to_old, old_blocks)).repeat_interleave(
            lengths, dim=1, output_size=new_tokens
        )
        to_position, to_fresh, to_old, known = per_token
        position = torch.arange(new_tokens, device=self.device) + to_position
        if not new_blocks:
            return position + to_old
        block = position // size
        slot = fresh[(block + to_fresh).clamp_(0, new_blocks - 1)] * size + position % size
        return torch.where(block >= known, slot, position + to_old)

    def alloc_decode(self, seq_lens: torch.Tensor, last_loc: torch.Tensor, *, new_blocks: int) -> torch.Tensor | None:
        """One more slot per request, whose length is `seq_lens` with it; `new_blocks` of them begin a block."""
        fresh = self._take(new_blocks)
        if fresh is None:
            return None
        if not new_blocks:
            return last_loc + 1
        begins = (seq_lens - 1) % self.block_slots == 0
        which = (begins.cumsum(0) - 1).clamp_(min=0)
        return torch.where(begins, fresh[which] * self.block_slots, last_loc + 1)

    def free(self, slots: torch.Tensor) -> None:
        """Take back slots that follow one another in a sequence and begin a block; a last block in part goes whole."""
        size = self.block_slots
        # Cloned in either case: engines pass views of tables that they overwrite in the next step.
        blocks = slots.clone() if size == 1 else slots[::size] // size
        self._take_back(blocks)

    def free_blocks(self, blocks: torch.Tensor) -> None:
        """Take back these blocks, each named once."""
        self._take_back(blocks.clone())

    def free_scattered(self, slots: torch.Tensor) -> None:
        """Take back every block that one of these slots lies in, in any order. Waits for a GPU: how many only it can tell."""
        self._take_back(torch.unique(slots // self.block_slots))

    def clear(self) -> None:
        """Everything is free again, whoever had it. Stripes being emptied are then empty."""
        self._require_open()
        self._counting = None
        self._drop_lists()
        self._flat.zero_()
        self._used_blocks = 0
        if self._out is not None:
            self._out.zero_()
        for stripe in self._withheld:
            self._map[stripe] = True
            self._withheld[stripe] = self._rows
        self._set_ready(self._blocks_of(sorted(self._present - self._withheld.keys())))

    def vacate(self) -> None:
        """No stripe is present any more, whoever had slots there."""
        self.clear()
        self._drop_lists()
        self._withheld.clear()
        self._present.clear()
        self._leaving.zero_()
        self._flat.zero_()

    # Stripes that come and go: what the pool calls.

    def add(self, stripes: Iterable[int]) -> None:
        """These stripes are usable now; they are the emptiest, so they go to the end of the list."""
        self._require_open()
        stripes = sorted(stripes)
        self._present.update(stripes)
        self._set_ready(torch.cat((self._rest(), self._blocks_of(stripes))))

    def count(self) -> list[int]:
        """Free blocks by stripe, now. Waits for the device."""
        counted = self._count_all()
        self._deal(counted)
        return counted

    def withhold(self, choose: Callable[[list[int]], Sequence[int]]) -> list[int]:
        """Hand out nothing more of the stripes that `choose` names, given the free blocks of each, and keep what comes back.

        Waits for the device.
        """
        counted = self._count_all()
        chosen: list[int] = []
        try:
            named = list(choose(counted))
            if len(set(named)) != len(named) or not (self._present - self._withheld.keys()).issuperset(named):
                raise ValueError(f"{named} are not stripes that may be emptied")
            chosen = named
        finally:
            # Whatever the choice came to, what was gathered to be counted goes back to the list.
            self._withheld.update(dict.fromkeys(chosen, 0))
            self._leaving[chosen] = True
            self._deal(counted)
        return chosen

    def restore(self, stripes: Sequence[int]) -> None:
        """Hand these out again. Waits for the device."""
        self.settle()
        for stripe in stripes:
            del self._withheld[stripe]
        self._leaving[list(stripes)] = False
        self._deal(self._count_all())

    def drop(self, stripes: Sequence[int]) -> None:
        """Forget stripes that are empty."""
        for stripe in stripes:
            if self._withheld.get(stripe) != self._free_when_empty(stripe):
                raise ValueError(f"stripe {stripe} still holds slots in use")
        for stripe in stripes:
            del self._withheld[stripe]
            self._present.remove(stripe)
        self._leaving[list(stripes)] = False
        self._map[list(stripes)] = False

    def begin_count(self) -> None:
        """Ask the device, without waiting, where the slots lie that came back since the last count."""
        if self._withheld and self._freed and self._counting is None:
            self._mark(torch.cat((self._none, *self._freed)))
            self._freed, self._freed_blocks = [], 0
            self._counting = _Counting(self._map.sum(1))

    def finish_count(self, *, wait: bool = False) -> bool:
        """Take in the count asked for, if the device has answered; True unless an answer is outstanding."""
        if self._counting is None:
            return True
        if not wait and not self._counting.answered():
            return False
        counted, self._counting = self._counting.read(), None
        self._deal(counted)
        return True

    def settle(self) -> None:
        """Make `available` and `withheld` exact, waiting for the device if stripes are being emptied."""
        self._require_open()
        self.finish_count(wait=True)
        self.begin_count()
        self.finish_count(wait=True)

    def emptied(self) -> list[int]:
        """Stripes being emptied that hold no used slot any more, as last counted."""
        return [stripe for stripe, free in self._withheld.items() if free == self._free_when_empty(stripe)]

    def on_leaving(self, slots: torch.Tensor) -> torch.Tensor:
        """Which of these slots must be freed for the stripes being emptied. Stays on the device."""
        return self._leaving[slots // self.slots_per_stripe]

    def to_free(self) -> torch.Tensor:
        """The slots in use on stripes being emptied. Waits for the device."""
        self.settle()
        held = (self._leaving.unsqueeze(1) & ~self._map).view(-1)
        blocks = held.nonzero().view(-1)
        blocks = blocks[blocks > 0]
        return (blocks.unsqueeze(1) * self.block_slots + self._within).view(-1)

    def tally(self, slots: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """How many of these slots, or how much weight, each stripe holds. Stays on the device."""
        totals = torch.zeros(len(self._map), dtype=torch.int64 if weights is None else weights.dtype, device=self.device)
        stripes = slots // self.slots_per_stripe
        return totals.index_add_(0, stripes, torch.ones_like(slots) if weights is None else weights)

    def order(self) -> None:
        """Put the free list in order, fullest stripe first. Happens by itself; an idle owner may ask for it."""
        self._calls = self._unordered_blocks = 0
        if not self._withheld and self._counting is None:
            free = self._left + self._freed_blocks
            self._gather()
            self._set_ready(self._marked(torch.argsort(self._map.sum(1), stable=True), free))
            self._flat.zero_()

    def close(self) -> None:
        self._closed = True
        self._drop_lists()
        self._withheld.clear()
        self._present.clear()

    # How it is done. Blocks from here on.

    @property
    def _total_blocks(self) -> int:
        return len(self._present) * self._rows - (0 in self._present)

    def _free_when_empty(self, stripe: int) -> int:
        return self._rows - (stripe == 0)

    def _take(self, blocks: int) -> torch.Tensor | None:
        if blocks > self._left and not self._replenish(blocks):
            return None
        at = self._at
        self._at = end = at + blocks
        self._left -= blocks
        self._used_blocks += blocks
        taken = self._ready[at:end]
        if self._out is not None:
            self._out[taken] = True
        return taken

    def _take_back(self, blocks: torch.Tensor) -> None:
        if self._closed:
            self._require_open()
        if self._out is not None:
            self._require_out(blocks)
        count = blocks.numel()
        self._freed.append(blocks)
        self._freed_blocks += count
        self._used_blocks -= count
        self._unordered_blocks += count
        self._calls += 1
        if self._calls >= self.calls_between_orderings and self._is_out_of_order():
            self.order()

    def _is_out_of_order(self) -> bool:
        return self._unordered_blocks >= _FREED_BETWEEN_ORDERINGS * (self._left + self._freed_blocks)

    def _replenish(self, blocks: int) -> bool:
        """Put what came back at the end of the list."""
        self._require_open()
        if self._withheld or self._counting is not None:
            # Only here may handing out wait for the device: stripes are leaving, and the list is short.
            self.settle()
        elif blocks <= self._left + self._freed_blocks:
            self._set_ready(torch.cat((self._rest(), *self._freed)))
            self._freed, self._freed_blocks = [], 0
        return blocks <= self._left

    def _count_all(self) -> list[int]:
        """Everything in the map, and counted; `_deal` must follow."""
        self.settle()
        self._gather()
        return _Counting(self._map.sum(1)).read()

    def _gather(self) -> None:
        """Every free block into the map."""
        self._mark(torch.cat((self._rest(), *self._freed)))
        self._drop_lists()

    def _deal(self, counted: list[int]) -> None:
        """From the map to the list, in order; what lies on leaving stripes stays in the map."""
        for stripe in self._withheld:
            self._withheld[stripe] = counted[stripe]
        free = sum(counted) - sum(self._withheld.values())
        self._require_consistent(self._left + self._freed_blocks + sum(counted))
        if free:
            fullest_first = sorted(
                (s for s, n in enumerate(counted) if n and s not in self._withheld), key=lambda s: counted[s]
            )
            dealt = self._marked(torch.tensor(fullest_first, device=self.device), free)
            self._flat.index_fill_(0, dealt, False)
            self._set_ready(torch.cat((self._rest(), dealt)))

    def _marked(self, by_fullness: torch.Tensor, free: int) -> torch.Tensor:
        """The `free` marked blocks of these stripes: stripe by stripe, ascending within each."""
        marked = self._map.index_select(0, by_fullness)
        numbers = self._numbers.index_select(0, by_fullness)
        if self._on_host:
            blocks = numbers.masked_select(marked)
            self._require_consistent(free - len(blocks), expected=0)
            return blocks
        # A mask would have to ask the device how many it selects; the host knows.
        torch._assert_async(marked.sum() == free)
        places = torch.nonzero_static(marked.view(-1), size=free, fill_value=0).view(-1)
        return numbers.view(-1).index_select(0, places)

    def _mark(self, blocks: torch.Tensor) -> None:
        self._flat.index_fill_(0, blocks, True)

    def _rest(self) -> torch.Tensor:
        return self._ready[self._at : self._at + self._left]

    def _set_ready(self, blocks: torch.Tensor) -> None:
        self._ready, self._at, self._left = blocks, 0, len(blocks)

    def _drop_lists(self) -> None:
        self._set_ready(self._none)
        self._freed, self._freed_blocks = [], 0

    def _blocks_of(self, stripes: Sequence[int]) -> torch.Tensor:
        """All blocks of ascending stripes but the very first: one slice for each run of neighbours."""
        runs: list[list[int]] = []
        for stripe in stripes:
            if runs and runs[-1][1] == stripe:
                runs[-1][1] += 1
            else:
                runs.append([stripe, stripe + 1])
        flat, rows = self._numbers.view(-1), self._rows
        return torch.cat([self._none, *(flat[max(1, first * rows) : end * rows] for first, end in runs)])

    def _require_out(self, blocks: torch.Tensor) -> None:
        assert self._out is not None
        if len(torch.unique(blocks)) != len(blocks) or not bool(self._out[blocks].all()):
            raise ValueError("a slot was freed twice, or was never handed out")
        self._out[blocks] = False

    def _require_consistent(self, free: int, *, expected: int | None = None) -> None:
        expected = self._total_blocks - self._used_blocks if expected is None else expected
        if free != expected:
            raise ValueError("a slot was freed twice, or was never handed out: free lists and counts disagree")

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the pool is closed")


def blocks_to_extend(prefix_lens: torch.Tensor, seq_lens: torch.Tensor, block_slots: int) -> int:
    """How many new blocks the requests need to grow from one length to the other. Lengths on the host."""
    return int(((seq_lens + (block_slots - 1)) // block_slots - (prefix_lens + (block_slots - 1)) // block_slots).sum())


def blocks_to_decode(seq_lens: torch.Tensor, block_slots: int) -> int:
    """How many requests begin a block with their newest token. Lengths, that token included, on the host."""
    return int((seq_lens % block_slots == 1).sum()) if block_slots > 1 else len(seq_lens)


class _Counting:
    """A small tensor on its way from the device to the host."""

    __slots__ = ("_event", "_host")

    def __init__(self, counts: torch.Tensor) -> None:
        self._event: Any = None
        if counts.device.type == "cpu":
            self._host = counts
            return
        self._host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        self._host.copy_(counts, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def answered(self) -> bool:
        return self._event is None or bool(self._event.query())

    def read(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        counts: list[int] = self._host.tolist()
        return counts

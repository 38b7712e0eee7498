"""The slots of an elastic pool, in the words of SGLang's own token allocators.

Stands where `TokenToKVPoolAllocator` (page size 1) and `PagedTokenToKVPoolAllocator` stand, and hands out slots of present
stripes only: admission, the decode gate and the leak checks ask `available_size` and so see what there is. Knows nothing of
limits, and decides nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator

from chimera.kv.slots import SlotAllocator, blocks_to_decode, blocks_to_extend


class Gate(Protocol):
    @property
    def retracts(self) -> bool:
        """Whether running requests have to yield now, so that it is worth asking."""

    def allows(self, new_tokens: int, requests_left: int) -> bool:
        """Whether the running requests may go on together."""


class ElasticAllocator(BaseTokenToKVPoolAllocator):  # type: ignore[misc]
    """`size` is the most there could ever be, as SGLang was told; what there is now is `slots`' to say."""

    def __init__(self, slots: SlotAllocator, *, size: int, page_size: int, dtype: torch.dtype, kvcache: Any) -> None:
        super().__init__(size, page_size, dtype, str(slots.device), kvcache, False)
        self.slots = slots
        self.kv: Gate | None = None
        """Who is asked, beside the free list, whether a decode step may go on."""
        self._held_back: list[torch.Tensor] | None = None
        self._blocks_held_back: list[torch.Tensor] = []

    def available_size(self) -> int:
        return self.slots.available

    def get_all_free_pages(self) -> None:
        """For SGLang's dumps of a leak; it takes this answer from pools that have no such list."""
        return

    def alloc(self, need_size: int) -> torch.Tensor | None:
        return self.slots.alloc(need_size)

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        if num_new_pages is None:
            num_new_pages = blocks_to_extend(prefix_lens_cpu, seq_lens_cpu, self.page_size)
        return self.slots.alloc_extend(prefix_lens, seq_lens, last_loc, new_tokens=extend_num_tokens, new_blocks=num_new_pages)

    def alloc_decode(self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
        return self.slots.alloc_decode(seq_lens, last_loc, new_blocks=blocks_to_decode(seq_lens_cpu, self.page_size))

    def free(self, free_index: torch.Tensor) -> None:
        if not free_index.numel():
            return
        if self._held_back is not None:
            self._held_back.append(free_index.clone())
        elif self.page_size == 1:
            self.slots.free(free_index)
        else:
            self.slots.free_scattered(free_index)

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        """A run of one request's row that begins a page: each page is named once, so nobody need ask the device."""
        if not free_index.numel():
            return
        if self._held_back is None:
            self.slots.free(free_index)
        else:
            self._blocks_held_back.append(free_index[:: self.page_size] // self.page_size)

    def free_page_ids(self, page_ids: torch.Tensor) -> None:
        if not page_ids.numel():
            return
        if self._held_back is None:
            self.slots.free_blocks(page_ids)
        else:
            self._blocks_held_back.append(page_ids.clone())

    def free_group_begin(self) -> None:
        self._held_back = []

    def free_group_end(self) -> None:
        pending, self._held_back = self._held_back, None
        blocks, self._blocks_held_back = self._blocks_held_back, []
        if pending:
            self.free(torch.cat(pending))
        if blocks:
            self.slots.free_blocks(torch.cat(blocks))

    def clear(self) -> None:
        self._held_back, self._blocks_held_back = None, []
        self.slots.clear()

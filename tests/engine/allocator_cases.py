"""SGLang's pools and allocators on elastic memory, against SGLang's own classes: the same calls, the same answers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SLOTS = 512


@pytest.fixture(scope="module", autouse=True)
def sglang() -> None:
    from chimera import standins

    standins.install()
    from chimera.engine.sglang import plugin

    plugin.activate()


@pytest.fixture
def kv() -> Iterator[Any]:
    from chimera.engine.sglang.elastic import ElasticKv

    made = ElasticKv(level_bytes=1 << 30, ceiling_bytes=1 << 30, on_cpu=True)
    yield made
    made.close()


def latent_pool(**settings: Any) -> Any:
    import torch
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    return MLATokenToKVPool(
        SLOTS,
        page_size=settings.pop("page_size", 1),
        dtype=torch.float32,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
        **settings,
    )


def heads_pool(page_size: int = 1, slots: int = SLOTS) -> Any:
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return MHATokenToKVPool(
        slots,
        page_size=page_size,
        dtype=torch.float32,
        head_num=2,
        head_dim=16,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
    )


def write_and_read(pool: Any, latent: bool) -> list[Any]:
    """Rows of chance written through SGLang's own door, and what each layer gives back."""
    import torch
    from sglang.srt.runtime_context import get_parallel

    torch.manual_seed(3)
    where = torch.randperm(SLOTS - 1)[:200] + 1
    read = []
    for layer in range(3):
        holder = SimpleNamespace(layer_id=layer, k_scale=None, v_scale=None)
        if latent:
            with get_parallel().override(dcp_enabled=False, attn_dcp_size=1):
                pool.set_kv_buffer(holder, where, torch.randn(200, 1, 96), None)
        else:
            pool.set_kv_buffer(holder, where, torch.randn(200, 2, 16), torch.randn(200, 2, 16))
        key, value = pool.get_kv_buffer(layer)
        read += [key[where].clone(), value[where].clone()]
    return read


@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latent"])
def test_a_pool_on_elastic_memory_reads_what_sglangs_own_reads(kv: Any, latent: bool) -> None:
    import torch
    from chimera.engine.sglang.plugin import elastic_memory

    make = latent_pool if latent else heads_pool
    with elastic_memory(kv):
        ours = make()
    theirs = make()
    for mine, own in zip(write_and_read(ours, latent), write_and_read(theirs, latent), strict=True):
        assert torch.equal(mine, own)


def allocators(kv: Any, page_size: int) -> tuple[Any, Any]:
    """Ours, and SGLang's with its Triton kernel replaced by SGLang's own reference for it."""
    import torch
    from chimera.engine.sglang.plugin import elastic_memory
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    with elastic_memory(kv):
        pool = heads_pool(page_size)
        ours = kv.allocator(size=SLOTS, page_size=page_size, dtype=torch.float32, kvcache=pool)
    if page_size == 1:
        return ours, TokenToKVPoolAllocator(SLOTS, torch.float32, "cpu", pool, False)

    class Reference(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
        def alloc_extend(self, prefix, prefix_cpu, seq, seq_cpu, last, tokens, num_new_pages=None):  # type: ignore[no-untyped-def]
            pages = int(((seq + page_size - 1) // page_size - (prefix + page_size - 1) // page_size).sum())
            if pages > len(self.free_pages):
                return None
            out = torch.empty(tokens, dtype=torch.int64)
            alloc_extend_naive(prefix, seq, last, self.free_pages, out, page_size, "cpu")
            self.free_pages = self.free_pages[pages:]
            return out

    return ours, Reference(SLOTS, page_size, torch.float32, "cpu", pool, False)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_an_allocator_counts_as_sglangs_own_through_a_life_of_requests(kv: Any, page_size: int) -> None:
    """Extend, decode, free, in groups and alone; slots of one request are its own, and pages hold one request's tokens."""
    import random

    ours, theirs = allocators(kv, page_size)
    chance = random.Random(page_size)
    spare = ours.available_size() - theirs.available_size()
    assert spare >= 0, "whole stripes may be more than SGLang asked for"
    rows: dict[int, tuple[Any, Any]] = {}
    for step in range(300):
        if rows and chance.random() < 0.4:
            mine, own = rows.pop(chance.choice(list(rows)))
            grouped = chance.random() < 0.5
            for allocator, row in ((ours, mine), (theirs, own)):
                if grouped:
                    allocator.free_group_begin()
                allocator.free(row)
                if grouped:
                    allocator.free_group_end()
        else:
            extend(ours, theirs, rows, step, page_size, chance)
        assert ours.available_size() - theirs.available_size() == spare
        held = [slot for mine, _ in rows.values() for slot in mine.tolist()]
        assert len(held) == len(set(held)) and 0 not in held
        pages = [{slot // page_size for slot in mine.tolist()} for mine, _ in rows.values()]
        assert sum(map(len, pages)) == len(set().union(*pages)) if pages else True
        for mine, _ in rows.values():
            assert all(slot % page_size == at % page_size for at, slot in enumerate(mine.tolist()))


def extend(ours: Any, theirs: Any, rows: dict[int, tuple[Any, Any]], step: int, page_size: int, chance: Any) -> None:
    """A new request, or more tokens for one that is there."""
    import torch

    key = chance.choice([*rows, step])
    pair = rows.get(key, (torch.empty(0, dtype=torch.int64),) * 2)
    had, more = len(pair[0]), chance.randrange(1, 40)
    if theirs.available_size() < more + page_size:
        return
    grown = []
    for allocator, row in zip((ours, theirs), pair, strict=True):
        if page_size == 1:
            new = allocator.alloc(more)
        else:
            prefix, total = torch.tensor([had]), torch.tensor([had + more])
            last = row[-1:] if had else torch.tensor([-1])
            new = allocator.alloc_extend(prefix, prefix, total, total, last, more)
        assert new is not None and len(new) == more
        grown.append(torch.cat((row, new)))
    rows[key] = (grown[0], grown[1])


def test_a_decode_step_continues_a_page_and_begins_the_next(kv: Any) -> None:
    import torch

    ours, _ = allocators(kv, 4)
    prefix, total = torch.tensor([0, 0]), torch.tensor([4, 6])
    slots = ours.alloc_extend(prefix, prefix, total, total, torch.tensor([-1, -1]), 10)
    lengths = total + 1
    new = ours.alloc_decode(lengths, lengths, torch.stack((slots[3], slots[9])))
    assert new[0] % 4 == 0 and new[0] // 4 not in set((slots // 4).tolist())
    assert new[1] == slots[9] + 1


def test_kv_of_four_bits_is_refused_with_what_to_change(kv: Any) -> None:
    from chimera.engine.api import CannotServe
    from chimera.engine.sglang import plugin

    quantised = SimpleNamespace(is_quantized_kv_cache=True, quant_method=SimpleNamespace(name="nvfp4"), kv_cache_layout="nhd")
    with plugin.elastic_memory(kv), pytest.raises(CannotServe, match="nvfp4 cannot have elastic memory: set elastic to false"):
        plugin._create_heads(lambda pool: None, quantised)


def test_the_request_that_came_last_yields_first(kv: Any) -> None:
    from chimera.engine.sglang import plugin
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    with plugin.elastic_memory(kv):
        pass
    # SGLang takes from the end of this list, and by itself would keep whoever has said most.
    came = [SimpleNamespace(priority=-turn, output_ids=[0] * turn, origin_input_ids=[0]) for turn in (3, 1, 2)]
    assert ScheduleBatch._get_decode_retraction_order(came) == [1, 2, 0]


def test_a_pool_in_lockstep_grows_by_what_all_ranks_can_have_and_keeps_nothing_beyond() -> None:
    from chimera.engine.api import Limit
    from chimera.engine.sglang.elastic import ElasticKv
    from chimera.engine.sglang.plugin import elastic_memory

    kv = ElasticKv(level_bytes=1, ceiling_bytes=4 << 20, on_cpu=True, in_lockstep=True)
    try:
        with elastic_memory(kv):
            heads_pool(slots=8 * SLOTS)
        stripe_bytes = kv.held_bytes
        kv.limit(Limit(4 << 20))
        offered: list[int] = []

        def others_have_room_for_two(mine: int) -> int:
            offered.append(mine)
            return min(mine, 2)

        kv.agree = others_have_room_for_two
        kv._grow(5)
        assert (offered, kv.held_bytes) == ([5], 3 * stripe_bytes)
    finally:
        kv.close()

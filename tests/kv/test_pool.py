"""The pool as its owner sees it: grow, shrink, call back, let go, close."""

from __future__ import annotations

import ctypes
import errno

import pytest
import torch
from chimera.errors import DriverError
from chimera.kv.budget import Budget
from chimera.kv.layout import Interleaved, KvKind, PerLayer
from chimera.kv.pool import ElasticPool
from chimera.kv.victims import StripeState, StripeView, cheapest
from chimera.vmm.fake import FakeDriver
from chimera.vmm.host import HostDriver

from tests.kv.builders import GRANULE, KIND, alloc, layout_of, pool_of, reserve_for, stripes_of


def test_a_pool_begins_without_memory_and_its_first_stripe_is_number_0() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver)
    assert (pool.present_stripes, driver.created_bytes, pool.slots.available) == (0, 0, 0)
    assert pool.grow(1) == 1
    assert pool.slots.available == pool.layout.slots_per_stripe - 1
    assert stripes_of(pool, alloc(pool, pool.slots.available)) == {0}


def test_growing_maps_new_neighbours_in_one_call() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver)
    pool.grow(6)
    assert (driver.calls["map"], driver.calls["create"]) == (1, 1)


def test_growing_past_the_lease_brings_what_the_lease_allows() -> None:
    pool = pool_of(8, lease=3)
    assert pool.grow(5) == 3
    assert pool.grow(1) == 0
    pool.reserve.budget.limit_bytes += 2 * pool.stripe_bytes
    assert pool.grow(5) == 2


def test_growing_past_the_addresses_brings_what_they_hold() -> None:
    pool = pool_of(4, lease=100)
    assert pool.grow(7) == 4
    assert pool.grow(1) == 0
    assert pool.reserve.budget.held_bytes == 4 * pool.stripe_bytes


def test_stripes_stocked_ahead_are_charged_and_are_the_next_to_come() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver, lease=3)
    assert pool.reserve.stock(2) == pool.reserve.stock(1) == 2
    assert pool.reserve.budget.held_bytes == 2 * pool.stripe_bytes
    assert pool.reserve.stock(5) == 3, "no more than the lease"
    driver.refuse("create")
    assert pool.grow(3) == 3


def test_a_stock_that_the_driver_refuses_is_as_large_as_it_was() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver)
    pool.reserve.stock(1)
    driver.refuse("create")
    assert pool.reserve.stock(4) == 1
    assert pool.reserve.budget.held_bytes == pool.stripe_bytes


@pytest.mark.parametrize("stripes", [0, -3])
def test_growing_or_shrinking_by_nothing_does_nothing(stripes: int) -> None:
    pool = pool_of(8)
    pool.grow(2)
    assert pool.grow(stripes) == 0
    assert pool.shrink(stripes) == []
    assert pool.staying_stripes == 2


def test_an_idle_pool_shrinks_in_one_tick_but_keeps_stripe_0() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver)
    pool.grow(8)
    assert sorted(pool.shrink(99)) == list(range(1, 8))
    assert pool.tick() == 7
    assert (pool.present_stripes, driver.created_bytes) == (1, GRANULE)
    assert pool.reserve.budget.held_bytes == GRANULE


def test_shrinking_below_what_is_in_use_waits_for_it() -> None:
    pool = pool_of(4)
    pool.grow(4)
    row = alloc(pool, pool.slots.available)
    assert len(pool.shrink(2)) == 2
    assert pool.tick() == 0
    assert pool.present_stripes == 4
    leaving = pool.slots.on_leaving(row)
    pool.slots.free(row[leaving])
    assert pool.tick() == 2
    assert pool.present_stripes == 2
    assert pool.slots.used == int((~leaving).sum())


def test_any_stripe_but_0_may_leave_and_its_number_is_used_again() -> None:
    """Capacity is not a prefix."""
    pool = pool_of(4)
    pool.grow(4)
    row = alloc(pool, pool.slots.available)
    pool.slots.free(row[stripe_of(pool, row) == 1])
    assert pool.shrink(1) == [1]
    assert pool.tick() == 1
    assert pool.slots.alloc(1) is None
    assert pool.grow(1) == 1
    assert stripes_of(pool, alloc(pool, pool.layout.slots_per_stripe)) == {1}


def test_a_grow_calls_back_what_is_still_leaving_before_it_maps() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(6, driver=driver)
    pool.grow(4)
    row = alloc(pool, pool.slots.available)
    leaving = pool.shrink(3)
    kept = row[stripe_of(pool, row) != leaving[0]]
    pool.slots.free(row[stripe_of(pool, row) == leaving[0]])
    maps = driver.calls["map"]
    assert pool.grow(2) == 2
    assert driver.calls["map"] == maps
    assert pool.leaving == {leaving[0]}, "the stripes with the most in use are called back first"
    assert pool.tick() == 1
    assert pool.slots.used == len(kept)
    assert pool.grow(1) == 1


def test_a_stripe_called_back_while_it_waits_for_its_fence_stays() -> None:
    passed = False
    pool = pool_of(4, fence=lambda: lambda: passed)
    pool.grow(3)
    pool.shrink(2)
    assert pool.tick() == 0
    assert pool.grow(2) == 2
    passed = True
    assert pool.tick() == 0
    assert (pool.staying_stripes, pool.slots.available) == (3, 3 * pool.layout.slots_per_stripe - 1)


def test_one_of_two_that_wait_for_their_fence_may_be_called_back() -> None:
    passed = False
    pool = pool_of(4, fence=lambda: lambda: passed)
    pool.grow(3)
    (first, second) = pool.shrink(2)
    pool.tick()
    assert pool.grow(1) == 1
    passed = True
    assert pool.tick() == 1
    assert len({first, second} & {view.stripe for view in pool.census() if view.state is StripeState.MAPPED}) == 1


def test_an_empty_stripe_is_unmapped_only_after_the_last_launched_step() -> None:
    launched, finished = 3, 2
    driver = FakeDriver(GRANULE)

    def fence():  # type: ignore[no-untyped-def]
        last = launched
        return lambda: finished >= last

    pool = pool_of(4, driver=driver, fence=fence)
    pool.grow(4)
    pool.shrink(1)
    assert pool.tick() == 0
    launched = 9
    assert (pool.tick(), driver.calls["unmap"]) == (0, 0)
    finished = 3
    assert (pool.tick(), driver.calls["unmap"]) == (1, 1)


def test_the_stripes_with_the_least_value_go_first() -> None:
    pool = pool_of(5)
    pool.grow(5)
    assert sorted(pool.shrink(2, cheapest([0.0, 9.0, 1.0, 5.0, 0.5]))) == [2, 4]


def test_a_chooser_may_keep_stripes_but_not_name_others() -> None:
    pool = pool_of(4)
    pool.grow(4)
    assert pool.shrink(2, lambda candidates, count: []) == []
    for wrong in ([0], [1, 1], [7]):
        with pytest.raises(ValueError, match="not stripes that may be emptied"):
            pool.shrink(2, lambda candidates, count, wrong=wrong: wrong)
    assert pool.staying_stripes == 4


def test_a_census_tells_used_free_and_evictable_by_stripe() -> None:
    pool = pool_of(4)
    pool.grow(3)
    per = pool.layout.slots_per_stripe
    row = alloc(pool, per + 4)
    pool.shrink(1, lambda candidates, count: [2])
    views = pool.census(evictable=row[-5:])
    assert views[0] == StripeView(stripe=0, state=StripeState.MAPPED, used_slots=per - 1, free_slots=0)
    assert views[1] == StripeView(stripe=1, state=StripeState.MAPPED, used_slots=5, free_slots=per - 5, evictable_slots=5)
    assert views[2] == StripeView(stripe=2, state=StripeState.LEAVING, used_slots=0, free_slots=per)
    assert views[3] == StripeView(stripe=3, state=StripeState.ABSENT, used_slots=0, free_slots=0)


def test_resizing_names_a_level_and_asking_again_changes_nothing() -> None:
    pool = pool_of(8)
    assert pool.resize(5) == 5
    assert pool.resize(2) == 2
    assert pool.resize(2) == 2
    assert pool.resize(4) == 4, "two of the three that were leaving were called back"
    assert len(pool.leaving) == 1


def test_pools_of_several_kinds_share_one_lease() -> None:
    driver = FakeDriver(GRANULE)
    budget = Budget(6 * GRANULE)
    window = KvKind.heads(layers=1, kv_heads=1, head_dim=64, dtype=torch.float32)
    full, sliding = (
        ElasticPool(layout, reserve_for(layout, driver, budget=budget)) for layout in (layout_of(8), layout_of(8, kind=window))
    )
    assert full.layout.slots_per_stripe != sliding.layout.slots_per_stripe
    assert (full.grow(4), sliding.grow(4)) == (4, 2)
    full.shrink(3)
    full.tick()
    assert sliding.grow(4) == 3
    assert budget.held_bytes == driver.created_bytes == 6 * GRANULE


def test_a_lowered_lease_says_how_much_is_too_much() -> None:
    pool = pool_of(8)
    pool.grow(8)
    budget = pool.reserve.budget
    budget.limit_bytes = 5 * pool.stripe_bytes
    assert budget.excess_bytes == 3 * pool.stripe_bytes
    assert pool.grow(1) == 0
    pool.shrink(budget.excess_bytes // pool.stripe_bytes)
    pool.tick()
    assert budget.excess_bytes == 0


def test_a_refused_map_leaves_the_pool_as_it_was() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver)
    pool.grow(2)
    driver.refuse("map")
    with pytest.raises(DriverError):
        pool.grow(3)
    assert (pool.present_stripes, driver.created_bytes, pool.reserve.budget.held_bytes) == (2, 2 * GRANULE, 2 * GRANULE)
    assert pool.grow(3) == 3


def test_a_refused_create_leaves_the_pool_as_it_was() -> None:
    driver = FakeDriver(GRANULE, capacity_bytes=3 * GRANULE)
    pool = pool_of(8, driver=driver)
    pool.grow(2)
    with pytest.raises(DriverError) as refusal:
        pool.grow(3)
    assert refusal.value.code == errno.ENOMEM
    assert (pool.present_stripes, pool.reserve.budget.held_bytes) == (2, 2 * GRANULE)
    assert pool.grow(1) == 1


def test_a_refused_unmap_is_reported_and_the_stripe_stays_usable() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(4, driver=driver)
    pool.grow(4)
    pool.shrink(1)
    driver.refuse("unmap")
    with pytest.raises(DriverError):
        pool.tick()
    assert pool.staying_stripes == 4
    assert pool.slots.available == 4 * pool.layout.slots_per_stripe - 1
    assert len(pool.shrink(1)) == 1
    assert pool.tick() == 1


def test_mapping_a_mapped_stripe_is_refused_by_the_driver_below() -> None:
    """The pool never asks for it; if its notes were wrong, the range's own would say so."""
    pool = pool_of(4)
    pool.grow(2)
    pool._states[1] = StripeState.ABSENT
    with pytest.raises(DriverError, match="mapped already"):
        pool.grow(1)
    assert pool.reserve.budget.held_bytes == 2 * pool.stripe_bytes


def test_close_gives_back_everything_even_what_is_in_use_and_leaving() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver)
    pool.grow(6)
    alloc(pool, 40)
    pool.shrink(3)
    pool.close()
    assert (driver.created_bytes, pool.reserve.budget.held_bytes, pool.present_stripes) == (0, 0, 0)
    pool.close()


def test_what_is_lifted_to_the_host_comes_down_on_other_slots() -> None:
    kind = KvKind.heads(layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)
    pool = pool_of(4, driver=HostDriver(GRANULE))
    pool.grow(4)
    first = alloc(pool, 40)
    for layers in pool.tensors().values():
        for layer in layers:
            layer[first] = torch.randn(layer[first].shape)
    wanted = [layer[first].clone() for layers in pool.tensors().values() for layer in layers]
    contents = pool.lift(first)
    assert sum(rows.nbytes for rows in contents) == 40 * pool.slot_bytes == 40 * kind.token_bytes
    pool.vacate()
    pool.grow(3)
    alloc(pool, 7)
    second = alloc(pool, 40)
    assert set(second.tolist()) != set(first.tolist())
    pool.lower(second, contents)
    assert all(
        torch.equal(layer[second], its)
        for layer, its in zip([layer for layers in pool.tensors().values() for layer in layers], wanted, strict=True)
    )
    pool.close()


def test_a_vacated_pool_has_its_addresses_and_nothing_else_and_begins_anew() -> None:
    driver = FakeDriver(GRANULE)
    pool = pool_of(8, driver=driver)
    pool.grow(6)
    alloc(pool, 40)
    pool.shrink(3)
    tensors = pool.tensors()
    pool.vacate()
    assert (driver.created_bytes, pool.reserve.budget.held_bytes, pool.slots.total) == (0, 0, 0)
    assert pool.grow(2) == 2
    assert stripes_of(pool, alloc(pool, 40)) == {0, 1}
    assert [layer.data_ptr() for layer in pool.tensors()["k"]] == [layer.data_ptr() for layer in tensors["k"]]
    pool.close()


def test_a_closed_pool_answers_every_call_with_an_error() -> None:
    pool = pool_of(4)
    pool.grow(2)
    pool.close()
    for call in (
        lambda: pool.grow(1),
        lambda: pool.shrink(1),
        pool.tick,
        pool.census,
        pool.tensors,
        lambda: pool.slots.alloc(1),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_reserve_of_another_make_is_refused() -> None:
    driver = FakeDriver(GRANULE)
    small, large = layout_of(4), layout_of(4, block_slots=1, kind=KvKind.latent(40, 576, torch.bfloat16))
    with pytest.raises(ValueError, match="the layout wants"):
        ElasticPool(large, reserve_for(small, driver))


class TestTensors:
    @pytest.mark.parametrize("layout_class", [Interleaved, PerLayer])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    def test_every_layer_keeps_what_is_written_to_present_slots(self, layout_class, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
        kind = KvKind.heads(layers=3, kv_heads=2, head_dim=48, dtype=dtype, v_head_dim=16)
        layout = layout_class(kind, slots=9000, granularity=GRANULE, stripe_bytes=GRANULE)
        with HostDriver(GRANULE) as driver:
            pool = ElasticPool(layout, reserve_for(layout, driver))
            tensors = pool.tensors()
            pool.grow(2)
            row = alloc(pool, pool.slots.available)
            written = {}
            for name, layers in tensors.items():
                for layer, tensor in enumerate(layers):
                    assert tensor.shape == (layout.stripes * layout.slots_per_stripe, 2, 48 if name == "k" else 16)
                    values = torch.randn(len(row), *tensor.shape[1:]).to(dtype)
                    tensor.view(torch.uint8 if dtype.itemsize == 1 else dtype)[row] = (
                        values.view(torch.uint8) if dtype.itemsize == 1 else values
                    )
                    written[name, layer] = values
            for (name, layer), values in written.items():
                assert torch.equal(tensors[name][layer][row].float(), values.float())
            pool.close()

    def test_latent_attention_has_one_plane(self) -> None:
        kind = KvKind.latent(layers=2, width=576, dtype=torch.bfloat16)
        layout = PerLayer(kind, slots=4096, granularity=GRANULE, stripe_bytes=GRANULE)
        with HostDriver(GRANULE) as driver:
            pool = ElasticPool(layout, reserve_for(layout, driver))
            pool.grow(1)
            (tensors,) = pool.tensors().values()
            assert [tuple(t.shape[1:]) for t in tensors] == [(1, 576)] * 2
            tensors[1][5] = 3.0
            assert tensors[1][5].eq(3.0).all() and tensors[0][5].eq(0.0).all()
            pool.close()

    def test_addresses_stay_while_stripes_come_and_go(self) -> None:
        layout = layout_of(8)
        with HostDriver(GRANULE) as driver:
            pool = ElasticPool(layout, reserve_for(layout, driver))
            pool.grow(4)
            before = [t.data_ptr() for t in pool.tensors()["k"]]
            keys = pool.tensors()["k"][1]
            row = alloc(pool, pool.slots.available)
            keys[row] = 1.0
            pool.shrink(2)
            pool.slots.free(row[pool.slots.on_leaving(row)])
            kept = row[~pool.slots.on_leaving(row)]
            pool.tick()
            pool.grow(3)
            assert [t.data_ptr() for t in pool.tensors()["k"]] == before
            assert keys[kept].eq(1.0).all()
            pool.close()


class TestMoving:
    @pytest.mark.parametrize("layout_class", [Interleaved, PerLayer])
    @pytest.mark.parametrize("block", [1, 16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
    def test_what_leaving_stripes_hold_moves_with_its_contents(self, layout_class, block: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
        kind = KvKind.heads(layers=2, kv_heads=1, head_dim=33, dtype=dtype, v_head_dim=7)
        sizes = {"granularity": GRANULE, "block_slots": block, "stripe_bytes": GRANULE}
        per = layout_class(kind, slots=1, **sizes).slots_per_stripe
        layout = layout_class(kind, slots=4 * per, **sizes)
        with HostDriver(GRANULE) as driver:
            pool = ElasticPool(layout, reserve_for(layout, driver), block_slots=block)
            pool.grow(4)
            row = alloc(pool, pool.slots.available)
            planes = [tensor.view(torch.uint8) for layers in pool.tensors().values() for tensor in layers]
            written = [torch.randint(0, 255, (len(row), *plane.shape[1:]), dtype=torch.uint8) for plane in planes]
            for plane, values in zip(planes, written, strict=True):
                plane[row] = values
            keep = len(row) // block // 2 * block
            pool.slots.free(row[keep:])
            row = row[:keep]
            assert len(pool.shrink(1, lambda candidates, count: [1])) == 1
            leaving = pool.slots.on_leaving(row)
            moved = pool.move(row[leaving])
            assert moved is not None
            row[leaving] = moved
            assert stripes_of(pool, row).isdisjoint({1})
            assert pool.tick() == 1
            for plane, values in zip(planes, written, strict=True):
                assert torch.equal(plane[row], values[:keep])
            assert len(set(row.tolist())) == keep
            pool.close()

    def test_nothing_moves_where_nothing_is_free(self) -> None:
        pool = pool_of(2)
        pool.grow(2)
        row = alloc(pool, pool.slots.available)
        pool.shrink(1)
        assert pool.move(row[pool.slots.on_leaving(row)]) is None
        assert pool.slots.used == len(row)


def test_stripes_with_nothing_that_must_stay_go_before_emptier_ones() -> None:
    pool = pool_of(3)
    pool.grow(3)
    per = pool.layout.slots_per_stripe
    row = alloc(pool, pool.slots.available)
    pool.slots.free(row[-4:])
    cached = row[stripe_of(pool, row) == 1]
    assert len(cached) == per
    assert pool.shrink(1, evictable=cached) == [1]


class TestContentsNeverCross:
    def test_what_one_replica_wrote_the_next_cannot_read_from_the_reserve(self) -> None:
        driver = FakeDriver(GRANULE)
        layout = layout_of(8)
        reserve = reserve_for(layout, driver, high=4)
        first = ElasticPool(layout, reserve)
        first.grow(4)
        for offset in list(first._arena._range.mapped):
            driver.write(first._arena._range, offset, "the first one's secret")
        first.shrink(2)
        first.tick()
        first.close()
        assert reserve.ready_stripes == 4
        created = driver.calls["create"]
        second = ElasticPool(layout, reserve)
        second.grow(4)
        assert driver.calls["create"] == created, "the second one got the first one's memory"
        where = second._arena._range
        assert [driver.read(where, offset) for offset in where.mapped] == [""] * 4

    @pytest.mark.parametrize("high", [0, 4])
    def test_on_a_real_machine_the_bytes_are_zeros(self, high: int) -> None:
        layout = layout_of(4)
        with HostDriver(GRANULE) as driver:
            reserve = reserve_for(layout, driver, high=high)
            first = ElasticPool(layout, reserve)
            first.grow(4)
            ctypes.memset(first._arena.address, 0x5A, 4 * GRANULE)
            first.shrink(1)
            first.tick()
            first.close()
            assert driver.file_bytes == 0
            second = ElasticPool(layout, reserve)
            second.grow(4)
            assert ctypes.string_at(second._arena.address, 4 * GRANULE) == bytes(4 * GRANULE)
            second.close()
            reserve.close()


class TestTheReserve:
    def test_growing_takes_what_is_ready_before_it_creates(self) -> None:
        driver = FakeDriver(GRANULE)
        layout = layout_of(8)
        reserve = reserve_for(layout, driver, low=2, high=4)
        reserve.work()
        assert (reserve.ready_stripes, driver.calls["create"]) == (4, 1)
        pool = ElasticPool(layout, reserve)
        assert pool.grow(3) == 3
        assert (reserve.ready_stripes, driver.calls["create"]) == (1, 1)
        pool.tick()
        assert reserve.ready_stripes == 4

    def test_ready_stripes_count_against_the_lease(self) -> None:
        driver = FakeDriver(GRANULE)
        layout = layout_of(8)
        budget = Budget(5 * GRANULE)
        reserve = reserve_for(layout, driver, budget=budget, low=2, high=4)
        pool = ElasticPool(layout, reserve)
        pool.grow(3)
        pool.tick()
        assert (reserve.ready_stripes, budget.held_bytes) == (2, 5 * GRANULE)
        assert pool.grow(4) == 2

    def test_a_recall_first_takes_what_is_ready(self) -> None:
        layout = layout_of(8)
        reserve = reserve_for(layout, FakeDriver(GRANULE), low=2, high=4)
        reserve.work()
        assert reserve.trim(1) == 3
        assert reserve.budget.held_bytes == GRANULE

    def test_a_refused_refill_is_told_to_the_owner_and_tried_again(self) -> None:
        driver = FakeDriver(GRANULE)
        layout = layout_of(8)
        pool = ElasticPool(layout, reserve_for(layout, driver, low=2, high=4))
        pool.grow(1)
        driver.refuse("create")
        with pytest.raises(DriverError):
            pool.tick()
        assert pool.reserve.budget.held_bytes == GRANULE
        pool.tick()
        assert pool.reserve.ready_stripes == 4

    def test_marks_are_in_order(self) -> None:
        with pytest.raises(ValueError, match="low ≤ high"):
            reserve_for(layout_of(4), FakeDriver(GRANULE), low=3, high=2)

    def test_a_thread_refills_and_sees_off_without_its_owner(self) -> None:
        layout = layout_of(16)
        with HostDriver(GRANULE) as driver:
            reserve = reserve_for(layout, driver, low=2, high=4)
            reserve.start()
            pool = ElasticPool(layout, reserve)
            pool.grow(10)
            pool.tensors()["k"][0][alloc(pool, pool.slots.available)] = 1.0
            pool.slots.clear()
            pool.shrink(9)
            pool.tick()
            reserve.settle()
            assert pool.tick() == 9
            assert driver.file_bytes <= 2 * GRANULE
            assert pool.grow(5) == 5
            pool.close()
            reserve.close()
            assert (driver.created_bytes, reserve.budget.held_bytes) == (0, 0)

    def test_close_finishes_what_the_thread_was_asked(self) -> None:
        layout = layout_of(16)
        with HostDriver(GRANULE) as driver:
            reserve = reserve_for(layout, driver)
            reserve.start()
            pool = ElasticPool(layout, reserve)
            pool.grow(16)
            pool.shrink(15)
            pool.tick()
            pool.close()
            reserve.close()
            assert driver.created_bytes == 0


def stripe_of(pool: ElasticPool, row: torch.Tensor) -> torch.Tensor:
    return row // pool.layout.slots_per_stripe


def test_the_kind_of_the_builders_is_two_kib_a_token() -> None:
    assert KIND.token_bytes == 2048

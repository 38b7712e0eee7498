"""Any order of growing, shrinking, handing out and taking back: the promises of the pool hold after every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chimera.errors import DriverError
from chimera.kv.budget import Budget
from chimera.kv.fence import Passed
from chimera.kv.pool import ElasticPool
from chimera.kv.slots import blocks_to_extend
from chimera.kv.victims import StripeState
from chimera.vmm.fake import FakeDriver
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.kv.builders import GRANULE, layout_of, reserve_for

STRIPES = 6


class PoolMachine(RuleBasedStateMachine):
    """One pool on the fake driver, and a plain set of what was handed out."""

    @initialize(
        block=st.sampled_from([1, 16]),
        lease=st.integers(1, STRIPES + 2),
        marks=st.sampled_from([(0, 0), (1, 2)]),
        first=st.integers(1, STRIPES),
    )
    def open(self, block: int, lease: int, marks: tuple[int, int], first: int) -> None:
        self.driver = FakeDriver(GRANULE)
        layout = layout_of(STRIPES, block_slots=block)
        low, high = marks
        reserve = reserve_for(layout, self.driver, budget=Budget(lease * GRANULE), low=low, high=high)
        self.pool = ElasticPool(layout, reserve, block_slots=block, fence=self.fence)
        self.per = layout.slots_per_stripe
        self.block = block
        self.step_launched = self.step_ended = 0
        self.rows: list[list[int]] = []
        self.secrets = 0
        self.grow(first)

    def fence(self) -> Passed:
        launched = self.step_launched
        return lambda: self.step_ended >= launched

    # What an owner does.

    @rule(stripes=st.integers(1, STRIPES))
    def grow(self, stripes: int) -> None:
        before = self.pool.staying_stripes
        gained = self.pool.grow(stripes)
        assert 0 <= gained <= stripes
        assert self.pool.staying_stripes == before + gained
        for offset in self.where.mapped:
            if self.driver.read(self.where, offset) == "":
                self.secrets += 1
                self.driver.write(self.where, offset, f"secret {self.secrets}")

    @rule(stripes=st.integers(1, STRIPES))
    def shrink(self, stripes: int) -> None:
        before = self.pool.staying_stripes
        chosen = self.pool.shrink(stripes)
        assert len(chosen) == min(stripes, max(0, before - 1))

    @rule(stripes=st.integers(0, STRIPES), call=st.sampled_from(["map", "unmap", "create", "scrub"]))
    def grow_and_tick_while_the_driver_refuses(self, stripes: int, call: str) -> None:
        self.driver.refuse(call)
        for act in (lambda: self.pool.grow(stripes), self.pool.tick):
            try:
                act()
            except DriverError as error:
                assert error.detail == "told to refuse"
        self.driver._refusals.clear()

    @rule(limit=st.integers(0, STRIPES + 2))
    def move_the_lease(self, limit: int) -> None:
        self.pool.reserve.budget.limit_bytes = limit * GRANULE

    @rule()
    def trim(self) -> None:
        self.pool.reserve.trim()

    @rule()
    def launch_a_step(self) -> None:
        self.step_launched += 1

    @rule()
    def end_a_step(self) -> None:
        self.step_ended = self.step_launched
        self.pool.tick()

    @rule()
    def tick(self) -> None:
        self.pool.tick()

    # What an engine does.

    @rule(blocks=st.integers(1, 8) | st.integers(1, 40))
    def alloc(self, blocks: int) -> None:
        self.take(self.pool.slots.alloc(blocks * self.block), blocks * self.block)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=st.integers(1, 40))
    def extend(self, data: st.DataObject, tokens: int) -> None:
        row = data.draw(st.sampled_from(self.rows))
        prefix, seq = torch.tensor([len(row)]), torch.tensor([len(row) + tokens])
        new_blocks = blocks_to_extend(prefix, seq, self.block)
        got = self.pool.slots.alloc_extend(prefix, seq, torch.tensor([row[-1]]), new_tokens=tokens, new_blocks=new_blocks)
        if got is not None:
            row.extend(got.tolist())

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        self.pool.slots.free(torch.tensor(row, dtype=torch.int64))

    @precondition(lambda self: self.rows)
    @rule()
    def evict_what_leaving_stripes_hold(self) -> None:
        keep = []
        for row in self.rows:
            slots = torch.tensor(row, dtype=torch.int64)
            if bool(self.pool.slots.on_leaving(slots).any()):
                self.pool.slots.free(slots)
            else:
                keep.append(row)
        self.rows = keep
        assert self.pool.slots.to_free().tolist() == []

    @rule()
    def order(self) -> None:
        self.pool.slots.order()

    @precondition(lambda self: len(self.rows) > 4)
    @rule()
    def flush(self) -> None:
        self.pool.slots.clear()
        self.rows = []

    @precondition(lambda self: len(self.rows) > 4)
    @rule()
    def vacate(self) -> None:
        self.pool.vacate()
        self.rows = []
        assert (self.driver.created_bytes, self.pool.present_stripes) == (0, 0)

    def take(self, got: torch.Tensor | None, wanted: int) -> None:
        if got is None:
            self.pool.slots.settle()
            assert self.pool.slots.available < wanted
        else:
            self.rows.append(got.tolist())

    # What must hold.

    @property
    def where(self) -> Any:
        return self.pool._arena._range

    def blocks_out(self) -> list[int]:
        return [row[at] // self.block for row in self.rows for at in range(0, len(row), self.block)]

    @invariant()
    def no_block_is_out_twice_or_on_a_stripe_without_memory(self) -> None:
        blocks = self.blocks_out()
        assert len(set(blocks)) == len(blocks)
        assert 0 not in blocks
        mapped = {offset // GRANULE for offset in self.where.mapped}
        assert {block * self.block // self.per for block in blocks} <= mapped

    @invariant()
    def what_is_mapped_is_what_the_pool_says(self) -> None:
        states = self.pool._states
        assert {offset // GRANULE for offset in self.where.mapped} == {
            s for s, x in enumerate(states) if x != StripeState.ABSENT
        }
        assert self.pool.present_stripes == 0 or states[0] == StripeState.MAPPED
        assert {s for s, x in enumerate(states) if x == StripeState.LEAVING} == self.pool.leaving

    @invariant()
    def every_created_byte_is_charged_and_somewhere(self) -> None:
        held = (self.pool.present_stripes + self.pool.reserve.ready_stripes) * GRANULE
        assert self.pool.reserve.budget.held_bytes == self.driver.created_bytes == held

    @invariant()
    def slots_add_up(self) -> None:
        slots = self.pool.slots
        assert slots.used == len(self.blocks_out()) * self.block
        assert slots.available + slots.used + slots.withheld <= slots.total
        if not slots.leaving:
            assert slots.available + slots.used == slots.total

    @invariant()
    def nothing_in_the_reserve_has_contents(self) -> None:
        mapped = set(self.where.mapped.values())
        assert set(self.driver._contents) <= mapped

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()
            self.pool.reserve.close()
            assert self.driver.created_bytes == 0
            assert self.pool.reserve.budget.held_bytes == 0
            assert self.driver._contents == {}


QUICK = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


def test_the_promises_hold_whatever_the_order() -> None:
    run_state_machine_as_test(PoolMachine, settings=QUICK)


@pytest.mark.slow
def test_the_promises_hold_in_long_histories() -> None:
    run_state_machine_as_test(PoolMachine, settings=settings(QUICK, max_examples=600, stateful_step_count=100))

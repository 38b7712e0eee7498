"""Free slots: nothing twice, nothing absent, fullest stripes first, and the stock engine's own answers for blocks."""

from __future__ import annotations

import pytest
import torch
from chimera.kv.slots import SlotAllocator, blocks_to_decode, blocks_to_extend


def slots(
    stripes: int = 4, per_stripe: int = 32, block: int = 1, *, present: int | None = None, checked: bool = False
) -> SlotAllocator:
    allocator = SlotAllocator(stripes=stripes, slots_per_stripe=per_stripe, block_slots=block, checked=checked)
    allocator.add(range(stripes if present is None else present))
    return allocator


def taken(allocator: SlotAllocator, count: int) -> torch.Tensor:
    got = allocator.alloc(count)
    assert got is not None
    return got


@pytest.mark.parametrize("block", [1, 16, 64])
def test_every_slot_but_the_first_block_is_handed_out_once(block: int) -> None:
    allocator = slots(per_stripe=128, block=block)
    assert allocator.available == allocator.total == 4 * 128 - block
    got = taken(allocator, allocator.total)
    assert sorted(got.tolist()) == list(range(block, 4 * 128))
    assert got.dtype == torch.int64
    assert (allocator.available, allocator.used) == (0, 4 * 128 - block)
    assert allocator.alloc(block) is None


@pytest.mark.parametrize("block", [1, 16])
def test_what_is_freed_comes_again(block: int) -> None:
    allocator = slots(block=block)
    everything = taken(allocator, allocator.total)
    allocator.free(everything[: 2 * block])
    assert allocator.available == 2 * block
    assert sorted(taken(allocator, 2 * block).tolist()) == sorted(everything[: 2 * block].tolist())


def test_a_freed_view_may_be_overwritten_by_its_owner() -> None:
    allocator = slots()
    table = taken(allocator, allocator.total).clone()
    expected = set(table.tolist())
    allocator.free(table[:])
    table.zero_()
    assert set(taken(allocator, allocator.total).tolist()) == expected


def test_tables_of_32_bit_slots_are_taken_back_too() -> None:
    allocator = slots()
    allocator.free(taken(allocator, 40).to(torch.int32))
    allocator.order()
    assert taken(allocator, allocator.total).dtype == torch.int64


def test_the_fullest_stripes_are_filled_first() -> None:
    allocator = slots(stripes=4, per_stripe=32)
    everything = taken(allocator, allocator.total)
    in_stripe = [everything[everything // 32 == stripe] for stripe in range(4)]
    allocator.free(in_stripe[1][:20])
    allocator.free(in_stripe[2][:3])
    allocator.free(in_stripe[3][:10])
    allocator.order()
    assert (taken(allocator, 3) // 32).tolist() == [2] * 3
    assert (taken(allocator, 10) // 32).tolist() == [3] * 10
    assert (taken(allocator, 20) // 32).tolist() == [1] * 20


def test_order_comes_by_itself_under_load() -> None:
    """After a burst that touched everything, steady traffic withdraws from the emptier stripes."""
    allocator = slots(stripes=16, per_stripe=256)
    generator = torch.Generator().manual_seed(7)
    everything = taken(allocator, allocator.total)
    shuffled = everything[torch.randperm(len(everything), generator=generator)]
    allocator.free(shuffled[:3000])
    live = [piece.clone() for piece in shuffled[3000:].split(8)]
    before = sum(free == 256 for free in allocator.count())
    for _ in range(6000):
        at = int(torch.randint(len(live), (1,), generator=generator))
        allocator.free(live[at])
        live[at] = taken(allocator, len(live[at]))
    after = sum(free == 256 for free in allocator.count())
    assert before == 0
    assert after >= 6, "1,095 slots in use fit into 5 of the 16 stripes; a queue keeps all 16 busy"


def test_stripes_that_come_later_are_used_last() -> None:
    allocator = slots(stripes=4, per_stripe=32, present=1)
    assert allocator.available == 31
    allocator.add([3, 2])
    assert (taken(allocator, 31) // 32).unique().tolist() == [0]
    assert (taken(allocator, 64) // 32).unique().tolist() == [2, 3]


class TestBlocks:
    """Against a slow transcription of what the words of `alloc_extend` say."""

    @pytest.mark.parametrize("size", [2, 16, 64])
    def test_extending_fills_the_last_block_then_takes_new_ones(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        allocator = slots(stripes=8, per_stripe=size * 32, block=size)
        rows: list[list[int]] = [[] for _ in range(6)]
        for _ in range(4):
            prefix = torch.tensor([len(row) for row in rows])
            seq = prefix + torch.randint(1, 3 * size, (6,), generator=generator)
            last = torch.tensor([row[-1] if row else -1 for row in rows])
            free_before = allocator.available
            got = allocator.alloc_extend(
                prefix, seq, last, new_tokens=int((seq - prefix).sum()), new_blocks=blocks_to_extend(prefix, seq, size)
            )
            assert got is not None
            for row, piece in zip(rows, got.split((seq - prefix).tolist()), strict=True):
                row.extend(piece.tolist())
            blocks_used = sum(-(-len(row) // size) for row in rows)
            assert allocator.used == blocks_used * size
            assert free_before - allocator.available == blocks_to_extend(prefix, seq, size) * size
        self.assert_rows_are_whole_blocks(rows, size)

    @pytest.mark.parametrize("size", [1, 16])
    def test_decoding_begins_a_block_only_when_the_last_is_full(self, size: int) -> None:
        allocator = slots(stripes=8, per_stripe=size * 32, block=size)
        rows: list[list[int]] = [[], [], []]
        lengths = torch.tensor([1, size, 2 * size - 1])
        zero = torch.zeros_like(lengths)
        first = allocator.alloc_extend(
            zero, lengths, zero - 1, new_tokens=int(lengths.sum()), new_blocks=blocks_to_extend(zero, lengths, size)
        )
        assert first is not None
        for row, piece in zip(rows, first.split(lengths.tolist()), strict=True):
            row.extend(piece.tolist())
        for _ in range(3 * size):
            seq = torch.tensor([len(row) + 1 for row in rows])
            last = torch.tensor([row[-1] for row in rows])
            got = allocator.alloc_decode(seq, last, new_blocks=blocks_to_decode(seq, size))
            assert got is not None
            for row, slot in zip(rows, got.tolist(), strict=True):
                row.append(slot)
        self.assert_rows_are_whole_blocks(rows, size)

    def test_short_of_blocks_nothing_is_taken(self) -> None:
        allocator = slots(stripes=1, per_stripe=64, block=16)
        zero, long = torch.tensor([0]), torch.tensor([64])
        assert allocator.alloc_extend(zero, long, zero - 1, new_tokens=64, new_blocks=4) is None
        assert allocator.available == 48

    def test_a_block_in_part_is_freed_whole(self) -> None:
        allocator = slots(block=16)
        row = taken(allocator, 48)
        allocator.free(row[:37])
        assert allocator.used == 0

    def test_scattered_slots_free_each_block_once(self) -> None:
        allocator = slots(block=16)
        row = taken(allocator, 48)
        allocator.free_scattered(row[torch.tensor([40, 3, 47, 5])])
        assert allocator.used == 16
        allocator.free_blocks(row[16:17] // 16)
        assert allocator.available == allocator.total

    @staticmethod
    def assert_rows_are_whole_blocks(rows: list[list[int]], size: int) -> None:
        everything = [slot for row in rows for slot in row]
        assert len(set(everything)) == len(everything)
        owners: dict[int, int] = {}
        for number, row in enumerate(rows):
            for position, slot in enumerate(row):
                assert slot % size == position % size
                assert slot // size == row[position - position % size] // size
                assert owners.setdefault(slot // size, number) == number
        assert 0 not in owners


class TestMisuse:
    def test_freeing_twice_is_found_at_once_when_checked(self) -> None:
        allocator = slots(checked=True)
        row = taken(allocator, 8)
        allocator.free(row)
        with pytest.raises(ValueError, match="freed twice"):
            allocator.free(row)

    @pytest.mark.parametrize("wrong", [[5, 5], [100]])
    def test_freeing_a_slot_twice_in_one_call_or_never_handed_out_is_found_when_checked(self, wrong: list[int]) -> None:
        allocator = slots(checked=True)
        taken(allocator, 8)
        with pytest.raises(ValueError, match="freed twice"):
            allocator.free(torch.tensor(wrong))

    def test_freeing_twice_unchecked_is_found_by_the_next_ordering(self) -> None:
        allocator = slots()
        row = taken(allocator, 8)
        allocator.free(row)
        allocator.free(row)
        with pytest.raises(ValueError, match="freed twice"):
            allocator.order()

    def test_a_closed_allocator_answers_every_call_with_an_error(self) -> None:
        allocator = slots()
        row = taken(allocator, 8)
        allocator.close()
        for call in (lambda: allocator.alloc(1), lambda: allocator.free(row), allocator.clear, allocator.count):
            with pytest.raises(ValueError, match="closed"):
                call()

    def test_a_stripe_is_whole_blocks(self) -> None:
        with pytest.raises(ValueError, match="not whole blocks"):
            slots(per_stripe=40, block=16)


class TestEmptyingStripes:
    def test_a_withheld_stripe_hands_out_nothing_and_keeps_what_comes_back(self) -> None:
        allocator = slots(stripes=3, per_stripe=32)
        everything = taken(allocator, allocator.total)
        on_two = everything[everything // 32 == 2]
        allocator.free(on_two[:12])
        allocator.withhold(lambda free: [2])
        assert (allocator.available, allocator.withheld) == (0, 12)
        assert allocator.alloc(1) is None
        allocator.free(on_two[12:])
        allocator.free(everything[:5])
        allocator.settle()
        assert (allocator.available, allocator.withheld) == (5, 32)
        assert allocator.emptied() == [2]
        allocator.drop([2])
        assert allocator.total == 63

    def test_available_leaves_out_what_is_not_counted_yet_and_alloc_finds_it(self) -> None:
        allocator = slots(stripes=2, per_stripe=32)
        everything = taken(allocator, allocator.total)
        allocator.withhold(lambda free: [1])
        allocator.free(everything[:3])
        assert allocator.available == 0
        assert taken(allocator, 3).tolist() == everything[:3].tolist()

    def test_what_must_be_freed_is_named(self) -> None:
        allocator = slots(stripes=3, per_stripe=32, block=16)
        row = taken(allocator, 80)
        allocator.withhold(lambda free: [1])
        assert allocator.on_leaving(row).tolist() == (row // 32 == 1).tolist()
        assert sorted(allocator.to_free().tolist()) == list(range(32, 64))

    def test_restored_stripes_hand_out_what_they_kept(self) -> None:
        allocator = slots(stripes=2, per_stripe=32)
        everything = taken(allocator, allocator.total)
        allocator.withhold(lambda free: [1])
        allocator.free(everything[everything // 32 == 1][:7])
        allocator.restore([1])
        assert allocator.available == 7
        assert stripes_in(taken(allocator, 7)) == {1}

    def test_a_stripe_in_use_cannot_be_dropped(self) -> None:
        allocator = slots(stripes=2, per_stripe=32)
        taken(allocator, allocator.total)
        allocator.withhold(lambda free: [1])
        with pytest.raises(ValueError, match="still holds slots in use"):
            allocator.drop([1])

    @pytest.mark.parametrize("stripe", [1, 3])
    def test_only_present_stripes_are_withheld_and_once(self, stripe: int) -> None:
        allocator = slots(stripes=4, per_stripe=32, present=3)
        allocator.withhold(lambda free: [1])
        with pytest.raises(ValueError, match="not stripes that may be emptied"):
            allocator.withhold(lambda free: [2, stripe])
        assert allocator.leaving == {1}

    def test_clearing_makes_leaving_stripes_empty_and_the_rest_free(self) -> None:
        allocator = slots(stripes=3, per_stripe=32)
        taken(allocator, 90)
        allocator.withhold(lambda free: [2])
        allocator.clear()
        assert (allocator.available, allocator.used, allocator.emptied()) == (63, 0, [2])

    def test_a_tally_adds_up_by_stripe(self) -> None:
        allocator = slots(stripes=3, per_stripe=32)
        assert allocator.tally(torch.tensor([1, 2, 33, 64])).tolist() == [2, 1, 1]
        weights = torch.tensor([0.5, 0.25, 2.0, 1.0])
        assert allocator.tally(torch.tensor([1, 2, 33, 64]), weights).tolist() == [0.75, 2.0, 1.0]


def stripes_in(row: torch.Tensor) -> set[int]:
    return set((row // 32).tolist())

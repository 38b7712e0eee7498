"""The account book of one GPU, told what happens and asked for its orders."""

import math

import pytest
from chimera.core.lease import LeaseClass
from chimera.errors import ProtocolError
from chimera.ledger.book import PATIENCE_S, Survivors
from chimera.msg.events import GpuSampled, PagesHeld, ReplicaStopped, RequestCancelled, Woke, WorkerLost
from chimera.units import MIB

from tests.ledger.builders import NOW, allot, entry, holder_of, ledger_of, levels, life, obeyed, opened


def test_a_lease_rises_at_once_when_there_is_room() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    assert levels(allot(ledger, a, 5)) == [("Grant", "a", 5)]
    assert ledger.free == 3


def test_a_grant_waits_until_recalled_pages_return() -> None:
    ledger = ledger_of(8)
    a, b = opened(ledger, "a", level=8), opened(ledger, "b")
    assert allot(ledger, b, 3) == []
    (recall,) = allot(ledger, a, 5)
    assert levels([recall]) == [("Recall", "a", 5)]
    assert ledger.on(Woke(), NOW) == [], "asking again frees nothing"
    (grant,) = ledger.on(a.obey(recall), NOW)
    assert levels([grant]) == [("Grant", "b", 3)]


def test_pages_that_come_back_bit_by_bit_are_given_on_bit_by_bit() -> None:
    ledger = ledger_of(8)
    a, b = opened(ledger, "a", level=8), opened(ledger, "b")
    a.busy = 6
    (recall,) = allot(ledger, a, 4)
    allot(ledger, b, 4)
    assert levels(ledger.on(a.obey(recall), NOW)) == [("Grant", "b", 2)]
    a.busy = 0
    assert levels(ledger.on(a.settle(), NOW)) == [("Grant", "b", 4)]


def test_those_who_wait_are_served_in_the_order_of_their_allotment() -> None:
    ledger = ledger_of(8)
    a, b, c = opened(ledger, "a", level=8), opened(ledger, "b"), opened(ledger, "c")
    allot(ledger, c, 4)
    allot(ledger, b, 4)
    (recall,) = allot(ledger, a, 2)
    assert levels(ledger.on(a.obey(recall), NOW)) == [("Grant", "c", 4), ("Grant", "b", 2)]


def test_a_recall_before_the_grant_was_answered_charges_what_the_grant_allowed() -> None:
    ledger = ledger_of(8)
    a, b = opened(ledger, "a"), opened(ledger, "b")
    (grant,) = allot(ledger, a, 8)
    (recall,) = allot(ledger, a, 2)
    allot(ledger, b, 6)
    assert ledger.free == 0, "the grant may have been read and used"
    early = a.obey(grant)
    assert ledger.on(early, NOW) == [], "an answer to an older order proves nothing about the newer one"
    assert levels(ledger.on(a.obey(recall), NOW)) == [("Grant", "b", 6)]


def test_a_grant_that_is_overtaken_by_its_recall_is_not_taken() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    (grant,) = allot(ledger, a, 8)
    (recall,) = allot(ledger, a, 2)
    ledger.on(a.obey(recall), NOW)
    ledger.on(a.obey(grant), NOW)
    assert a.terms.level == 2
    assert a.take(8) == 2
    assert ledger.free == 6


def test_answers_that_overtake_each_other_never_raise_the_charge() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    a.busy = 6
    (recall,) = allot(ledger, a, 2)
    half_way = a.obey(recall)
    a.busy = 0
    ledger.on(a.settle(), NOW)
    ledger.on(half_way, NOW)
    ledger.on(half_way, NOW)
    assert ledger.free == 6


def test_a_recall_carries_its_deadline_and_is_overdue_after_it() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    (recall,) = allot(ledger, a, 2, deadline_s=NOW + 0.4)
    assert recall.deadline_s == NOW + 0.4
    assert ledger.overdue(NOW + 0.4) == ()
    (late,) = ledger.overdue(NOW + 2.4)
    assert (late.lease.holder, round(late.overdue_s, 3)) == ("a/0", 2.0)


def test_a_sooner_deadline_is_told_although_the_level_stays() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    allot(ledger, a, 2, deadline_s=NOW + 10)
    assert allot(ledger, a, 2, deadline_s=NOW + 10) == []
    (recall,) = allot(ledger, a, 2, deadline_s=NOW + 1)
    assert (recall.level, recall.deadline_s) == (2, NOW + 1)


def test_an_unanswered_order_is_repeated_as_it_was() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    (grant,) = allot(ledger, a, 5)
    assert ledger.next_wake_s == NOW + PATIENCE_S
    assert ledger.on(Woke(), NOW + PATIENCE_S) == [grant]
    ledger.on(a.obey(grant), NOW + PATIENCE_S)
    assert ledger.next_wake_s is None


def test_a_recall_is_not_repeated_before_its_deadline() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    (recall,) = allot(ledger, a, 5, deadline_s=NOW + 30)
    assert ledger.next_wake_s == NOW + 30
    assert ledger.on(Woke(), NOW + 29) == []
    assert ledger.on(Woke(), NOW + 30) == [recall]


def test_a_quiet_ledger_asks_for_no_timer() -> None:
    ledger = ledger_of(8)
    opened(ledger, "a", level=3)
    assert ledger.next_wake_s is None


def test_262_two_engines_that_both_see_room_cannot_both_take_it() -> None:
    """kvcached 262: availability is checked, then claimed; another engine drains the shared pool in between."""
    ledger = ledger_of(8)
    a, b = opened(ledger, "a"), opened(ledger, "b")
    ledger.on(a.want(8), NOW)
    ledger.on(b.want(8), NOW)
    assert levels(allot(ledger, a, 8) + allot(ledger, b, 8)) == [("Grant", "a", 8)]
    assert b.take(8) == 0, "a holder takes what it was granted, and never looks at what is free"


def test_359_an_idle_holder_gives_back_what_is_above_its_cap() -> None:
    """kvcached 359: an idle instance pins far more than its cap, because only an allocation would make it look."""
    ledger = ledger_of(89)
    idle, b = opened(ledger, "idle", level=89), opened(ledger, "b")
    allot(ledger, b, 67)
    (recall,) = allot(ledger, idle, 22)
    assert ledger.free == 0, "until it answers, what it holds is charged, not what it should hold"
    orders = ledger.on(idle.obey(recall), NOW)
    assert idle.held == 22
    assert levels(orders) == [("Grant", "b", 67)]


def test_498_a_restored_level_grows_again() -> None:
    """kvcached 498: after the limit is lowered and restored, the pool never grows back."""
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    obeyed(ledger, [a], allot(ledger, a, 1))
    assert a.held == 1
    obeyed(ledger, [a], allot(ledger, a, 8))
    assert a.take(7) == 7


def test_a_recall_taken_back_before_it_was_answered_needs_no_free_page() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    (down,) = allot(ledger, a, 1)
    (up,) = allot(ledger, a, 8)
    assert levels([up]) == [("Grant", "a", 8)]
    ledger.on(a.obey(up), NOW)
    ledger.on(a.obey(down), NOW)
    assert (a.held, a.terms.level) == (8, 8)


def test_an_order_is_repeated_even_if_its_level_is_what_the_holder_might_have() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    for level in (7, 0, 7):
        (lost,) = allot(ledger, a, level)
    assert entry(ledger, a).lease.held == 7, "it might have read the first of them"
    assert ledger.on(Woke(), NOW + PATIENCE_S) == [lost]


def test_a_reservation_is_whole_or_refused() -> None:
    ledger = ledger_of(8, margin=1)
    assert ledger.reserve("w", LeaseClass.CONTEXT, 3)
    assert not ledger.reserve("w", LeaseClass.GRAPH, 5)
    assert ledger.free == 4
    assert ledger.reserve("w", LeaseClass.GRAPH, 4)
    assert ledger.free == 0


def test_a_repeated_reservation_costs_nothing_and_a_higher_one_only_the_difference() -> None:
    ledger = ledger_of(8)
    assert all(ledger.reserve("w", LeaseClass.CONTEXT, 3) for _ in range(3))
    assert ledger.free == 5
    assert ledger.reserve("w", LeaseClass.CONTEXT, 8)
    assert ledger.free == 0


def test_released_pages_go_to_whoever_waits() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    ledger.reserve("w", LeaseClass.GRAPH, 6)
    allot(ledger, a, 8)
    assert levels(ledger.release("w", LeaseClass.GRAPH, 2, now=NOW)) == [("Grant", "a", 6)]
    assert levels(ledger.release("w", LeaseClass.GRAPH, now=NOW)) == [("Grant", "a", 8)]
    assert ledger.release("w", LeaseClass.GRAPH, now=NOW) == [], "released twice is released once"


def test_recalled_pages_cannot_be_reserved_before_they_are_back() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    (recall,) = allot(ledger, a, 2)
    assert not ledger.reserve("w", LeaseClass.WEIGHTS, 6)
    ledger.on(a.obey(recall), NOW)
    assert ledger.reserve("w", LeaseClass.WEIGHTS, 6)


def test_a_stopped_replica_frees_its_pages_and_its_worker_keeps_its_own() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=4)
    ledger.reserve(a.worker, LeaseClass.CONTEXT, 1)
    ledger.reserve(a.worker, LeaseClass.WEIGHTS, 3, life=(a.replica, a.epoch))
    assert ledger.free == 0
    ledger.on(ReplicaStopped(replica=a.replica, epoch=a.epoch, reason="drained"), NOW)
    assert ledger.free == 7


def test_a_lost_worker_frees_everything_it_had() -> None:
    ledger = ledger_of(8)
    a, b = opened(ledger, "a", level=4), opened(ledger, "b")
    ledger.reserve(a.worker, LeaseClass.CONTEXT, 1)
    ledger.reserve(a.worker, LeaseClass.WEIGHTS, 3, life=(a.replica, a.epoch))
    allot(ledger, b, 8)
    assert levels(ledger.on(WorkerLost(worker=a.worker, reason="killed"), NOW)) == [("Grant", "b", 8)]


def test_another_workers_end_frees_nothing() -> None:
    ledger = ledger_of(8)
    opened(ledger, "a", level=4)
    ledger.on(WorkerLost(worker="w-of-another-rank", replica=life("a")[0], epoch=life("a")[1], reason="killed"), NOW)
    assert ledger.free == 4


def test_a_stale_epoch_is_ignored() -> None:
    ledger = ledger_of(8)
    old = opened(ledger, "a", level=4)
    late = old.settle()
    ledger.on(ReplicaStopped(replica=old.replica, epoch=old.epoch, reason="drained"), NOW)
    new = holder_of(life("a", 2))
    ledger.open((new.replica, new.epoch), new.worker)
    obeyed(ledger, [new], allot(ledger, new, 8))
    assert ledger.on(late, NOW) == []
    assert ledger.on(ReplicaStopped(replica=old.replica, epoch=old.epoch, reason="again"), NOW) == []
    assert allot(ledger, old, 8) == [], "a decision about a life that has just ended"
    assert ledger.free == 0


def test_two_lives_of_one_replica_are_both_charged() -> None:
    """The old one still drains while the new one grows: neither's pages may be given twice."""
    ledger = ledger_of(8)
    old = opened(ledger, "a", level=5)
    new = holder_of(life("a", 2), worker="w-2")
    ledger.open((new.replica, new.epoch), new.worker)
    assert levels(allot(ledger, new, 5)) == [("Grant", "a", 3)]
    ledger.on(WorkerLost(worker=old.worker, reason="killed"), NOW)
    assert entry(ledger, new).lease.level == 5


def test_strangers_are_counted_in_whole_pages_and_stop_grants() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=4)
    ledger.on(GpuSampled(gpu_id=0, strangers_bytes=3 * MIB), NOW)
    assert ledger.free == 2
    assert levels(allot(ledger, a, 8)) == [("Grant", "a", 6)]
    ledger.on(GpuSampled(gpu_id=0, strangers_bytes=6 * MIB), NOW)
    assert (ledger.free, ledger.view(NOW).short) == (0, 1)
    assert levels(ledger.on(GpuSampled(gpu_id=0, strangers_bytes=0), NOW)) == [("Grant", "a", 8)]


def test_what_a_holder_wants_is_shown_and_decides_nothing() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    early, late = a.want(3), a.want(6)
    assert ledger.on(early, NOW) + ledger.on(late, NOW) == []
    assert (entry(ledger, a).wanted, entry(ledger, a).allotted) == (6, 0)
    obeyed(ledger, [a], allot(ledger, a, 2))
    ledger.on(a.want(7), NOW)
    ledger.on(late, NOW)
    assert entry(ledger, a).wanted == 7, "a wish from before the last order is older"


def test_what_is_not_about_memory_changes_nothing() -> None:
    ledger = ledger_of(8)
    opened(ledger, "a", level=4)
    before = ledger.view(NOW)
    assert ledger.on(RequestCancelled(request_id="r"), NOW) == []
    assert ledger.view(NOW) == before


# A peer or a caller that breaks the contract.


def test_a_holder_that_has_more_than_it_was_given_breaks_the_contract() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=4)
    a.held = a.busy = 6
    with pytest.raises(ProtocolError, match="holds 6 pages of GPU 0; it was never given more than 4"):
        ledger.on(a.settle(), NOW)
    assert ledger.free == 4


def test_an_answer_to_an_order_never_sent_breaks_the_contract() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=4)
    a.terms = a.terms.told(99, 4)
    with pytest.raises(ProtocolError, match="answers order 99"):
        ledger.on(a.settle(), NOW)


def test_misuse_is_refused() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    with pytest.raises(ValueError, match="already has a lease"):
        ledger.open((a.replica, a.epoch), a.worker)
    with pytest.raises(ValueError, match="cannot be allotted -1"):
        allot(ledger, a, -1)
    for lease_class, pages in [(LeaseClass.MARGIN, 1), (LeaseClass.STRANGERS, 1), (LeaseClass.GRAPH, -1)]:
        with pytest.raises(ValueError, match="cannot reserve"):
            ledger.reserve("w", lease_class, pages)
    ledger.on(WorkerLost(worker=a.worker, reason="killed"), NOW)
    with pytest.raises(ValueError, match="has exited"):
        ledger.open(life("b"), a.worker)


def test_nothing_is_reserved_for_the_dead() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a")
    ledger.on(ReplicaStopped(replica=a.replica, epoch=a.epoch, reason="drained"), NOW)
    assert not ledger.reserve(a.worker, LeaseClass.WEIGHTS, 1, life=(a.replica, a.epoch))
    ledger.on(WorkerLost(worker=a.worker, reason="killed"), NOW)
    assert not ledger.reserve(a.worker, LeaseClass.CONTEXT, 1)
    assert ledger.free == 8


# A restarted book.


def survivor(name: str, *, held: int, revision: int = 3) -> PagesHeld:
    """A worker from before the restart, its replica at `held` pages, with weights of two and a context of one."""
    holder = holder_of(life(name, agent_start=1))
    holder.terms, holder.held = holder.terms.told(revision, held), held
    return holder.announce(reserved={LeaseClass.WEIGHTS: 2}, kept={LeaseClass.CONTEXT: 1})


def test_a_restarted_book_gives_nothing_until_all_survivors_have_spoken() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5, workers=frozenset({"w-a", "w-b"})))
    new = opened(ledger, "new")
    assert allot(ledger, new, 16) == []
    assert not ledger.reserve("w-new", LeaseClass.WEIGHTS, 1)
    assert ledger.on(survivor("a", held=4), NOW) == []
    assert levels(ledger.on(survivor("b", held=1), NOW)) == [("Grant", "new", 5)]
    assert not ledger.learning
    assert {c.value: n for c, n in ledger.view(NOW).by_class().items()} == {"weights": 4, "kv": 10, "context": 2}


def test_a_survivor_that_exits_is_not_waited_for() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5, workers=frozenset({"w-a", "w-b"})))
    ledger.on(survivor("a", held=4), NOW)
    ledger.on(WorkerLost(worker="w-b", reason="killed"), NOW)
    assert (ledger.learning, ledger.free) == (False, 9)


def test_the_wait_for_survivors_has_an_end() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5))
    ledger.on(survivor("a", held=4), NOW)
    assert (ledger.learning, ledger.next_wake_s) == (True, NOW + 5)
    ledger.on(Woke(), NOW + 5)
    assert (ledger.learning, ledger.free) == (False, 9)


def test_a_survivor_that_speaks_too_late_is_charged_all_the_same() -> None:
    ledger = ledger_of(8, survivors=Survivors(until_s=NOW))
    new = opened(ledger, "new", level=8)
    ledger.on(survivor("a", held=4), NOW)
    assert ledger.view(NOW).short == 7
    assert allot(ledger, new, 9) == [], "nothing more is given while the GPU is over its capacity"


def test_a_survivor_goes_on_from_the_revision_it_has_read() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5, workers=frozenset({"w-a"})))
    said = survivor("a", held=4, revision=3)
    ledger.on(said, NOW)
    holder = holder_of(life("a", agent_start=1))
    (recall,) = allot(ledger, holder, 1)
    assert (recall.revision, recall.level) == (4, 1)
    ledger.on(said, NOW)
    assert entry(ledger, holder).lease.charged == 4, "what it said before the order does not answer the order"


def test_a_survivor_half_way_through_a_recall_goes_on_down_and_grows_again() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5, workers=frozenset({"w-a"})))
    a = holder_of(life("a", agent_start=1))
    a.terms, a.held, a.busy = a.terms.told(3, 2), 6, 6
    ledger.on(a.announce(), NOW)
    assert (ledger.free, entry(ledger, a).lease.level) == (10, 2)
    (again,) = ledger.on(Woke(), NOW + PATIENCE_S)
    assert levels([again]) == [("Recall", "a", 2)]
    a.busy = 0
    ledger.on(a.obey(again), NOW)
    assert ledger.free == 14
    assert levels(allot(ledger, a, 6)) == [("Grant", "a", 6)]


def test_an_announcement_that_comes_after_the_end_brings_nothing_back() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5))
    said = survivor("a", held=4)
    ledger.on(said, NOW)
    ledger.on(ReplicaStopped(replica=said.replica, epoch=said.epoch, reason="drained"), NOW)
    ledger.on(said, NOW)
    assert ledger.view(NOW).by_class() == {LeaseClass.CONTEXT: 1}
    ledger.on(WorkerLost(worker=said.worker, reason="killed"), NOW)
    ledger.on(said, NOW)
    assert ledger.view(NOW).charged == 0


def test_an_end_that_overtakes_its_announcement_is_an_end_all_the_same() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5))
    said = survivor("a", held=4)
    ledger.on(ReplicaStopped(replica=said.replica, epoch=said.epoch, reason="drained"), NOW)
    ledger.on(said, NOW)
    assert ledger.view(NOW).by_class() == {LeaseClass.CONTEXT: 1}


def test_a_survivor_that_is_used_before_it_has_spoken_is_still_believed() -> None:
    ledger = ledger_of(16, survivors=Survivors(until_s=NOW + 5, workers=frozenset({"w-a"})))
    ledger.open(life("b"), "w-a")
    ledger.on(PagesHeld(worker="w-a", gpu_id=0, kept={LeaseClass.CONTEXT: 1, LeaseClass.GRAPH: 2}), NOW)
    assert ledger.free == 13


def test_a_worker_that_connects_anew_gets_the_order_it_has_missed() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    (recall,) = allot(ledger, a, 2, deadline_s=NOW + 60)
    assert ledger.on(a.announce(), NOW) == [recall]
    ledger.on(a.obey(recall), NOW)
    assert ledger.on(a.announce(kept={LeaseClass.GRAPH: 3}), NOW) == []
    assert ledger.free == 6, "what the book knows of a worker, it knows better than a repeated announcement"


def test_a_lease_without_a_deadline_is_never_overdue() -> None:
    ledger = ledger_of(8)
    a = opened(ledger, "a", level=8)
    allot(ledger, a, 2, deadline_s=math.inf)
    assert ledger.overdue(1e12) == ()

"""Queues: who goes next, who may leave, and what a decision costs when many wait."""

from __future__ import annotations

from time import perf_counter

from chimera.core.replica import Epoch, ReplicaId
from chimera.sched.gpu import GpuScheduler, Mint
from chimera.sched.queues import Fcfs, queue_named
from hypothesis import given
from hypothesis import strategies as st

from tests.sched.builders import activate, finished, ready, request, routed

ARRIVALS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), max_size=12)


@given(ARRIVALS, st.data())
def test_fcfs_gives_the_oldest_first_and_equals_in_the_order_they_came(arrivals: list[float], data: st.DataObject) -> None:
    queue = Fcfs()
    here = {str(n): at for n, at in enumerate(arrivals)}
    for request_id, at in here.items():
        queue.push(request(request_id, at=at))
    for request_id in data.draw(st.lists(st.sampled_from([*here, "stranger"]), unique=True)):
        removed = queue.remove(request_id)
        assert (removed is None) == (here.pop(request_id, None) is None)
    assert [r.request_id for r in queue] == sorted(here, key=lambda i: (here[i], int(i)))
    assert all(request_id in queue for request_id in here)
    assert [queue.pop(9.0).request_id for _ in range(len(queue))] == sorted(here, key=lambda i: (here[i], int(i)))


@given(ARRIVALS, ARRIVALS)
def test_a_queue_filled_from_its_own_listing_goes_on_as_the_one_listed(first: list[float], then: list[float]) -> None:
    queue, copy = Fcfs(), Fcfs()
    for n, at in enumerate(first):
        queue.push(request(f"first {n}", at=at))
    for listed in queue:
        copy.push(listed)
    for n, at in enumerate(then):
        queue.push(request(f"then {n}", at=at))
        copy.push(request(f"then {n}", at=at))
    assert list(queue) == list(copy)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, "next", "cancel"]), min_size=1, max_size=12))
def test_of_the_late_the_oldest_has_the_turn_whoever_came_and_went(happened: list[float | str]) -> None:
    queue, here = queue_named("moore-hodgson", lambda _: 0.1), dict[str, float]()
    for number, what in enumerate(happened):
        if isinstance(what, float):
            queue.push(request(str(number), at=what))
            here[str(number)] = what
        elif here:
            oldest = min(here, key=lambda i: here[i])
            left = queue.pop(1000.0) if what == "next" else queue.remove(next(reversed(here)))
            assert left is not None and (what == "cancel" or left.request_id == oldest)
            del here[left.request_id]
        if here:
            assert queue.turn(1000.0) == (True, min(here.values()))


def test_a_decision_with_ten_thousand_waiting_is_a_matter_of_microseconds() -> None:
    gpu, epoch, replica = GpuScheduler(0, Mint(7)), Epoch(7, 1), ReplicaId("a")
    gpu.on(activate("a"), 0.0)
    gpu.on(ready("a", epoch, credits=1), 0.0)
    waiting = [routed(str(n), replica, at=float(n)) for n in range(10_000)]
    for event in waiting:
        gpu.on(event, 0.0)
    ends = [finished(str(n), "a", epoch) for n in range(1000)]
    began = perf_counter()
    for event in ends:
        gpu.on(event, 0.0)
    mean_s = (perf_counter() - began) / len(ends)
    assert mean_s < 2e-3, "the goal is 200 µs; ten times that is a mistake, not a busy machine"
